// simd.h's types in plain C++. Included by simd.h only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/half.h"

namespace tw::cpu::portable {

struct F32x16 {
  float v[16];
  static F32x16 zero() { return broadcast(0.0f); }
  static F32x16 broadcast(float x) {
    F32x16 r;
    for (float& lane : r.v) lane = x;
    return r;
  }
  static F32x16 load(const float* p) {
    F32x16 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static F32x16 load_f16(const uint16_t* p) {
    F32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f16_to_f32(p[i]);
    return r;
  }
  static F32x16 load_bf16(const uint16_t* p) {
    F32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = bf16_to_f32(p[i]);
    return r;
  }
  static F32x16 load_u8(const uint8_t* p) {
    F32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
  }
  static F32x16 load_i8(const uint8_t* p) {
    F32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(static_cast<int8_t>(p[i]));
    return r;
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(v[i]);
  }
};

template <class Op>
F32x16 lanes(F32x16 a, F32x16 b, Op op) {
  for (int i = 0; i < 16; ++i) a.v[i] = op(a.v[i], b.v[i]);
  return a;
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return lanes(a, b, [](float x, float y) { return x + y; });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return lanes(a, b, [](float x, float y) { return x - y; });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return lanes(a, b, [](float x, float y) { return x * y; });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return lanes(a, b, [](float x, float y) { return x / y; });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  for (int i = 0; i < 16; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline F32x16 max(F32x16 a, F32x16 b) {
  return lanes(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return lanes(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline F32x16 abs(F32x16 a) {
  for (float& lane : a.v) lane = std::fabs(lane);
  return a;
}

// Lanes 2i and 2i+1 exchanged.
inline F32x16 swap_pairs(F32x16 a) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i ^ 1];
  return r;
}

// Lanes [0, n) of `a`, `other` in the rest; n may be negative or beyond 16.
inline F32x16 first_lanes(F32x16 a, int n, float other) {
  for (int i = n < 0 ? 0 : n; i < 16; ++i) a.v[i] = other;
  return a;
}

// The sum of all lanes: lane i with i+8, then with i+4, i+2, i+1.
inline float sum(F32x16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  }
  return a.v[0];
}
inline float first_lane(F32x16 a) { return a.v[0]; }
inline float max_lane(F32x16 a) {
  float best = a.v[0];
  for (const float lane : a.v) best = lane > best ? lane : best;
  return best;
}

struct I32x16 {
  int32_t v[16];
  static I32x16 zero() { return broadcast(0); }
  static I32x16 broadcast(int32_t x) {
    I32x16 r;
    for (int32_t& lane : r.v) lane = x;
    return r;
  }
};

inline I32x16 operator+(I32x16 a, I32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline I32x16 operator-(I32x16 a, I32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline F32x16 to_float(I32x16 a) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
// To the nearest integer, ties to even.
inline I32x16 round_to_int(F32x16 a) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(std::lrint(a.v[i]));
  return r;
}
// a · 2^n, by adding to the exponent; the result must be a normal number.
inline F32x16 scale_by_power_of_two(F32x16 a, I32x16 n) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], sizeof bits);
    bits += static_cast<uint32_t>(n.v[i]) << 23;
    std::memcpy(&a.v[i], &bits, sizeof bits);
  }
  return a;
}

// About 1 / a for a normal a below 2^126: its exponent negated, and the bits below with it.
inline F32x16 guess_reciprocal(F32x16 a) {
  for (float& lane : a.v) {
    uint32_t bits;
    std::memcpy(&bits, &lane, sizeof bits);
    bits = 0x7EF311C7u - bits;
    std::memcpy(&lane, &bits, sizeof bits);
  }
  return a;
}

// 32 codes of 16 bits: `a` and then `b`, every four of them in the order 0, 2, 1, 3. sums = {Σa + Σb, Σa}.
inline void store_codes(I32x16 a, I32x16 b, int16_t* p, int32_t* sums) {
  constexpr int kOrder[4] = {0, 2, 1, 3};
  sums[0] = sums[1] = 0;
  for (int i = 0; i < 16; ++i) {
    const int from = i / 4 * 4 + kOrder[i % 4];
    p[i] = static_cast<int16_t>(a.v[from]);
    p[16 + i] = static_cast<int16_t>(b.v[from]);
    sums[0] += a.v[i] + b.v[i];
    sums[1] += a.v[i];
  }
}

// 64 unsigned bytes: four for each of 16 lanes.
struct U8x64 {
  uint8_t v[64];
  static U8x64 load(const uint8_t* p) {
    U8x64 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
};

inline U8x64 low_nibbles(U8x64 a) {
  for (uint8_t& byte : a.v) byte = byte & 15;
  return a;
}
inline U8x64 high_nibbles(U8x64 a) {
  for (uint8_t& byte : a.v) byte = static_cast<uint8_t>(byte >> 4);
  return a;
}
// Adds `addend` to byte i where bit i of the 64 bits at `bits` is set.
inline U8x64 add_where(U8x64 a, const uint8_t* bits, int8_t addend) {
  for (int i = 0; i < 64; ++i) {
    if ((bits[i / 8] >> (i % 8)) & 1) a.v[i] = static_cast<uint8_t>(a.v[i] + addend);
  }
  return a;
}

// Bits 2k and 2k + 1 of each byte of `top`, moved to bits 4 and 5 of the codes below 16 in `a`.
template <int k>
U8x64 or_top_bits(U8x64 a, U8x64 top) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] | ((top.v[i] >> (2 * k)) & 3) << 4);
  return a;
}

// 32 signed 16-bit values: two for each of 16 lanes.
struct I16x32 {
  int16_t v[32];
  static I16x32 load(const int16_t* p) {
    I16x32 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static I16x32 broadcast(int16_t x) {
    I16x32 r;
    for (int16_t& value : r.v) value = x;
    return r;
  }
  void store(int16_t* p) const { std::memcpy(p, v, sizeof v); }
};

inline I16x32 operator-(I16x32 a, I16x32 b) {
  for (int i = 0; i < 32; ++i) a.v[i] = static_cast<int16_t>(a.v[i] - b.v[i]);
  return a;
}
// Bytes 0 and 2, and bytes 1 and 3, of each lane.
inline I16x32 even_bytes(U8x64 a) {
  I16x32 r;
  for (int i = 0; i < 32; ++i) r.v[i] = a.v[2 * i];
  return r;
}
inline I16x32 odd_bytes(U8x64 a) {
  I16x32 r;
  for (int i = 0; i < 32; ++i) r.v[i] = a.v[2 * i + 1];
  return r;
}

// Two signed 16-bit values, the same for every lane.
struct X2 {
  int16_t v[2];
  static X2 load(const int16_t* p) { return {{p[0], p[1]}}; }
};

// acc + Σ over each lane's two products w·x, exact.
inline I32x16 dot(I32x16 acc, I16x32 w, X2 x) {
  for (int i = 0; i < 16; ++i) {
    acc.v[i] += int32_t{w.v[2 * i]} * int32_t{x.v[0]} + int32_t{w.v[2 * i + 1]} * int32_t{x.v[1]};
  }
  return acc;
}

inline void prefetch(const void*) {}
// Into the second-level cache.
inline void prefetch_l2(const void*) {}

}  // namespace tw::cpu::portable
