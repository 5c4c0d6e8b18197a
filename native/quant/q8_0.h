// Q8_0: 32 values a block, value = scale · code.
#pragma once

#include <cstdint>

namespace tw::quant {

struct BlockQ8_0 {
  uint16_t scale;  // F16
  int8_t codes[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// Row functions, as formats.h describes them.
void dequantize_q8_0(const void* src, float* dst, int64_t n);
bool scales_finite_q8_0(const void* data, int64_t num_blocks);

}  // namespace tw::quant
