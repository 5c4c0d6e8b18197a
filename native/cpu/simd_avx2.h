// simd.h's types on AVX2 with FMA and F16C: two 256-bit halves. Included by simd.h only.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tw::cpu::avx2 {

struct F32x16 {
  __m256 lo, hi;
  static F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static F32x16 load_bf16(const uint16_t* p) {
    const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
  static F32x16 load_u8(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static F32x16 load_i8(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store_f16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32x16 abs(F32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}

// Lanes 2i and 2i+1 exchanged.
inline F32x16 swap_pairs(F32x16 a) { return {_mm256_permute_ps(a.lo, 0xB1), _mm256_permute_ps(a.hi, 0xB1)}; }

// Lanes [0, n) of `a`, `other` in the rest; n may be negative or beyond 16.
inline F32x16 first_lanes(F32x16 a, int n, float other) {
  const __m256i count = _mm256_set1_epi32(n);
  const __m256 keep_lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  const __m256 keep_hi =
      _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)));
  const __m256 rest = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(rest, a.lo, keep_lo), _mm256_blendv_ps(rest, a.hi, keep_hi)};
}

// The sum of all lanes: lane i with i+8, then with i+4, i+2, i+1.
inline float sum(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float max_lane(F32x16 a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}

struct I32x16 {
  __m256i lo, hi;
  static I32x16 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I32x16 broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
};

inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline I32x16 shift_left_8(I32x16 a) { return {_mm256_slli_epi32(a.lo, 8), _mm256_slli_epi32(a.hi, 8)}; }
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// To the nearest integer, ties to even.
inline I32x16 round_to_int(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
// a · 2^n, by adding to the exponent; the result must be a normal number.
inline F32x16 scale_by_power_of_two(F32x16 a, I32x16 n) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.lo), _mm256_slli_epi32(n.lo, 23))),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.hi), _mm256_slli_epi32(n.hi, 23)))};
}
inline int32_t sum(I32x16 a) {
  const __m256i s8 = _mm256_add_epi32(a.lo, a.hi);
  __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  s4 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0xb1)));
}
// The low byte of each lane.
inline void store_low_bytes(I32x16 a, int8_t* p) {
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  int32_t words[4];
  const __m256i lo = _mm256_shuffle_epi8(a.lo, pick);
  const __m256i hi = _mm256_shuffle_epi8(a.hi, pick);
  words[0] = _mm256_extract_epi32(lo, 0);
  words[1] = _mm256_extract_epi32(lo, 4);
  words[2] = _mm256_extract_epi32(hi, 0);
  words[3] = _mm256_extract_epi32(hi, 4);
  std::memcpy(p, words, sizeof words);
}
inline I32x16 arithmetic_shift_right_8(I32x16 a) { return {_mm256_srai_epi32(a.lo, 8), _mm256_srai_epi32(a.hi, 8)}; }

// 64 unsigned bytes: four for each of 16 lanes.
struct U8x64 {
  __m256i lo, hi;
  static U8x64 load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  void store(uint8_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), hi);
  }
};

inline U8x64 low_nibbles(U8x64 a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline U8x64 high_nibbles(U8x64 a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, 4), mask), _mm256_and_si256(_mm256_srli_epi16(a.hi, 4), mask)};
}

namespace detail {
// `addend` in byte i where bit i of the 32 bits at `bits` is set, else 0.
inline __m256i spread_bits(const uint8_t* bits, int8_t addend) {
  int32_t word;
  std::memcpy(&word, bits, sizeof word);
  const __m256i byte_of =
      _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of), bit_of);
  return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit_of), _mm256_set1_epi8(addend));
}
}  // namespace detail

// Adds `addend` to byte i where bit i of the 64 bits at `bits` is set.
inline U8x64 add_where(U8x64 a, const uint8_t* bits, int8_t addend) {
  return {_mm256_add_epi8(a.lo, detail::spread_bits(bits, addend)),
          _mm256_add_epi8(a.hi, detail::spread_bits(bits + 4, addend))};
}

namespace detail {
template <int k>
__m256i top_bits(__m256i top) {
  if constexpr (k < 2) top = _mm256_slli_epi16(top, 4 - 2 * k);
  if constexpr (k > 2) top = _mm256_srli_epi16(top, 2 * k - 4);
  return _mm256_and_si256(top, _mm256_set1_epi8(0x30));
}
}  // namespace detail

// Bits 2k and 2k + 1 of each byte of `top`, moved to bits 4 and 5 of the codes below 16 in `a`.
template <int k>
U8x64 or_top_bits(U8x64 a, U8x64 top) {
  return {_mm256_or_si256(a.lo, detail::top_bits<k>(top.lo)), _mm256_or_si256(a.hi, detail::top_bits<k>(top.hi))};
}

// Four signed bytes, the same for every lane.
struct X4 {
  __m256i v;
  static X4 load(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return {_mm256_set1_epi32(word)};
  }
};

namespace detail {
// The products are summed in pairs in 16 bits: w < 128 keeps them exact.
inline __m256i dot_small(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
// Even and odd bytes are widened to 16 bits and multiplied apart: exact for any w.
inline __m256i dot_any(__m256i acc, __m256i w, __m256i x) {
  const __m256i even_w = _mm256_and_si256(w, _mm256_set1_epi16(255));
  const __m256i odd_w = _mm256_srli_epi16(w, 8);
  const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  const __m256i odd_x = _mm256_srai_epi16(x, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even_w, even_x), _mm256_madd_epi16(odd_w, odd_x)));
}
}  // namespace detail

// acc + Σ over each lane's four bytes of w·x, exact. `dot_small` requires every w < 128, `dot` takes any.
inline I32x16 dot_small(I32x16 acc, U8x64 w, X4 x) {
  return {detail::dot_small(acc.lo, w.lo, x.v), detail::dot_small(acc.hi, w.hi, x.v)};
}
inline I32x16 dot(I32x16 acc, U8x64 w, X4 x) {
  return {detail::dot_any(acc.lo, w.lo, x.v), detail::dot_any(acc.hi, w.hi, x.v)};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache.
inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace tw::cpu::avx2
