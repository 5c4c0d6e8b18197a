// Whether CUDA can be used by this build on this machine. Nothing here needs CUDA's headers or libraries.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/backend.h"

namespace tw::cuda {

// Whether the CUDA backend was built.
bool built();

// `available`, or in a few words why CUDA cannot be used here: `built without CUDA`, `no NVIDIA driver`, `no CUDA
// device` or the driver's own reason. Opens the driver and the backend on each call, so it follows changes; not for hot
// paths.
std::string status();

// A backend on CUDA device `device`. Throws Error(kUnavailable) if CUDA cannot be used here, or what the device
// answers.
std::unique_ptr<Backend> make_backend(int32_t device);

}  // namespace tw::cuda
