// Q5_0: 32 values a block, value = scale · (code − 16).
#pragma once

#include <cstdint>

namespace tw::quant {

struct BlockQ5_0 {
  uint16_t scale;         // F16
  uint8_t fifth_bits[4];  // little-endian word: bit i is bit 4 of code i
  uint8_t codes[16];      // bits 0…3: low nibbles are values 0…15, high nibbles 16…31
};
static_assert(sizeof(BlockQ5_0) == 22);

// Row functions, as formats.h describes them.
void dequantize_q5_0(const void* src, float* dst, int64_t n);
bool scales_finite_q5_0(const void* data, int64_t num_blocks);

}  // namespace tw::quant
