// Sixteen-lane vectors with the same meaning, bit for bit, on every instruction set.
//
// Kernels are written once against these types and compiled once an instruction set (native/CMakeLists.txt), into the
// namespace TW_ISA. A float operation here is exactly one IEEE operation a lane and a sum over lanes has one fixed
// order, so a kernel's result does not depend on the processor. This header may only be included by kernel sources.
#pragma once

#if defined(TW_ISA_AVX512)
#define TW_ISA avx512
#include "cpu/simd_avx512.h"
#elif defined(TW_ISA_AVX2)
#define TW_ISA avx2
#include "cpu/simd_avx2.h"
#else
#define TW_ISA portable
#include "cpu/simd_portable.h"
#endif

namespace tw::cpu::TW_ISA {

// e^x for every lane, within 2 units in the last place for x in [-87, 88]; smaller x gives a value below 1.3e-38.
// Range reduction by ln 2 and a degree-6 polynomial (Cephes expf).
inline F32x16 exp(F32x16 x) {
  x = min(max(x, F32x16::broadcast(-87.3f)), F32x16::broadcast(88.0f));
  const I32x16 n = round_to_int(x * F32x16::broadcast(1.44269504088896341f));
  const F32x16 nf = to_float(n);
  F32x16 r = fma(nf, F32x16::broadcast(-0.693359375f), x);
  r = fma(nf, F32x16::broadcast(2.12194440e-4f), r);
  F32x16 p = F32x16::broadcast(1.9875691500e-4f);
  p = fma(p, r, F32x16::broadcast(1.3981999507e-3f));
  p = fma(p, r, F32x16::broadcast(8.3334519073e-3f));
  p = fma(p, r, F32x16::broadcast(4.1665795894e-2f));
  p = fma(p, r, F32x16::broadcast(1.6666665459e-1f));
  p = fma(p, r, F32x16::broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + F32x16::broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}

// 1 / x for x in [2^-100, 2^100], within 2 units in the last place, in a quarter of a division's time: three steps of
// Newton's method from a guess that is within 13 %.
inline F32x16 reciprocal(F32x16 x) {
  const F32x16 one = F32x16::broadcast(1.0f);
  const F32x16 minus_x = F32x16::zero() - x;
  F32x16 y = guess_reciprocal(x);
  for (int step = 0; step < 3; ++step) y = fma(y, fma(minus_x, y, one), y);
  return y;
}

// x · sigmoid(x).
inline F32x16 silu(F32x16 x) {
  const F32x16 e = min(exp(F32x16::zero() - x), F32x16::broadcast(1e30f));
  return x * reciprocal(F32x16::broadcast(1.0f) + e);
}

}  // namespace tw::cpu::TW_ISA
