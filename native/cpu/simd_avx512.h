// simd.h's types on AVX-512 with VNNI. Included by simd.h only.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tw::cpu::avx512 {

struct F32x16 {
  __m512 v;
  static F32x16 zero() { return {_mm512_setzero_ps()}; }
  static F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static F32x16 load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static F32x16 load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static F32x16 load_i8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }

// Lanes 2i and 2i+1 exchanged.
inline F32x16 swap_pairs(F32x16 a) { return {_mm512_permute_ps(a.v, 0xB1)}; }

// Lanes [0, n) of `a`, `other` in the rest; n may be negative or beyond 16.
inline F32x16 first_lanes(F32x16 a, int n, float other) {
  const auto mask = static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
  return {_mm512_mask_blend_ps(mask, _mm512_set1_ps(other), a.v)};
}

// The sum of all lanes: lane i with i+8, then with i+4, i+2, i+1.
inline float sum(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float first_lane(F32x16 a) { return _mm512_cvtss_f32(a.v); }
inline float max_lane(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

struct I32x16 {
  __m512i v;
  static I32x16 zero() { return {_mm512_setzero_si512()}; }
  static I32x16 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
};

inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// To the nearest integer, ties to even.
inline I32x16 round_to_int(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
// a · 2^n, by adding to the exponent; the result must be a normal number.
inline F32x16 scale_by_power_of_two(F32x16 a, I32x16 n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(n.v, 23)))};
}

// About 1 / a for a normal a below 2^126: its exponent negated, and the bits below with it.
inline F32x16 guess_reciprocal(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x7EF311C7), _mm512_castps_si512(a.v)))};
}

// 32 codes of 16 bits: `a` and then `b`, every four of them in the order 0, 2, 1, 3. sums = {Σa + Σb, Σa}.
inline void store_codes(I32x16 a, I32x16 b, int16_t* p, int32_t* sums) {
  const __m512i order = _mm512_set_epi16(31, 29, 30, 28, 23, 21, 22, 20, 15, 13, 14, 12, 7, 5, 6, 4,  //
                                         27, 25, 26, 24, 19, 17, 18, 16, 11, 9, 10, 8, 3, 1, 2, 0);
  const __m512i words = _mm512_permutexvar_epi16(order, _mm512_packs_epi32(a.v, b.v));
  _mm512_storeu_si512(p, words);
  const __m512i pairs = _mm512_madd_epi16(words, _mm512_set1_epi16(1));
  const __m256i first = _mm512_castsi512_si256(pairs);
  const __m256i all = _mm256_add_epi32(first, _mm512_extracti64x4_epi64(pairs, 1));
  const __m256i fours = _mm256_hadd_epi32(all, first);
  const __m128i eights = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums), _mm_hadd_epi32(eights, eights));
}

// 64 unsigned bytes: four for each of 16 lanes.
struct U8x64 {
  __m512i v;
  static U8x64 load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
};

inline U8x64 low_nibbles(U8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline U8x64 high_nibbles(U8x64 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// Adds `addend` to byte i where bit i of the 64 bits at `bits` is set.
inline U8x64 add_where(U8x64 a, const uint8_t* bits, int8_t addend) {
  uint64_t mask;
  std::memcpy(&mask, bits, sizeof mask);
  return {_mm512_mask_add_epi8(a.v, mask, a.v, _mm512_set1_epi8(addend))};
}

// Bits 2k and 2k + 1 of each byte of `top`, moved to bits 4 and 5 of the codes below 16 in `a`.
template <int k>
U8x64 or_top_bits(U8x64 a, U8x64 top) {
  __m512i shifted = top.v;
  if constexpr (k < 2) shifted = _mm512_slli_epi16(shifted, 4 - 2 * k);
  if constexpr (k > 2) shifted = _mm512_srli_epi16(shifted, 2 * k - 4);
  return {_mm512_or_si512(a.v, _mm512_and_si512(shifted, _mm512_set1_epi8(0x30)))};
}

// 32 signed 16-bit values: two for each of 16 lanes.
struct I16x32 {
  __m512i v;
  static I16x32 load(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
  static I16x32 broadcast(int16_t x) { return {_mm512_set1_epi16(x)}; }
  void store(int16_t* p) const { _mm512_storeu_si512(p, v); }
};

inline I16x32 operator-(I16x32 a, I16x32 b) { return {_mm512_sub_epi16(a.v, b.v)}; }
// Bytes 0 and 2, and bytes 1 and 3, of each lane.
inline I16x32 even_bytes(U8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi16(255))}; }
inline I16x32 odd_bytes(U8x64 a) { return {_mm512_srli_epi16(a.v, 8)}; }

// Two signed 16-bit values, the same for every lane.
struct X2 {
  __m512i v;
  static X2 load(const int16_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return {_mm512_set1_epi32(word)};
  }
};

// acc + Σ over each lane's two products w·x, exact.
inline I32x16 dot(I32x16 acc, I16x32 w, X2 x) { return {_mm512_dpwssd_epi32(acc.v, w.v, x.v)}; }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache.
inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace tw::cpu::avx512
