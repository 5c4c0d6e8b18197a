#include "cuda/matmul.h"

#include "core/error.h"
#include "cuda/launch.h"

namespace tw::cuda {

extern const FormatKernels kF32Kernels, kF16Kernels, kBF16Kernels, kQ8_0Kernels, kQ4_0Kernels, kQ4_1Kernels,
    kQ5_0Kernels, kQ5_1Kernels, kQ4_KKernels, kQ5_KKernels, kQ6_KKernels;

const FormatKernels& kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kF32: return kF32Kernels;
    case DType::kF16: return kF16Kernels;
    case DType::kBF16: return kBF16Kernels;
    case DType::kQ8_0: return kQ8_0Kernels;
    case DType::kQ4_0: return kQ4_0Kernels;
    case DType::kQ4_1: return kQ4_1Kernels;
    case DType::kQ5_0: return kQ5_0Kernels;
    case DType::kQ5_1: return kQ5_1Kernels;
    case DType::kQ4_K: return kQ4_KKernels;
    case DType::kQ5_K: return kQ5_KKernels;
    case DType::kQ6_K: return kQ6_KKernels;
  }
  throw Error(ErrorCode::kInternal, "a storage format without CUDA kernels");
}

bool has_hopper() {
#ifdef TW_CUDA_HOPPER
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#else
  return false;
#endif
}

// By what either layout's kernels take on an H200: few tokens are many to a large matrix.
bool takes_tiles(const PackedPart& part, int32_t num_tokens) {
  if (num_tokens <= 16 || !has_hopper()) return num_tokens > 64;
  constexpr int32_t kManyTiles = 256;
  if (num_tokens > 32) return num_tokens > 64 || part.num_tiles >= kManyTiles;
  return part.num_tiles >= kManyTiles && part.num_tiles * part.num_steps >= (holds_codes(part.dtype) ? 48 : 96) * 1024;
}

void matmul(const MatmulTask& task) {
  if (task.num_tokens < 1 || task.input_stride % 64 != 0 || task.part.num_splits > task.part.num_steps ||
      (task.tiled && task.input_kind != Input::kHalf)) {
    throw Error(ErrorCode::kInternal, "a matrix product of an impossible shape");
  }
  kernels_for(task.part.dtype).matmul(task);
}

}  // namespace tw::cuda
