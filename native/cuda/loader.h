// Whether CUDA can be used by this build on this machine. Nothing here needs CUDA's headers or libraries.
#pragma once

#include <string>

namespace tw::cuda {

// Whether the CUDA backend was built.
bool built();

// `available`, or in a few words why CUDA cannot be used here: `built without CUDA`, `no NVIDIA driver`, `no CUDA
// device` or the driver's own reason. Opens the driver and the backend on each call, so it follows changes; not for hot
// paths.
std::string status();

}  // namespace tw::cuda
