// F32, F16 and BF16: conversions of single values, and the row functions of the format table.
//
// The conversions are `static`: this header is compiled into files of different instruction sets, and one shared copy of
// an inline function could be the one that the oldest processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

namespace tw::quant {

static inline uint32_t f32_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float f32_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 31) {
    const uint32_t quiet = mantissa == 0 ? 0 : 0x400000u;
    return f32_from_bits(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  if (exponent == 0) return f32_from_bits(sign | f32_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return f32_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = f32_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Floats in [0.5, 1) are 2^-24 apart, which is the spacing of F16's subnormals: the addition rounds as we need.
    const float shifted = f32_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (f32_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float bf16_to_f32(uint16_t value) { return f32_from_bits(uint32_t{value} << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = f32_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline bool is_finite_f16(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

// Row functions, as formats.h describes them. A block is one value.
void dequantize_f32(const void* src, float* dst, int64_t n);
void dequantize_f16(const void* src, float* dst, int64_t n);
void dequantize_bf16(const void* src, float* dst, int64_t n);
bool all_finite_f32(const void* data, int64_t num_values);
bool all_finite_f16(const void* data, int64_t num_values);
bool all_finite_bf16(const void* data, int64_t num_values);

}  // namespace tw::quant
