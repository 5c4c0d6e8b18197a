// Faults that tests ask for, made as a device really suffers them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/memory.h"

namespace tw::cuda {

// Asks for more memory than any device has. Throws Error(kInsufficientVram), as a real shortage does.
void exhaust_memory(MemoryTracker* tracker);

// Stops a kernel of the stream with a trap: from then on every call to this context fails.
void spoil_device(cudaStream_t stream);

// Host memory that the tracker takes for weights, so that a residency check must find it.
PinnedBuffer make_foreign_weights(MemoryTracker* tracker);

}  // namespace tw::cuda
