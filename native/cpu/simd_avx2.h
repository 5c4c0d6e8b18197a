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
inline float first_lane(F32x16 a) { return _mm256_cvtss_f32(a.lo); }
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
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// To the nearest integer, ties to even.
inline I32x16 round_to_int(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
// a · 2^n, by adding to the exponent; the result must be a normal number.
inline F32x16 scale_by_power_of_two(F32x16 a, I32x16 n) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.lo), _mm256_slli_epi32(n.lo, 23))),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.hi), _mm256_slli_epi32(n.hi, 23)))};
}

// About 1 / a for a normal a below 2^126: its exponent negated, and the bits below with it.
inline F32x16 guess_reciprocal(F32x16 a) {
  const __m256i magic = _mm256_set1_epi32(0x7EF311C7);
  return {_mm256_castsi256_ps(_mm256_sub_epi32(magic, _mm256_castps_si256(a.lo))),
          _mm256_castsi256_ps(_mm256_sub_epi32(magic, _mm256_castps_si256(a.hi)))};
}

// 32 codes of 16 bits: `a` and then `b`, every four of them in the order 0, 2, 1, 3. sums = {Σa + Σb, Σa}.
inline void store_codes(I32x16 a, I32x16 b, int16_t* p, int32_t* sums) {
  const auto store = [](I32x16 codes, int16_t* to) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes.lo, codes.hi), 0xD8);
    words = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  };
  store(a, p);
  store(b, p + 16);
  const __m256i first = _mm256_add_epi32(a.lo, a.hi);
  const __m256i all = _mm256_add_epi32(first, _mm256_add_epi32(b.lo, b.hi));
  const __m256i fours = _mm256_hadd_epi32(all, first);
  const __m128i eights = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums), _mm_hadd_epi32(eights, eights));
}

// 64 unsigned bytes: four for each of 16 lanes.
struct U8x64 {
  __m256i lo, hi;
  static U8x64 load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
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

// 32 signed 16-bit values: two for each of 16 lanes.
struct I16x32 {
  __m256i lo, hi;
  static I16x32 load(const int16_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))};
  }
  static I16x32 broadcast(int16_t x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
  void store(int16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), hi);
  }
};

inline I16x32 operator-(I16x32 a, I16x32 b) { return {_mm256_sub_epi16(a.lo, b.lo), _mm256_sub_epi16(a.hi, b.hi)}; }
// Bytes 0 and 2, and bytes 1 and 3, of each lane.
inline I16x32 even_bytes(U8x64 a) {
  const __m256i mask = _mm256_set1_epi16(255);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline I16x32 odd_bytes(U8x64 a) { return {_mm256_srli_epi16(a.lo, 8), _mm256_srli_epi16(a.hi, 8)}; }

// Two signed 16-bit values, the same for every lane.
struct X2 {
  __m256i v;
  static X2 load(const int16_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return {_mm256_set1_epi32(word)};
  }
};

// acc + Σ over each lane's two products w·x, exact.
inline I32x16 dot(I32x16 acc, I16x32 w, X2 x) {
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.lo, x.v)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.hi, x.v))};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache.
inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace tw::cpu::avx2
