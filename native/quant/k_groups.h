// The 6-bit group scales and minimums that Q4_K and Q5_K share. Internal to native/quant.
#pragma once

#include <cstdint>

namespace tw::quant {

struct GroupScale {
  int scale;    // 0…63
  int minimum;  // 0…63
};

// Bytes 0…3 hold the scales of groups 0…3 in their low 6 bits, bytes 4…7 the minimums. Bytes 8…11 hold the low 4 bits
// of scale (low nibble) and minimum (high nibble) of groups 4…7, whose upper 2 bits fill the top of bytes 0…3 and 4…7.
inline GroupScale group_scale(const uint8_t* packed, int group) {
  if (group < 4) return {packed[group] & 63, packed[group + 4] & 63};
  const int low = packed[group + 4];
  return {(low & 15) | ((packed[group - 4] >> 6) << 4), (low >> 4) | ((packed[group] >> 6) << 4)};
}

}  // namespace tw::quant
