// The CPU backend: packed weights, a thread pool and the kernels of this machine's instruction set.
#pragma once

#include <memory>

#include "core/backend.h"

namespace tw::cpu {

// `num_threads` 0 uses all the processors this process may run on; `nice` is for the threads that it starts.
std::unique_ptr<Backend> make_cpu_backend(int num_threads, int nice);

}  // namespace tw::cpu
