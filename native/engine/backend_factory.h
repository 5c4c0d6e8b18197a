// The one place that knows which backends there are.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/backend.h"

namespace tw {

// `device` is "cpu", "cuda" or "cuda:N". Throws Error: kInvalidRequest for another text, kUnavailable if the device
// cannot be used here. `num_threads` and `nice` are for the CPU (cpu_backend.h).
std::unique_ptr<Backend> make_backend(const std::string& device, int32_t num_threads, int32_t nice = 0);

}  // namespace tw
