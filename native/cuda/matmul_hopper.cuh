// Which of Hopper's kernels for many tokens a product takes. They differ in time alone.
#pragma once

#include "cuda/matmul_flat.cuh"
#include "cuda/matmul_tall.cuh"

namespace tw::cuda {

// Nanoseconds of a product whose blocks have `rows` × `tokens` outputs, and how many blocks there are.
struct KernelCost {
  int64_t blocks;
  int64_t nanoseconds;

  // Measured on an H200 with BF16 weights: a step of 64 inputs, and a tile's beginning and end.
  static KernelCost of(const MatmulTask& task, int processors, int rows, int tokens, int step, int ends) {
    const int64_t blocks =
        ((int64_t{task.num_tokens} + tokens - 1) / tokens) * ((int64_t{task.part.num_tiles} * 16 + rows - 1) / rows);
    return {blocks, (blocks + processors - 1) / processors * (int64_t{task.part.num_steps} * step + ends)};
  }
};

template <class Format>
void launch_hopper(const MatmulTask& task) {
  Kernel kernel = task.kernel;
  if (kernel == Kernel::kAuto) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const KernelCost flat = KernelCost::of(task, processors, 64, 64, 255, 4000);
    const KernelCost tall64 = KernelCost::of(task, processors, 64, 128, 320, 3000);
    const KernelCost tall128 = KernelCost::of(task, processors, 128, 128, 370, 3000);
    // Where many blocks meet, L2 is the bound, and two sharing the inputs are faster.
    const bool crowded = task.num_tokens >= 1024;
    if (flat.nanoseconds < std::min(tall64.nanoseconds, tall128.nanoseconds)) {
      kernel = Kernel::kFlat;
    } else if (tall64.nanoseconds < tall128.nanoseconds) {
      kernel = Kernel::kTall64;
    } else {
      kernel = crowded ? Kernel::kTall128Pairs : Kernel::kTall128;
    }
  }
  switch (kernel) {
    case Kernel::kTall64: return launch_tall<Format, TallShape64>(task, 1);
    case Kernel::kTall64Pairs: return launch_tall<Format, TallShape64>(task, 2);
    case Kernel::kTall128: return launch_tall<Format, TallShape128>(task, 1);
    case Kernel::kTall128Pairs: return launch_tall<Format, TallShape128>(task, 2);
    default: return launch_flat<Format>(task);
  }
}

}  // namespace tw::cuda
