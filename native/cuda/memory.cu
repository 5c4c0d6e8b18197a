#include "cuda/memory.h"

#include <string>

#include "cuda/check.h"

namespace tw::cuda {
namespace {

const char* name_of(Purpose purpose) {
  switch (purpose) {
    case Purpose::kWeights: return "weights";
    case Purpose::kKv: return "the KV pool";
    case Purpose::kWorkspace: break;
  }
  return "the workspace";
}

}  // namespace

void MemoryTracker::add(Purpose purpose, int64_t num_bytes) {
  switch (purpose) {
    case Purpose::kWeights: use_.weight_bytes += num_bytes; break;
    case Purpose::kKv: use_.kv_bytes += num_bytes; break;
    case Purpose::kWorkspace: use_.workspace_bytes += num_bytes; break;
  }
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
    throw Error(ErrorCode::kInsufficientVram, std::string(name_of(purpose)) + " need " + std::to_string(num_bytes) +
                                                  " bytes more, device cuda:" + std::to_string(tracker->device()) +
                                                  " has " + std::to_string(MemoryTracker::free_bytes()) + " left");
  }
  TW_CUDA_CHECK(error);
  tracker_->add(purpose_, static_cast<int64_t>(size_));
  TW_CUDA_CHECK(cudaMemset(data_, 0, num_bytes));
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
  (void)cudaFree(data_);
  tracker_->add(purpose_, -static_cast<int64_t>(size_));
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
