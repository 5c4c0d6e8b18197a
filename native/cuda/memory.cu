#include "cuda/memory.h"

#include <string>

#include "cuda/check.h"

namespace tw::cuda {
namespace {

const char* name_of(Purpose purpose) {
  switch (purpose) {
    case Purpose::kWeights: return "the weights";
    case Purpose::kKv: return "the KV pool";
    case Purpose::kWorkspace: break;
  }
  return "the workspace";
}

}  // namespace

MemoryUse MemoryTracker::use() const {
  MemoryUse use;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [address, allocation] : allocations_) {
    const auto num_bytes = static_cast<int64_t>(allocation.num_bytes);
    switch (allocation.purpose) {
      case Purpose::kWeights: use.weight_bytes += num_bytes; break;
      case Purpose::kKv: use.kv_bytes += num_bytes; break;
      case Purpose::kWorkspace: use.workspace_bytes += num_bytes; break;
    }
  }
  return use;
}

void MemoryTracker::add(const void* address, Purpose purpose, size_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  allocations_[address] = {purpose, num_bytes};
}

void MemoryTracker::remove(const void* address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  allocations_.erase(address);
}

// Nothing that is asked about can be freed meanwhile: a buffer leaves the tracker first.
std::string MemoryTracker::check_residency() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [address, allocation] : allocations_) {
    cudaPointerAttributes found{};
    TW_CUDA_CHECK(cudaPointerGetAttributes(&found, address));
    if (found.type == cudaMemoryTypeDevice && found.device == device_ && found.hostPointer == nullptr) continue;
    const char* const where = found.type == cudaMemoryTypeManaged  ? "managed memory"
                              : found.type == cudaMemoryTypeDevice ? "memory of another device"
                                                                   : "host memory";
    return std::to_string(allocation.num_bytes) + " bytes of " + name_of(allocation.purpose) + " lie in " + where +
           ", not in that of cuda:" + std::to_string(device_);
  }
  return "";
}

int64_t MemoryTracker::free_bytes() {
  size_t free = 0;
  size_t total = 0;
  TW_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}

DeviceBuffer::DeviceBuffer(MemoryTracker* tracker, Purpose purpose, size_t num_bytes)
    : tracker_(tracker), purpose_(purpose), size_(num_bytes) {
  if (num_bytes == 0) return;
  const cudaError_t error = cudaMalloc(&data_, num_bytes);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    data_ = nullptr;
    const MemoryUse use = tracker->use();
    throw Error(ErrorCode::kInsufficientVram,
                "no memory for " + std::string(name_of(purpose)) + ": required " + std::to_string(num_bytes) +
                    " bytes more, available " + std::to_string(MemoryTracker::free_bytes()) +
                    " bytes on cuda:" + std::to_string(tracker->device()) + " beside " +
                    std::to_string(use.weight_bytes + use.kv_bytes + use.workspace_bytes) + " already held");
  }
  TW_CUDA_CHECK(error);
  tracker_->add(data_, purpose_, size_);
  // Zeroed before anyone uses it: kernels run on streams that do not wait for the default one.
  TW_CUDA_CHECK(cudaMemset(data_, 0, num_bytes));
  TW_CUDA_CHECK(cudaStreamSynchronize(nullptr));
}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    reset();
    tracker_ = other.tracker_;
    purpose_ = other.purpose_;
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

// A failure to free is not reported: it happens only on a device that an earlier, reported error has spoiled.
void DeviceBuffer::reset() noexcept {
  if (data_ == nullptr) return;
  tracker_->remove(data_);
  (void)cudaFree(data_);
  data_ = nullptr;
}

PinnedBuffer::PinnedBuffer(size_t num_bytes) : size_(num_bytes) {
  TW_CUDA_CHECK(cudaHostAlloc(&data_, num_bytes, cudaHostAllocDefault));
}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

Stream::Stream() { TW_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }

Stream::~Stream() {
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

void Stream::synchronize() const { TW_CUDA_CHECK(cudaStreamSynchronize(stream_)); }

Event::Event() { TW_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }

Event::~Event() {
  if (event_ != nullptr) (void)cudaEventDestroy(event_);
}

void Event::record(cudaStream_t stream) const { TW_CUDA_CHECK(cudaEventRecord(event_, stream)); }

void Event::synchronize() const { TW_CUDA_CHECK(cudaEventSynchronize(event_)); }

GraphExec GraphExec::end_capture(cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  TW_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  GraphExec result;
  const cudaError_t error = cudaGraphInstantiate(&result.exec_, graph, 0);
  (void)cudaGraphDestroy(graph);
  TW_CUDA_CHECK(error);
  return result;
}

GraphExec::~GraphExec() {
  if (exec_ != nullptr) (void)cudaGraphExecDestroy(exec_);
}

void GraphExec::launch(cudaStream_t stream) const { TW_CUDA_CHECK(cudaGraphLaunch(exec_, stream)); }

}  // namespace tw::cuda
