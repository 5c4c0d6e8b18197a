// F32, F16 and BF16: a block is one value. Conversions of single values are in core/half.h.
#pragma once

#include <cstdint>

namespace tw::quant {

// Row functions, as formats.h describes them.
void dequantize_f32(const void* src, float* dst, int64_t n);
void dequantize_f16(const void* src, float* dst, int64_t n);
void dequantize_bf16(const void* src, float* dst, int64_t n);
bool all_finite_f32(const void* data, int64_t num_values);
bool all_finite_f16(const void* data, int64_t num_values);
bool all_finite_bf16(const void* data, int64_t num_values);

}  // namespace tw::quant
