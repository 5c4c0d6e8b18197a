#include "quant/q5_1.h"

#include "quant/block.h"

namespace tw::quant {

void dequantize_q5_1(const void* src, float* dst, int64_t n) {
  for (int64_t b = 0; b < n / 32; ++b, dst += 32) {
    const auto block = load_block<BlockQ5_1>(src, b);
    const float scale = f16_to_f32(block.scale);
    const float minimum = f16_to_f32(block.minimum);
    const uint32_t fifth = load_block<uint32_t>(block.fifth_bits, 0);
    for (int i = 0; i < 16; ++i) {
      const int low = low_nibble(block.codes[i]) | bit_at(fifth, i) << 4;
      const int high = high_nibble(block.codes[i]) | bit_at(fifth, i + 16) << 4;
      dst[i] = scale * static_cast<float>(low) + minimum;
      dst[i + 16] = scale * static_cast<float>(high) + minimum;
    }
  }
}

bool scales_finite_q5_1(const void* data, int64_t num_blocks) {
  return scales_finite<BlockQ5_1>(data, num_blocks, &BlockQ5_1::scale, &BlockQ5_1::minimum);
}

}  // namespace tw::quant
