// What the block formats share. Internal to native/quant.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/half.h"

namespace tw::quant {

// Block `index` of a row. Copied, since the data of a file may lie at any address.
template <class Block>
Block load_block(const void* src, int64_t index) {
  Block block;
  std::memcpy(&block, static_cast<const char*>(src) + static_cast<size_t>(index) * sizeof block, sizeof block);
  return block;
}

inline bool is_finite_f16(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

// Whether the F16 scales that the members name are finite in every block.
template <class Block, class... Member>
bool scales_finite(const void* data, int64_t num_blocks, Member... scale) {
  for (int64_t i = 0; i < num_blocks; ++i) {
    const Block block = load_block<Block>(data, i);
    if (!(is_finite_f16(block.*scale) && ...)) return false;
  }
  return true;
}

inline int low_nibble(uint8_t byte) { return byte & 15; }
inline int high_nibble(uint8_t byte) { return byte >> 4; }
inline int bit_at(uint32_t word, int position) { return static_cast<int>((word >> position) & 1u); }

}  // namespace tw::quant
