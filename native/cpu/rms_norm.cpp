// Root-mean-square normalisation (Zhang & Sennrich 2019), fused with the quantisation of its result.
//
// out[i] = x[i] · (1 / √(mean(x²) + eps)) · gain[i]. The sum of squares runs over 16 lanes in input order; lanes are
// added in simd.h's fixed order.
#include <cmath>

#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {

void rms_norm(const float* x, int64_t x_stride, const float* gain, float eps, const Activations& out, int64_t begin,
              int64_t end, NormOutput output) {
  const int64_t num_cols = out.num_cols;
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x + row * x_stride;
    F32x16 squares = F32x16::zero();
    for (int64_t i = 0; i < num_cols; i += 16) {
      const F32x16 v = F32x16::load(in + i);
      squares = fma(v, v, squares);
    }
    const float mean = sum(squares) / static_cast<float>(num_cols);
    const F32x16 factor = F32x16::broadcast(1.0f / std::sqrt(mean + eps));
    // Values that nobody reads stay in the first-level cache.
    float* values = out.values + (output == NormOutput::kCodes ? begin : row) * num_cols;
    for (int64_t i = 0; i < num_cols; i += 16) {
      (F32x16::load(in + i) * factor * F32x16::load(gain + i)).store(values + i);
    }
    if (output != NormOutput::kValues) quantize_row(values, out, row);
  }
}

}  // namespace tw::cpu::TW_ISA
