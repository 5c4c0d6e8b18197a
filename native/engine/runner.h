// The model without the loop, for tests and benchmarks: feeds tokens of independent sequences and returns logits.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "engine/engine.h"
#include "engine/profiling_backend.h"

namespace tw {

// Not thread-safe. Sequences are named by any number and grow as tokens are fed.
class Runner {
 public:
  Runner(const gguf::File& file, const EngineOptions& options);

  const ModelInfo& model_info() const { return model_->info(); }
  // Appends tokens to a sequence, in chunks of the engine's batch size. Returns the logits of the last token, or of
  // every token: [count, vocab_size].
  std::vector<float> forward(int32_t sequence, const std::vector<int32_t>& ids, bool all_logits);
  // Appends one token to each of several sequences in one step. Returns [sequences, vocab_size].
  std::vector<float> forward_batch(const std::vector<int32_t>& sequences, const std::vector<int32_t>& ids);
  void reset();

  // Time and bytes of each operation since the last reset_profile().
  const std::map<std::string, OpProfile>& profile() const { return backend_->profile(); }
  void reset_profile() { backend_->reset_profile(); }

 private:
  struct State {
    int32_t num_tokens = 0;
    std::vector<int32_t> block_table;
  };

  void append(int32_t sequence, const int32_t* ids, int32_t count);
  void run(std::vector<float>* logits);

  std::unique_ptr<ProfilingBackend> backend_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvPool> pool_;
  int32_t max_rows_ = 0;
  std::map<int32_t, State> states_;
  StepPlan plan_;
};

}  // namespace tw
