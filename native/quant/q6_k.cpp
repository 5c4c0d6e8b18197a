#include "quant/q6_k.h"

#include "quant/block.h"

namespace tw::quant {

void dequantize_q6_k(const void* src, float* dst, int64_t n) {
  for (int64_t b = 0; b < n / 256; ++b) {
    const auto block = load_block<BlockQ6_K>(src, b);
    const float block_scale = f16_to_f32(block.scale);
    for (int quarter = 0; quarter < 8; ++quarter, dst += 32) {
      const int half = quarter / 4;
      const int q = quarter % 4;
      const uint8_t* low_bits = block.low_bits + 64 * half + 32 * (q % 2);
      const uint8_t* high_bits = block.high_bits + 32 * half;
      for (int i = 0; i < 32; ++i) {
        const int low = q < 2 ? low_nibble(low_bits[i]) : high_nibble(low_bits[i]);
        const int code = low | ((high_bits[i] >> (2 * q)) & 3) << 4;
        const float scale = block_scale * static_cast<float>(block.group_scales[2 * quarter + i / 16]);
        dst[i] = scale * static_cast<float>(code - 32);
      }
    }
  }
}

bool scales_finite_q6_k(const void* data, int64_t num_blocks) {
  return scales_finite<BlockQ6_K>(data, num_blocks, &BlockQ6_K::scale);
}

}  // namespace tw::quant
