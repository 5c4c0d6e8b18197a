// How the FP16 inputs of matrix products lie in device memory.
//
// For few tokens: row after row. For many, in blocks of 64 tokens by 64 inputs, 8 KiB each, the blocks of 64 tokens one
// after another: [tokens / 64][stride / 64][64 tokens][8 chunks of 16 bytes], chunk c of a token at place c ^ (token &
// 7). That is what the tensor cores read from shared memory without meeting a bank twice, so a block is copied as it
// is. Chunk c holds the pairs c, 8 + c, 16 + c and 24 + c of the token's 32 pairs of inputs: the order in which the
// lanes of a fragment hold the weights (formats.cuh), so instruction j of a step reads chunks 2j and 2j + 1.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace tw::cuda {

constexpr int kTokenBlock = 64;
// Buffers in the layout for many tokens hold a multiple of this many rows.
constexpr int kTokenPadding = 128;

// Of the pair that begins at the even `column`, in FP16 values.
__host__ __device__ inline int64_t tiled_offset(int64_t row, int64_t column, int64_t stride) {
  const int64_t pair = column % 64 / 2;
  const int64_t chunk = (pair & 7) ^ (row & 7);
  return (row / kTokenBlock * (stride / 64) + column / 64) * (kTokenBlock * 64) + row % kTokenBlock * 64 + chunk * 8 +
         (pair >> 3) * 2;
}

__host__ __device__ inline int64_t pair_offset(bool tiled, int64_t row, int64_t column, int64_t stride) {
  return tiled ? tiled_offset(row, column, stride) : row * stride + column;
}

}  // namespace tw::cuda
