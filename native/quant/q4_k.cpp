#include "quant/q4_k.h"

#include "quant/block.h"
#include "quant/k_groups.h"

namespace tw::quant {

void dequantize_q4_k(const void* src, float* dst, int64_t n) {
  for (int64_t b = 0; b < n / 256; ++b) {
    const auto block = load_block<BlockQ4_K>(src, b);
    const float block_scale = f16_to_f32(block.scale);
    const float block_min_scale = f16_to_f32(block.min_scale);
    for (int group = 0; group < 8; ++group, dst += 32) {
      const GroupScale packed = group_scale(block.groups, group);
      const float scale = block_scale * static_cast<float>(packed.scale);
      const float minimum = block_min_scale * static_cast<float>(packed.minimum);
      const uint8_t* codes = block.codes + 32 * (group / 2);
      for (int i = 0; i < 32; ++i) {
        const int code = group % 2 == 0 ? low_nibble(codes[i]) : high_nibble(codes[i]);
        dst[i] = scale * static_cast<float>(code) - minimum;
      }
    }
  }
}

bool scales_finite_q4_k(const void* data, int64_t num_blocks) {
  return scales_finite<BlockQ4_K>(data, num_blocks, &BlockQ4_K::scale, &BlockQ4_K::min_scale);
}

}  // namespace tw::quant
