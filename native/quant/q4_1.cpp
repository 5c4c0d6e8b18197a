#include "quant/q4_1.h"

#include "quant/block.h"

namespace tw::quant {

void dequantize_q4_1(const void* src, float* dst, int64_t n) {
  for (int64_t b = 0; b < n / 32; ++b, dst += 32) {
    const auto block = load_block<BlockQ4_1>(src, b);
    const float scale = f16_to_f32(block.scale);
    const float minimum = f16_to_f32(block.minimum);
    for (int i = 0; i < 16; ++i) {
      dst[i] = scale * static_cast<float>(low_nibble(block.codes[i])) + minimum;
      dst[i + 16] = scale * static_cast<float>(high_nibble(block.codes[i])) + minimum;
    }
  }
}

bool scales_finite_q4_1(const void* data, int64_t num_blocks) {
  return scales_finite<BlockQ4_1>(data, num_blocks, &BlockQ4_1::scale, &BlockQ4_1::minimum);
}

}  // namespace tw::quant
