#include "quant/float_formats.h"

#include <cstddef>
#include <cstring>

#include "core/half.h"

namespace tw::quant {
namespace {

// Data of a file may lie at any address, so elements are copied out rather than cast.
template <class T>
T load(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + static_cast<size_t>(index) * sizeof value, sizeof value);
  return value;
}

// True if no value has all bits of `exponent_mask` set. Branch-free inside a chunk, so that it runs at memory speed.
template <class T>
bool exponents_finite(const void* data, int64_t num_values, T exponent_mask) {
  constexpr int64_t kChunk = 4096;
  for (int64_t begin = 0; begin < num_values; begin += kChunk) {
    const int64_t end = num_values - begin < kChunk ? num_values : begin + kChunk;
    T bad = 0;
    for (int64_t i = begin; i < end; ++i) {
      bad = static_cast<T>(bad | ((load<T>(data, i) & exponent_mask) == exponent_mask ? 1 : 0));
    }
    if (bad != 0) return false;
  }
  return true;
}

}  // namespace

void dequantize_f32(const void* src, float* dst, int64_t n) {
  if (n > 0) std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}

void dequantize_f16(const void* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = f16_to_f32(load<uint16_t>(src, i));
}

void dequantize_bf16(const void* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_f32(load<uint16_t>(src, i));
}

bool all_finite_f32(const void* data, int64_t num_values) {
  return exponents_finite<uint32_t>(data, num_values, 0x7f800000u);
}

bool all_finite_f16(const void* data, int64_t num_values) {
  return exponents_finite<uint16_t>(data, num_values, 0x7c00u);
}

bool all_finite_bf16(const void* data, int64_t num_values) {
  return exponents_finite<uint16_t>(data, num_values, 0x7f80u);
}

}  // namespace tw::quant
