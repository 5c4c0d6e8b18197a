// Whether CUDA can be used by this build on this machine. Nothing here needs CUDA's headers or libraries.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"

namespace tw::cuda {

// Compute capability, major × 10 + minor, that the backend has code for: this and newer.
constexpr int32_t kLeastSm = 80;

// Whether the CUDA backend was built.
bool built();

struct Device {
  int32_t index;
  std::string name;  // as the driver names it
  int32_t sm;        // compute capability, major × 10 + minor
  int64_t total_bytes;
};

// What CUDA is on this machine.
struct Probe {
  std::string error;            // why it cannot be used; empty if it can
  std::string driver_version;   // newest CUDA that the driver supports, such as `13.0`; empty without a driver
  std::string runtime_version;  // CUDA inside the backend, likewise
  std::vector<Device> devices;
};

// Opens the driver and the backend on each call, so it follows changes; not for hot paths. Creates no context.
Probe probe();

// `available`, or in a few words why CUDA cannot be used here: `built without CUDA`, `no NVIDIA driver`, `no CUDA
// device` or the driver's own reason: probe().error.
std::string status();

// Makes this process's context on CUDA device `device`, or for -1 on the first that the backend has code for: a few
// hundred milliseconds that a start can spend on other things. Does nothing where that fails; make_backend() says why.
void open_device(int32_t device);

// A backend on CUDA device `device`. Throws Error(kUnavailable) if CUDA cannot be used here, or what the device
// answers.
std::unique_ptr<Backend> make_backend(int32_t device);

}  // namespace tw::cuda
