// Kernel launches with programmatic dependent launch: a kernel may start while its predecessor ends, fetches its
// weights, and waits (await_predecessor) before it touches what earlier kernels wrote.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"

namespace tw::cuda {

// compute-sanitizer's racecheck does not follow all that orders two accesses. A build for it (TOKENWIRE_RACECHECK)
// orders them in a way that it does follow, which takes longer.
#ifdef TW_RACECHECK
constexpr bool kForRacecheck = true;
#else
constexpr bool kForRacecheck = false;
#endif

// Every kernel launched by launch() calls this before it reads or writes anything but weights (but see Beside); since
// all do, whatever the chain of kernels wrote before is complete and visible afterwards.
__device__ __forceinline__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin its own preparation.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Products of the same inputs with outputs apart may run side by side: which of its neighbours in the stream one runs
// beside. All but the last let the next begin once their own predecessor is over; all but the first have their inputs
// by then, and end after the one before them. Such kernels call these three instead, in this order.
struct Beside {
  bool previous;
  bool next;
};

__device__ __forceinline__ void release_successor(const Beside& beside) {
  if (!beside.next) release_successor();
}

__device__ __forceinline__ void await_predecessor(const Beside& beside) {
  if (!beside.previous) await_predecessor();
  if (beside.next) release_successor();
}

__device__ __forceinline__ void end_after_predecessor(const Beside& beside) {
  if (beside.previous) await_predecessor();
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  TW_CUDA_CHECK(cudaGetDevice(&device));
  TW_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// The most shared memory that a block of the current device can have, less what kernels declare beside their own.
inline size_t max_shared_bytes() {
  constexpr int kDeclared = 2048;
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kDeclared);
}

// In clusters of `cluster_size` consecutive blocks; more than one needs compute capability 9.0.
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), int cluster_size, dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) < 9 ? 0 : cluster_size > 1 ? 2 : 1;
  TW_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  launch_clusters(kernel, 1, grid, block, shared_bytes, stream, args...);
}

}  // namespace tw::cuda
