// A model: its shape, its weights in a backend, and one forward pass. One file an architecture, one row in
// registry.cpp.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "core/backend.h"
#include "core/step.h"
#include "gguf/file.h"

namespace tw {

struct ModelInfo {
  std::string architecture;
  std::string name;
  std::string quant_kind;  // the format most of the weight bytes are stored in
  int32_t context_length = 0;
  int32_t vocab_size = 0;
  int32_t num_layers = 0;
  int64_t weight_bytes = 0;
  int64_t kv_bytes_per_token = 0;
};

class Model {
 public:
  virtual ~Model() = default;
  const ModelInfo& info() const { return info_; }
  const ModelShape& shape() const { return shape_; }
  // Runs the plan on the backend that holds the weights; afterwards it has the logits of plan.logit_rows.
  virtual void forward(Backend* backend, const StepPlan& plan) const = 0;

 protected:
  ModelInfo info_;
  ModelShape shape_;
};

// Reads the file's configuration, checks every tensor against it and packs the weights into the backend. A
// `max_context` above 0 lowers the context. `on_progress` gets 0, 25, 50, 75 and 100.
// Throws Error with kUnsupportedModel or kModelLoadFailed.
std::unique_ptr<Model> load_model(const gguf::File& file, Backend* backend, int32_t max_context,
                                  const std::function<void(int)>& on_progress);

}  // namespace tw
