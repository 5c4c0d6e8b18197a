#include "quant/q8_0.h"

#include "quant/block.h"

namespace tw::quant {

void dequantize_q8_0(const void* src, float* dst, int64_t n) {
  for (int64_t b = 0; b < n / 32; ++b, dst += 32) {
    const auto block = load_block<BlockQ8_0>(src, b);
    const float scale = f16_to_f32(block.scale);
    for (int i = 0; i < 32; ++i) dst[i] = scale * static_cast<float>(block.codes[i]);
  }
}

bool scales_finite_q8_0(const void* data, int64_t num_blocks) {
  return scales_finite<BlockQ8_0>(data, num_blocks, &BlockQ8_0::scale);
}

}  // namespace tw::quant
