// The storage formats as a table: what can be done with a row of any of them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tw::quant {

struct Format {
  DType dtype;
  // Expands `n` values, a whole number of blocks, from `src` (any alignment) to `dst`. The plain reference of a format.
  void (*dequantize_row)(const void* src, float* dst, int64_t n);
  // Whether every scale is finite; for float formats, every value. What is not finite would poison each token's logits.
  bool (*all_scales_finite)(const void* data, int64_t num_blocks);
};

const Format& format(DType dtype);

inline void dequantize_row(DType dtype, const void* src, float* dst, int64_t n) {
  format(dtype).dequantize_row(src, dst, n);
}

inline bool all_scales_finite(DType dtype, const void* data, int64_t num_blocks) {
  return format(dtype).all_scales_finite(data, num_blocks);
}

}  // namespace tw::quant
