#include "engine/sizing.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace tw {
namespace {

// A chunk of prefill is about the time of a few decode steps.
constexpr int32_t kCpuBatchTokens = 256;
// A chunk that holds up no stream may be larger: the weights are unpacked less often.
constexpr int32_t kCpuLoneBatchTokens = 512;
constexpr int32_t kCpuRunningJobs = 64;
constexpr int64_t kCpuKvTokens = 32768;
// Below this a GPU's matrix units wait for weights, above it prefill holds decoding streams up for longer.
constexpr int32_t kGpuBatchTokens = 2048;
constexpr int32_t kGpuRunningJobs = 256;

bool is_cpu(const DeviceInfo& device) { return device.id == "cpu"; }

[[noreturn]] void throw_too_little(const std::string& what, int64_t required, const Backend& backend) {
  throw Error(ErrorCode::kInsufficientVram, what + " does not fit: required " + std::to_string(required) +
                                                " bytes, available " + std::to_string(backend.free_bytes()) +
                                                " bytes on " + backend.device_info().id);
}

}  // namespace

EngineOptions resolve(EngineOptions options, const DeviceInfo& device) {
  const bool cpu = is_cpu(device);
  if (options.max_batch_tokens <= 0) {
    options.max_batch_tokens = cpu ? kCpuBatchTokens : kGpuBatchTokens;
    options.max_lone_batch_tokens = cpu ? kCpuLoneBatchTokens : kGpuBatchTokens;
  }
  options.max_lone_batch_tokens = std::max(options.max_lone_batch_tokens, options.max_batch_tokens);
  if (options.max_running_jobs <= 0) options.max_running_jobs = cpu ? kCpuRunningJobs : kGpuRunningJobs;
  // Every running job must be able to decode in every step.
  options.max_running_jobs = std::min(options.max_running_jobs, options.max_batch_tokens);
  if (options.max_queued_jobs <= 0) options.max_queued_jobs = 256;
  if (options.max_queued_tokens <= 0) options.max_queued_tokens = int64_t{1} << 20;
  if (options.max_undelivered_tokens <= 0) options.max_undelivered_tokens = 64;
  if (options.slow_reader_timeout_ms <= 0) options.slow_reader_timeout_ms = 30000;
  return options;
}

int64_t wanted_kv_tokens(const ModelShape& shape, const EngineOptions& resolved, const DeviceInfo& device) {
  if (is_cpu(device)) return std::max<int64_t>(shape.context_length, kCpuKvTokens);
  return int64_t{shape.context_length} * std::max(resolved.max_running_jobs, 1);
}

int32_t choose_kv_blocks(const ModelShape& shape, int64_t kv_cache_bytes, int64_t wanted_tokens,
                         const Backend& backend) {
  const int64_t block_bytes = shape.kv_bytes_per_token() * kBlockTokens;
  const int64_t free = backend.free_bytes();
  if (kv_cache_bytes <= 0) {
    const int64_t share = is_cpu(backend.device_info()) ? free / 4 : free / 10 * 9;
    kv_cache_bytes = std::min(wanted_tokens * shape.kv_bytes_per_token(), share);
  } else if (kv_cache_bytes > free) {
    throw_too_little("the KV pool", kv_cache_bytes, backend);
  }
  const int64_t blocks = kv_cache_bytes / block_bytes;
  if (blocks < 1) throw_too_little("a KV pool of " + std::to_string(kv_cache_bytes) + " bytes", block_bytes, backend);
  return static_cast<int32_t>(std::min<int64_t>(blocks, INT32_MAX));
}

void require_memory_for_weights(const gguf::File& file, const Backend& backend) {
  int64_t required = 0;
  for (const gguf::TensorInfo& tensor : file.tensors()) required += static_cast<int64_t>(tensor.num_bytes);
  if (required > backend.free_bytes()) throw_too_little("the model", required, backend);
}

}  // namespace tw
