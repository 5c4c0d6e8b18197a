// Activations to 16-bit codes, a scale for each block of 32 values of a row.
//
// scale = max|x| / 32512; code = round(x / scale), ties to even, in [-32512, 32512]; code = 256·high + low with both
// bytes signed. A block's result depends on its own 32 values only. Moves 4 B in, 2 B + 12/32 B out a value.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {
namespace {

constexpr float kLargestCode = 32512.0f;  // 127·256: the high byte stays within [-127, 127]

void quantize_block(const float* x, int8_t* planes, float* scale, int32_t* code_sums, float* sum_out) {
  const F32x16 x0 = F32x16::load(x);
  const F32x16 x1 = F32x16::load(x + 16);
  const float largest = max_lane(max(abs(x0), abs(x1)));
  const float inverse = largest > 0.0f ? kLargestCode / largest : 0.0f;
  *scale = largest / kLargestCode;
  const F32x16 factor = F32x16::broadcast(inverse);
  const I32x16 c0 = round_to_int(x0 * factor);
  const I32x16 c1 = round_to_int(x1 * factor);
  const I32x16 half = I32x16::broadcast(128);
  store_low_bytes(arithmetic_shift_right_8(c0 + half), planes);
  store_low_bytes(arithmetic_shift_right_8(c1 + half), planes + 16);
  store_low_bytes(c0, planes + 32);
  store_low_bytes(c1, planes + 48);
  code_sums[0] = sum(c0 + c1);
  code_sums[1] = sum(c0);
  *sum_out = *scale * static_cast<float>(code_sums[0]);
}

}  // namespace

void quantize_rows(const Activations& rows, int64_t begin, int64_t end) {
  const int64_t num_blocks = rows.num_blocks();
  for (int64_t index = begin * num_blocks; index < end * num_blocks; ++index) {
    quantize_block(rows.values + index * kBlock, rows.planes + index * 2 * kBlock, rows.scales + index,
                   rows.code_sums + 2 * index, rows.sums + index);
  }
}

}  // namespace tw::cpu::TW_ISA
