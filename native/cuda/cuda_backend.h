// The CUDA backend (core/backend.h) on one device.
#pragma once

#include <cstdint>
#include <memory>

#include "core/backend.h"

namespace tw::cuda {

// Throws Error: kUnavailable if the device is not there or this build has no code for it, kCudaError if it fails.
std::unique_ptr<Backend> make_cuda_backend(int32_t device);

}  // namespace tw::cuda
