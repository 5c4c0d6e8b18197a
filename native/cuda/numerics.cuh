// The arithmetic that several kernels share and must do alike.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/check.h"

namespace tw::cuda {

__device__ __forceinline__ uint32_t as_u32(__half2 value) { return *reinterpret_cast<uint32_t*>(&value); }
__device__ __forceinline__ __half2 as_half2(uint32_t value) { return *reinterpret_cast<__half2*>(&value); }
__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  return as_u32(__halves2half2(__float2half_rn(low), __float2half_rn(high)));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 × 8 matrices of 16-byte rows: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// A lane's 16 inputs of one token as FP16 pairs.
struct LaneInputs {
  uint32_t pair[8];
};

// The factor 2^(14 - e) for a largest magnitude in [2^e, 2^(e+1)), and its inverse.
__device__ __forceinline__ float range_factor(uint32_t magnitude_bits, float* inverse) {
  int exponent = static_cast<int>(magnitude_bits >> 23) - 127;
  if (magnitude_bits == 0) exponent = 14;
  exponent = min(max(exponent, -100), 126);
  *inverse = __int_as_float((127 + exponent - 14) << 23);
  return __int_as_float((127 + 14 - exponent) << 23);
}

// 1 / √(mean of squares + ε), from sums of 16 values each. The four lanes of a quad call it together and get the same.
__device__ __forceinline__ float inverse_rms(const float* sums, int count, int q, float inverse_size, float epsilon) {
  float sum = 0;
#pragma unroll 8
  for (int i = q * 4; i < count; i += 16) {
    const float4 v = *reinterpret_cast<const float4*>(sums + i);
    sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(v.x, v.y), __fadd_rn(v.z, v.w)));
  }
  sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
  sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
  return __frsqrt_rn(__fadd_rn(__fmul_rn(sum, inverse_size), epsilon));
}

// x / (1 + e^-x), by approximations that treat subnormal numbers as 0, which here changes nothing.
__device__ __forceinline__ float silu(float x) {
  constexpr float kLog2E = 1.44269504f;
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -kLog2E)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(1.0f, power)));
  return __fmul_rn(x, inverse);
}

// 16 consecutive inputs, in device or shared memory.
__device__ __forceinline__ LaneInputs load_inputs(const __half* inputs) {
  const auto* x = reinterpret_cast<const uint4*>(inputs);
  const uint4 low = x[0];
  const uint4 high = x[1];
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ void copy_async16_to(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  copy_async16_to(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), global, valid);
}

template <class Kernel>
void allow_shared(Kernel kernel, size_t num_bytes) {
  if (num_bytes <= 48 * 1024) return;
  TW_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(num_bytes)));
}

}  // namespace tw::cuda
