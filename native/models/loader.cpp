#include "models/loader.h"

#include <algorithm>
#include <atomic>
#include <map>

#include "core/error.h"
#include "quant/formats.h"

namespace tw {

Loader::Loader(const gguf::File& file, Backend* backend, std::string architecture,
               const std::function<void(int)>& on_progress)
    : file_(file),
      backend_(backend),
      architecture_(std::move(architecture)),
      on_progress_(on_progress),
      readers_(num_memory_threads()) {
  for (const gguf::TensorInfo& tensor : file.tensors()) total_bytes_ += static_cast<int64_t>(tensor.num_bytes);
  on_progress_(0);
}

int32_t Loader::integer(const std::string& key, uint32_t low, uint32_t high) const {
  return static_cast<int32_t>(file_.metadata().get_u32(architecture_ + "." + key, low, high));
}

int32_t Loader::integer_or(const std::string& key, uint32_t low, uint32_t high, int32_t fallback) const {
  const auto found = file_.metadata().find_u32(architecture_ + "." + key, low, high);
  return found ? static_cast<int32_t>(*found) : fallback;
}

float Loader::real_or(const std::string& key, float low, float high, float fallback) const {
  return file_.metadata().find_f32(architecture_ + "." + key, low, high).value_or(fallback);
}

std::string Loader::text_or(const std::string& key, const std::string& fallback) const {
  const auto found = file_.metadata().find_string(architecture_ + "." + key);
  return found ? std::string(*found) : fallback;
}

bool Loader::has(const std::string& key) const { return file_.metadata().contains(architecture_ + "." + key); }

bool Loader::has_tensor(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

int64_t Loader::num_rows(const std::string& name) const { return file_.tensor(name).dims[1]; }

// Scales that are not finite would poison every token's logits, so they are refused here, once. Often this is the first
// to read the tensor, which several threads do sooner than one.
const gguf::TensorInfo& Loader::use(const gguf::TensorInfo& tensor) {
  const DTypeInfo& info = dtype_info(tensor.dtype);
  const auto num_blocks = static_cast<int64_t>(tensor.num_bytes / info.block_bytes);
  const int64_t item_blocks = kMemoryItemBytes / static_cast<int64_t>(info.block_bytes);
  std::atomic<bool> finite{true};
  readers_.for_each((num_blocks + item_blocks - 1) / item_blocks, [&](int64_t item, int) {
    const int64_t first = item * item_blocks;
    const uint8_t* const blocks = tensor.data + first * static_cast<int64_t>(info.block_bytes);
    if (!quant::all_scales_finite(tensor.dtype, blocks, std::min(item_blocks, num_blocks - first))) finite = false;
  });
  if (!finite) {
    throw Error(ErrorCode::kModelLoadFailed,
                "tensor `" + std::string(tensor.name) + "` holds a scale that is not finite");
  }
  used_.insert(std::string(tensor.name));
  unpacked_.push_back(&tensor);
  return tensor;
}

MatrixSource Loader::matrix(const std::string& name, int64_t num_rows, int64_t num_cols) {
  const gguf::TensorInfo& tensor = use(file_.tensor(name, {num_cols, num_rows}));
  return {tensor.dtype, num_rows, num_cols, tensor.data};
}

std::vector<float> Loader::vector(const std::string& name, int64_t size) {
  const gguf::TensorInfo& tensor = use(file_.tensor(name, {size}));
  std::vector<float> values(static_cast<size_t>(size));
  quant::dequantize_row(tensor.dtype, tensor.data, values.data(), size);
  return values;
}

void Loader::packed() {
  for (const gguf::TensorInfo* tensor : unpacked_) {
    packed_bytes_ += static_cast<int64_t>(tensor->num_bytes);
    file_.release_pages(*tensor);
  }
  unpacked_.clear();
  const int quarter = total_bytes_ == 0 ? 0 : static_cast<int>(packed_bytes_ * 4 / total_bytes_);
  for (; reported_ < std::min(quarter, 3); ++reported_) on_progress_(25 * (reported_ + 1));
}

void Loader::finish() {
  for (const gguf::TensorInfo& tensor : file_.tensors()) {
    if (used_.count(std::string(tensor.name)) == 0) {
      throw Error(ErrorCode::kUnsupportedModel, "tensor `" + std::string(tensor.name) + "` is not part of a " +
                                                    architecture_ + " model of this shape");
    }
  }
  file_.check_unchanged();
  for (; reported_ < 4; ++reported_) on_progress_(25 * (reported_ + 1));
}

std::string Loader::quant_kind() const {
  std::map<DType, int64_t> bytes;
  for (const gguf::TensorInfo& tensor : file_.tensors()) bytes[tensor.dtype] += static_cast<int64_t>(tensor.num_bytes);
  const auto most =
      std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return most == bytes.end() ? "" : dtype_info(most->first).name;
}

}  // namespace tw
