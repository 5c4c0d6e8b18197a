// What the architectures share while a model is loaded: typed configuration, checked tensors, progress.
#pragma once

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/thread_pool.h"
#include "gguf/file.h"

namespace tw {

// Every value read is checked against bounds, which are inclusive; every tensor is fetched with the shape expected, and
// a mismatch names both.
class Loader {
 public:
  Loader(const gguf::File& file, Backend* backend, std::string architecture,
         const std::function<void(int)>& on_progress);

  Backend* backend() { return backend_; }
  const std::string& architecture() const { return architecture_; }
  const gguf::File& file() const { return file_; }

  // Values under `<architecture>.`.
  bool has(const std::string& key) const;
  int32_t integer(const std::string& key, uint32_t low, uint32_t high) const;
  int32_t integer_or(const std::string& key, uint32_t low, uint32_t high, int32_t fallback) const;
  float real_or(const std::string& key, float low, float high, float fallback) const;
  std::string text_or(const std::string& key, const std::string& fallback) const;

  bool has_tensor(const std::string& name) const;
  // Rows of a matrix whose shape itself defines a size.
  int64_t num_rows(const std::string& name) const;
  MatrixSource matrix(const std::string& name, int64_t num_rows, int64_t num_cols);
  // A vector of any stored format, as floats.
  std::vector<float> vector(const std::string& name, int64_t size);

  // The tensors fetched since the last call were copied: gives back their pages and reports progress.
  void packed();
  // Nothing more is needed. Throws if the file has tensors that nobody fetched, or changed meanwhile.
  void finish();

  // The format that holds the most bytes.
  std::string quant_kind() const;

 private:
  const gguf::TensorInfo& use(const gguf::TensorInfo& tensor);

  const gguf::File& file_;
  Backend* backend_;
  const std::string architecture_;
  const std::function<void(int)>& on_progress_;
  ThreadPool readers_;
  std::set<std::string> used_;
  std::vector<const gguf::TensorInfo*> unpacked_;
  int64_t total_bytes_ = 0;
  int64_t packed_bytes_ = 0;
  int reported_ = 0;  // quarters
};

}  // namespace tw
