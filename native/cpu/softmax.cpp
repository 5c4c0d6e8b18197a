// The vector parts of sampling: the largest logit and exponentials with their sums.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {
namespace {

// Lanes past the end are loaded as `fill`.
F32x16 load_tail(const float* x, int64_t count, float fill) {
  alignas(64) float lanes[16];
  for (int64_t i = 0; i < 16; ++i) lanes[i] = i < count ? x[i] : fill;
  return F32x16::load(lanes);
}

}  // namespace

float max_value(const float* x, int64_t n, bool* finite) {
  F32x16 best = F32x16::broadcast(x[0]);
  F32x16 poison = F32x16::zero();  // 0 · x is 0 only for finite x
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32x16 v = F32x16::load(x + i);
    best = max(best, v);
    poison = fma(v, F32x16::zero(), poison);
  }
  if (i < n) {
    const F32x16 v = load_tail(x + i, n - i, x[0]);
    best = max(best, v);
    poison = fma(v, F32x16::zero(), poison);
  }
  *finite = sum(poison) == 0.0f;
  return max_lane(best);
}

void exp_runs(const float* x, int64_t n, float max, float scale, float* e, float* run_sums) {
  const F32x16 top = F32x16::broadcast(max);
  const F32x16 factor = F32x16::broadcast(scale);
  for (int64_t begin = 0; begin < n; begin += kExpRun) {
    const int64_t end = begin + kExpRun < n ? begin + kExpRun : n;
    F32x16 total = F32x16::zero();
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      const F32x16 v = exp((F32x16::load(x + i) - top) * factor);
      if (e != nullptr) v.store(e + i);
      total = total + v;
    }
    if (i < end) {
      const F32x16 v = first_lanes(exp((load_tail(x + i, end - i, max) - top) * factor), static_cast<int>(end - i), 0);
      alignas(64) float lanes[16];
      v.store(lanes);
      for (int64_t lane = 0; e != nullptr && i + lane < end; ++lane) e[i + lane] = lanes[lane];
      total = total + v;
    }
    run_sums[begin / kExpRun] = sum(total);
  }
}

}  // namespace tw::cpu::TW_ISA
