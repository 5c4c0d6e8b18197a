// Q4_1: 32 values a block, value = scale · code + minimum.
#pragma once

#include <cstdint>

namespace tw::quant {

struct BlockQ4_1 {
  uint16_t scale;     // F16
  uint16_t minimum;   // F16
  uint8_t codes[16];  // low nibbles are values 0…15, high nibbles 16…31
};
static_assert(sizeof(BlockQ4_1) == 20);

// Row functions, as formats.h describes them.
void dequantize_q4_1(const void* src, float* dst, int64_t n);
bool scales_finite_q4_1(const void* data, int64_t num_blocks);

}  // namespace tw::quant
