// Activations to 16-bit codes, a scale for each block of 32 values of a row.
//
// scale = max|x| / 32512; code = round(x · (32512 / max|x|)), ties to even. A block's result depends on its own 32
// values only. Moves 4 B in, 2 B + 16/32 B out a value.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {
namespace {

constexpr float kLargestCode = 32512.0f;
// Below this a block counts as zero: 32512 / kSmallest is still finite.
constexpr float kSmallest = 1e-30f;
float largest_of(const float* x) { return max_lane(max(abs(F32x16::load(x)), abs(F32x16::load(x + 16)))); }

void quantize_block(const float* x, float factor, int16_t* codes, int32_t* code_sums) {
  const F32x16 f = F32x16::broadcast(factor);
  store_codes(round_to_int(F32x16::load(x) * f), round_to_int(F32x16::load(x + 16) * f), codes, code_sums);
}

}  // namespace

// The blocks' factors are computed together, a lane each.
void quantize_blocks(const float* x, int64_t count, const Activations& out, int64_t first, int64_t step) {
  alignas(64) float largest[kBlocksTogether] = {};
  alignas(64) float factors[kBlocksTogether];
  alignas(64) float scales[kBlocksTogether];
  for (int64_t i = 0; i < count; ++i) largest[i] = largest_of(x + i * kBlock);
  const F32x16 tops = F32x16::load(largest);
  const F32x16 top_code = F32x16::broadcast(kLargestCode);
  (top_code / max(tops, F32x16::broadcast(kSmallest))).store(factors);
  (tops / top_code).store(scales);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = first + i * step;
    quantize_block(x + i * kBlock, factors[i], out.codes + index * kBlock, out.code_sums + 2 * index);
    out.scales[index] = scales[i];
    out.sums[index] = scales[i] * static_cast<float>(out.code_sums[2 * index]);
  }
}

void quantize_row(const float* x, const Activations& out, int64_t row) {
  const int64_t num_blocks = out.num_blocks();
  for (int64_t block = 0; block < num_blocks; block += kBlocksTogether) {
    const int64_t count = num_blocks - block < kBlocksTogether ? num_blocks - block : kBlocksTogether;
    quantize_blocks(x + block * kBlock, count, out, row * num_blocks + block, 1);
  }
}

void quantize_rows(const Activations& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) quantize_row(rows.values + row * rows.num_cols, rows, row);
}

}  // namespace tw::cpu::TW_ISA
