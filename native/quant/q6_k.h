// Q6_K: 256 values a block in 16 groups of 16, value = scale · s[g] · (code − 32).
#pragma once

#include <cstdint>

namespace tw::quant {

struct BlockQ6_K {
  // Each half of 128 values has 64 bytes of low bits and 32 of high bits. In a half, quarter q holds values 32q … 32q +
  // 31; code i of quarter q has its low bits in byte 32 (q % 2) + i, low nibble for q < 2, and bits 2q, 2q + 1 of high
  // byte i.
  uint8_t low_bits[128];
  uint8_t high_bits[64];
  int8_t group_scales[16];
  uint16_t scale;  // F16
};
static_assert(sizeof(BlockQ6_K) == 210);

// Row functions, as formats.h describes them.
void dequantize_q6_k(const void* src, float* dst, int64_t n);
bool scales_finite_q6_k(const void* data, int64_t num_blocks);

}  // namespace tw::quant
