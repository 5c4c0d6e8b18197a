// The kernels of one storage format behind matmul.h.
#pragma once

#include "cuda/matmul_hopper.cuh"
#include "cuda/matmul_narrow.cuh"
#include "cuda/matmul_wide.cuh"
#include "cuda/pack_kernels.cuh"

namespace tw::cuda {

template <class Format>
void matmul_of(const MatmulTask& task) {
  if (task.tiled) {
    if (task.kernel == Kernel::kWide || !has_hopper()) return launch_wide<Format>(task);
    return launch_hopper<Format>(task);
  }
  return task.epilogue == Epilogue::kGateUp ? launch_narrow<Format, 2>(task) : launch_narrow<Format, 1>(task);
}

template <class Format>
constexpr FormatKernels kernels_of(DType dtype) {
  return {dtype, Format::kStepBytes, Format::kSuperBytes, pack_of<Format>, matmul_of<Format>, embed_of<Format>};
}

}  // namespace tw::cuda
