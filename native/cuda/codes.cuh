// Codes of 4, 5 and 6 bits: how a lane's lie in its words, and how they become values.
//
// A code becomes a value by one instruction: as a half, its bits are the subnormal number code · 2^-24, and scale ·
// 2^24 times it plus the minimum is rounded once.
#pragma once

#include <cstdint>

#include "cuda/numerics.cuh"

namespace tw::cuda {

constexpr int kLaneInputs = 16;

__device__ __forceinline__ uint32_t broadcast_low(uint32_t pair) { return as_u32(__low2half2(as_half2(pair))); }
__device__ __forceinline__ uint32_t broadcast_high(uint32_t pair) { return as_u32(__high2half2(as_half2(pair))); }

constexpr float kOneOverCodeUnit = 16777216.0f;  // 2^24

// code · scale + minimum, in both halves, rounded once.
__device__ __forceinline__ uint32_t scaled(uint32_t code, uint32_t scale, uint32_t minimum) {
  return as_u32(__hfma2(as_half2(code), as_half2(scale), as_half2(minimum)));
}
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  return as_u32(__hmul2_rn(as_half2(a), as_half2(b)));
}
// What makes `middle` the code of 0: -middle · scale.
__device__ __forceinline__ uint32_t centering(uint32_t scale, uint32_t middle) {
  return times(scale, 0x80008000u | middle | middle << 16);
}

// The two lower bytes of `bytes` as FP16 values, exactly, less what `bias` has beyond 0x6400, the bits of 1024.
// Conversion instructions are slow.
__device__ __forceinline__ uint32_t byte_pair(uint32_t bytes, uint32_t bias = 0x64006400u) {
  const uint32_t value = __byte_perm(bytes, 0x64646464u, 0x4140);  // 1024 + byte
  return as_u32(__hsub2_rn(as_half2(value), as_half2(bias)));
}

// The two upper bytes of `bytes` times 2^-9, exactly.
__device__ __forceinline__ uint32_t small_byte_pair(uint32_t bytes) {
  const uint32_t value = __byte_perm(bytes, 0x64646464u, 0x4342);
  return as_u32(__hfma2(as_half2(value), as_half2(0x18001800u), as_half2(0xc000c000u)));  // · 2^-9 - 2
}

// A lane's 16 codes of a row: how pair P lies in its words, both inputs alike, one in each half of a word. A pair lies
// low, where its bits are a number's last ones, or kRise bits higher, where they are the last that a subnormal number
// has: its scale is less by as much then, which saves a shift.
struct CodeWords {
  uint32_t a, b, c;
};
__host__ __device__ __forceinline__ constexpr uint32_t in_both_halves(uint32_t bits) { return bits | bits << 16; }

template <int kBits>
struct Codes;

// Four in each half of two words.
template <>
struct Codes<4> {
  static constexpr int kRise = 4;
  static constexpr uint32_t kLow = in_both_halves(0x000f), kHigh = in_both_halves(0x00f0);
  __device__ __forceinline__ static constexpr bool lies_high(int pair) { return pair % 2 != 0; }
  __device__ static void put(CodeWords* row, int pair, uint32_t codes) {
    (pair < 4 ? row->a : row->b) |= codes << (4 * (pair % 4));
  }
  __device__ __forceinline__ static uint32_t get(const CodeWords& row, int pair) {
    const uint32_t word = pair < 4 ? row.a : row.b;
    return (pair % 4 < 2 ? word : word >> 8) & (lies_high(pair) ? kHigh : kLow);
  }
};

// Three in each half of two words, two in the low byte of the third's and the last bits of these.
template <>
struct Codes<5> {
  static constexpr int kRise = 5;
  static constexpr uint32_t kLow = in_both_halves(0x001f), kHigh = in_both_halves(0x03e0);
  __device__ __forceinline__ static constexpr bool lies_high(int pair) { return pair == 1 || pair == 3 || pair == 5; }
  __device__ static void put(CodeWords* row, int pair, uint32_t codes) {
    if (pair == 7) {
      row->c |= codes;
    } else if (pair == 3) {
      row->c |= (codes & in_both_halves(7)) << 5;
      row->a |= (codes & in_both_halves(8)) << 12;
      row->b |= (codes & in_both_halves(16)) << 11;
    } else {
      (pair < 4 ? row->a : row->b) |= codes << (5 * (pair % 4));
    }
  }
  __device__ __forceinline__ static uint32_t get(const CodeWords& row, int pair) {
    const uint32_t word = pair < 4 ? row.a : row.b;
    switch (pair) {
      case 7: return row.c & kLow;
      case 3:
        return (row.c & in_both_halves(0x00e0)) | (row.a >> 7 & in_both_halves(0x0100)) |
               (row.b >> 6 & in_both_halves(0x0200));
      default: return (pair % 4 < 2 ? word : word >> 10) & (lies_high(pair) ? kHigh : kLow);
    }
  }
};

// Two in each half of three words; of the last two, four bits each in the first two words and two in the third.
template <>
struct Codes<6> {
  static constexpr int kRise = 4;
  static constexpr uint32_t kLow = in_both_halves(0x003f);
  __device__ __forceinline__ static constexpr bool lies_high(int pair) { return pair >= 6; }
  __device__ static void put(CodeWords* row, int pair, uint32_t codes) {
    uint32_t& word = pair < 2 || pair == 6 ? row->a : pair < 4 || pair == 7 ? row->b : row->c;
    if (pair < 6) {
      word |= codes << (6 * (pair % 2));
    } else {
      word |= (codes & in_both_halves(0x3c)) << 10;
      row->c |= (codes & in_both_halves(0x03)) << (pair == 6 ? 12 : 14);
    }
  }
  __device__ __forceinline__ static uint32_t get(const CodeWords& row, int pair) {
    const uint32_t word = pair < 2 || pair == 6 ? row.a : pair < 4 || pair == 7 ? row.b : row.c;
    if (pair < 6) return (pair % 2 == 0 ? word : word >> 6) & kLow;
    return (word >> 6 & in_both_halves(0x03c0)) | (row.c >> (pair == 6 ? 8 : 10) & in_both_halves(0x0030));
  }
};

// What the values of a lane's rows r and r + 8, 32 or 16 inputs of each, are made of: pairs of both rows' numbers.
struct Scaling {
  uint32_t scales;    // times 2^24
  uint32_t minimums;  // of a code of 0
};

// The A fragments of instruction j of a step's four.
template <int kBits>
__device__ __forceinline__ void unpack_codes(const CodeWords (&rows)[2], const Scaling& scaling, int j,
                                             uint32_t (&a)[4]) {
  using Layout = Codes<kBits>;
  constexpr uint32_t kOneOverRise = in_both_halves((15 - Layout::kRise) << 10);  // 2^-kRise
  const uint32_t high_scales = times(scaling.scales, kOneOverRise);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto of_row = [&](uint32_t pair) { return half == 0 ? broadcast_low(pair) : broadcast_high(pair); };
#pragma unroll
    for (int pair = 2 * j; pair < 2 * j + 2; ++pair) {
      const uint32_t scale = of_row(Layout::lies_high(pair) ? high_scales : scaling.scales);
      a[pair % 2 * 2 + half] = scaled(Layout::get(rows[half], pair), scale, of_row(scaling.minimums));
    }
  }
}

// --- When packing. ---

struct LaneCodes {
  uint8_t code[kLaneInputs];
};

template <int kBits>
__device__ inline CodeWords pack_codes(const LaneCodes& codes) {
  CodeWords row{};
  for (int pair = 0; pair < 8; ++pair) {
    Codes<kBits>::put(&row, pair, codes.code[2 * pair] | static_cast<uint32_t>(codes.code[2 * pair + 1]) << 16);
  }
  return row;
}

}  // namespace tw::cuda
