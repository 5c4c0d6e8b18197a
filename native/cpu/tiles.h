// The quantised tile formats of packed_matrix.h: how a block of 32 inputs gives codes, scales and minimums.
//
// A format says where block `b` of a tile lies and how its bytes unpack; the loops in matmul.cpp are the same for all.
//   kZero         the code that stands for 0
//   kHasMin       whether a value is scale · code + min, rather than scale · (code − kZero)
//   kHalves       1, or 2 if inputs 0…15 and 16…31 of a block have each a scale
// This header may only be included by kernel sources.
#pragma once

#include "cpu/packed_matrix.h"
#include "cpu/simd.h"

namespace tw::cpu::TW_ISA {

// Codes of inputs 4c … 4c+3 and of 16+4c … 16+4c+3 (c = chunk), each for 16 rows.
struct CodePair {
  U8x64 first;
  U8x64 second;
};

// Blocks of kBytes one after another, each with its own F16 scale.
template <int64_t kBlockBytes>
struct TileOfBlocks {
  static constexpr int64_t kBytes = kBlockBytes;
  static constexpr int kHalves = 1;
  static const uint8_t* block(const uint8_t* tile, int64_t b) { return tile + b * kBytes; }
  static F32x16 f16_at(const uint8_t* p) { return F32x16::load_f16(reinterpret_cast<const uint16_t*>(p)); }
};

inline CodePair nibble_codes(const uint8_t* codes, int chunk) {
  const U8x64 raw = U8x64::load(codes + 64 * chunk);
  return {low_nibbles(raw), high_nibbles(raw)};
}

inline CodePair five_bit_codes(const uint8_t* codes, const uint8_t* fifth_bits, int chunk) {
  const CodePair low = nibble_codes(codes, chunk);
  return {add_where(low.first, fifth_bits + 8 * chunk, 16), add_where(low.second, fifth_bits + 32 + 8 * chunk, 16)};
}

struct TileQ4_0 : TileOfBlocks<288> {
  static constexpr int32_t kZero = 8;
  static constexpr bool kHasMin = false;
  static CodePair codes(const uint8_t* block, int chunk) { return nibble_codes(block, chunk); }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) { return f16_at(block(tile, b) + 256); }
};

struct TileQ4_1 : TileOfBlocks<320> {
  static constexpr int32_t kZero = 0;
  static constexpr bool kHasMin = true;
  static CodePair codes(const uint8_t* block, int chunk) { return nibble_codes(block, chunk); }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) { return f16_at(block(tile, b) + 256); }
  static F32x16 min(const uint8_t* tile, int64_t b) { return f16_at(block(tile, b) + 288); }
};

struct TileQ5_0 : TileOfBlocks<352> {
  static constexpr int32_t kZero = 16;
  static constexpr bool kHasMin = false;
  static CodePair codes(const uint8_t* block, int chunk) { return five_bit_codes(block, block + 256, chunk); }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) { return f16_at(block(tile, b) + 320); }
};

struct TileQ5_1 : TileOfBlocks<384> {
  static constexpr int32_t kZero = 0;
  static constexpr bool kHasMin = true;
  static CodePair codes(const uint8_t* block, int chunk) { return five_bit_codes(block, block + 256, chunk); }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) { return f16_at(block(tile, b) + 320); }
  static F32x16 min(const uint8_t* tile, int64_t b) { return f16_at(block(tile, b) + 352); }
};

struct TileQ8_0 : TileOfBlocks<544> {
  static constexpr int32_t kZero = 128;
  static constexpr bool kHasMin = false;
  static CodePair codes(const uint8_t* block, int chunk) {
    return {U8x64::load(block + 64 * chunk), U8x64::load(block + 256 + 64 * chunk)};
  }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) { return f16_at(block(tile, b) + 512); }
};

// Super-blocks of 256 inputs: kHead bytes with the F16 factors that the scales of its 8 blocks share, then the blocks.
// A factor times an integer of at most 8 bits is exact in a float, so no order of these products can change a bit.
template <int64_t kHead, int64_t kBlockBytes>
struct TileOfSuperBlocks {
  static constexpr int64_t kSuperBytes = kHead + kBlocksPerSuper * kBlockBytes;
  static const uint8_t* head(const uint8_t* tile, int64_t b) { return tile + b / kBlocksPerSuper * kSuperBytes; }
  static const uint8_t* block(const uint8_t* tile, int64_t b) {
    return head(tile, b) + kHead + b % kBlocksPerSuper * kBlockBytes;
  }
  // F16 factor number `i` of the super-block.
  static F32x16 factor(const uint8_t* tile, int64_t b, int i) {
    return F32x16::load_f16(reinterpret_cast<const uint16_t*>(head(tile, b) + 32 * i));
  }
};

struct TileQ4_K : TileOfSuperBlocks<64, 288> {
  static constexpr int kHalves = 1;
  static constexpr int32_t kZero = 0;
  static constexpr bool kHasMin = true;
  static CodePair codes(const uint8_t* block, int chunk) { return nibble_codes(block, chunk); }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) {
    return factor(tile, b, 0) * F32x16::load_u8(block(tile, b) + 256);
  }
  static F32x16 min(const uint8_t* tile, int64_t b) {
    return factor(tile, b, 1) * F32x16::load_u8(block(tile, b) + 272);
  }
};

struct TileQ5_K : TileOfSuperBlocks<64, 352> {
  static constexpr int kHalves = 1;
  static constexpr int32_t kZero = 0;
  static constexpr bool kHasMin = true;
  static CodePair codes(const uint8_t* block, int chunk) { return five_bit_codes(block, block + 256, chunk); }
  static F32x16 scale(const uint8_t* tile, int64_t b, int) {
    return factor(tile, b, 0) * F32x16::load_u8(block(tile, b) + 320);
  }
  static F32x16 min(const uint8_t* tile, int64_t b) {
    return factor(tile, b, 1) * F32x16::load_u8(block(tile, b) + 336);
  }
};

struct TileQ6_K : TileOfSuperBlocks<32, 416> {
  static constexpr int kHalves = 2;
  static constexpr int32_t kZero = 32;
  static constexpr bool kHasMin = false;
  static CodePair codes(const uint8_t* block, int chunk) {
    const CodePair low = nibble_codes(block, chunk);
    const U8x64 high = U8x64::load(block + 256 + 64 * (chunk / 2));
    return chunk % 2 == 0 ? CodePair{or_top_bits<0>(low.first, high), or_top_bits<1>(low.second, high)}
                          : CodePair{or_top_bits<2>(low.first, high), or_top_bits<3>(low.second, high)};
  }
  static F32x16 scale(const uint8_t* tile, int64_t b, int half) {
    return factor(tile, b, 0) * F32x16::load_i8(block(tile, b) + 384 + 16 * half);
  }
};

}  // namespace tw::cpu::TW_ISA
