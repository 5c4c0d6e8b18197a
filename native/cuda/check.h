// Every CUDA call is checked with its text and place, and a failure becomes tw::Error.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/error.h"

namespace tw::cuda {

// What a failed call means for its caller: a lack of memory spares the device, anything else has spoiled it.
[[noreturn]] inline void throw_cuda_error(cudaError_t error, const char* call, const char* file, int line) {
  const ErrorCode code = error == cudaErrorMemoryAllocation ? ErrorCode::kVramOom : ErrorCode::kCudaError;
  throw Error(code,
              std::string(call) + ": " + cudaGetErrorString(error) + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace tw::cuda

#define TW_CUDA_CHECK(call)                                                   \
  do {                                                                        \
    const cudaError_t tw_cuda_error = (call);                                 \
    if (tw_cuda_error != cudaSuccess) {                                       \
      (void)cudaGetLastError();                                               \
      ::tw::cuda::throw_cuda_error(tw_cuda_error, #call, __FILE__, __LINE__); \
    }                                                                         \
  } while (false)
