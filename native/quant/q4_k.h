// Q4_K: 256 values a block in 8 groups of 32, value = scale · s[g] · code − min_scale · m[g].
#pragma once

#include <cstdint>

namespace tw::quant {

struct BlockQ4_K {
  uint16_t scale;      // F16
  uint16_t min_scale;  // F16
  uint8_t groups[12];  // s and m, 6 bits each; see k_groups.h
  uint8_t codes[128];  // byte 32c + i: low nibble is value i of group 2c, high nibble of group 2c + 1
};
static_assert(sizeof(BlockQ4_K) == 144);

// Row functions, as formats.h describes them.
void dequantize_q4_k(const void* src, float* dst, int64_t n);
bool scales_finite_q4_k(const void* data, int64_t num_blocks);

}  // namespace tw::quant
