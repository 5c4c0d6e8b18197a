// Inputs of the kernels for many tokens: normalised or scaled rows as FP16. One block a token; reads 4 and writes 2
// bytes a value. The results are the bits that the kernels for few tokens compute on the fly: sums of squares run over
// 16 values in a tree, then over those sums as inverse_rms() does.
#include "cuda/activations.h"
#include "cuda/launch.h"
#include "cuda/numerics.cuh"
#include "cuda/ops.h"

namespace tw::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) normalize_kernel(const __grid_constant__ NormTask task) {
  extern __shared__ float sums[];  // [stride of sums]
  release_successor();
  await_predecessor();
  const int64_t token = blockIdx.x;
  const int64_t row = task.rows == nullptr ? token : task.rows[token];
  const float* x = task.input + row * task.input_stride;
#pragma unroll 4
  for (int k = static_cast<int>(threadIdx.x); k < task.square_stride * 16; k += kThreads) {
    float square = 0;
    if (k < task.input_stride) square = __fmul_rn(x[k], x[k]);
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) square = __fadd_rn(square, __shfl_xor_sync(~0u, square, offset, 16));
    if (k % 16 == 0) sums[k / 16] = square;
  }
  __syncthreads();
  const int q = static_cast<int>(threadIdx.x) & 3;
  const float factor =
      __fmul_rn(inverse_rms(sums, task.square_stride, q, task.inverse_size, task.epsilon), task.gain_factor);
  for (int k = 2 * static_cast<int>(threadIdx.x); k < task.input_stride; k += 2 * kThreads) {
    const float2 v = *reinterpret_cast<const float2*>(x + k);
    const float2 g = *reinterpret_cast<const float2*>(task.gain + k);
    *reinterpret_cast<uint32_t*>(task.out + pair_offset(takes_tiles(task.num_tokens), token, k, task.input_stride)) =
        pack_half2(__fmul_rn(__fmul_rn(v.x, factor), g.x), __fmul_rn(__fmul_rn(v.y, factor), g.y));
  }
  if (threadIdx.x == 0) task.token_factors[token] = __fdiv_rn(1.0f, task.gain_factor);
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* input, int64_t stride, bool tiled, __half* out, float* token_factors) {
  __shared__ uint32_t largest[kThreads / 32];
  release_successor();
  await_predecessor();
  const int64_t token = blockIdx.x;
  const float* x = input + token * stride;
  const auto size_of = [](float value) { return __float_as_uint(value) & 0x7fffffffu; };
  uint32_t magnitude = 0;
#pragma unroll 8
  for (int k = 4 * static_cast<int>(threadIdx.x); k < stride; k += 4 * kThreads) {
    const float4 v = *reinterpret_cast<const float4*>(x + k);
    magnitude = max(max(magnitude, max(size_of(v.x), size_of(v.y))), max(size_of(v.z), size_of(v.w)));
  }
  magnitude = __reduce_max_sync(~0u, magnitude);
  if ((threadIdx.x & 31) == 0) largest[threadIdx.x / 32] = magnitude;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) magnitude = max(magnitude, largest[i]);
  float inverse;
  const float factor = range_factor(magnitude, &inverse);
#pragma unroll 8
  for (int k = 4 * static_cast<int>(threadIdx.x); k < stride; k += 4 * kThreads) {
    const float4 v = *reinterpret_cast<const float4*>(x + k);
    *reinterpret_cast<uint32_t*>(out + pair_offset(tiled, token, k, stride)) =
        pack_half2(__fmul_rn(v.x, factor), __fmul_rn(v.y, factor));
    *reinterpret_cast<uint32_t*>(out + pair_offset(tiled, token, k + 2, stride)) =
        pack_half2(__fmul_rn(v.z, factor), __fmul_rn(v.w, factor));
  }
  if (threadIdx.x == 0) token_factors[token] = inverse;
}

}  // namespace

void normalize(const NormTask& task) {
  launch(normalize_kernel, dim3(static_cast<unsigned>(task.num_tokens)), dim3(kThreads),
         static_cast<size_t>(task.square_stride) * sizeof(float), task.stream, task);
}

void scale_to_half(const float* input, int64_t stride, int32_t num_tokens, __half* out, float* token_factors,
                   cudaStream_t stream) {
  launch(scale_kernel, dim3(static_cast<unsigned>(num_tokens)), dim3(kThreads), 0, stream, input, stride,
         takes_tiles(num_tokens), out, token_factors);
}

}  // namespace tw::cuda
