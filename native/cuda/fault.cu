#include "cuda/fault.h"

#include "cuda/check.h"

namespace tw::cuda {
namespace {

__global__ void trap_kernel() { __trap(); }

}  // namespace

void exhaust_memory(MemoryTracker* tracker) {
  size_t free = 0;
  size_t total = 0;
  TW_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const DeviceBuffer buffer(tracker, Purpose::kWorkspace, 2 * total);
}

void spoil_device(cudaStream_t stream) {
  trap_kernel<<<1, 1, 0, stream>>>();
  TW_CUDA_CHECK(cudaGetLastError());
}

PinnedBuffer make_foreign_weights(MemoryTracker* tracker) {
  PinnedBuffer buffer(4096);
  tracker->add(buffer.as<uint8_t>(), Purpose::kWeights, buffer.size());
  return buffer;
}

}  // namespace tw::cuda
