// The arithmetic of attention, one for prefill and decode, so that both give the same bits.
//
// A tile is 16 queries (rows of a step times heads that share keys) against one split: 128 keys, from a multiple of 128
// on. Scores: mma.m16n8k16 over the dimensions in order; queries are FP16 and carry 1 / √head_dim and log2(e). Weights:
// 2^(score - the split's largest), rounded to FP16; 0 for keys that a query does not see. Values and the weights' sum:
// mma.m16n8k16 over the split's keys in order, the sum as a column of ones beside the values. Splits are joined in
// order (join()). A query's result depends on no other query of its tile.
#pragma once

#include <cfloat>

#include "cuda/activations.h"
#include "cuda/launch.h"
#include "cuda/numerics.cuh"
#include "cuda/rope.cuh"

namespace tw::cuda {

constexpr int kTileQueries = 16;
constexpr int kKeySteps = kSplitKeys / 16;

// FP16 values between rows in shared memory: rows of 16-byte chunks whose number is odd meet no bank twice.
template <int kDim>
constexpr int kHeadRow = kDim + 8;
constexpr int kWeightRow = kSplitKeys + 8;

// The heads of one kv head that share a tile, and how many tiles that takes.
struct HeadGroup {
  int per_tile;
  int tiles;
};
__host__ __device__ inline HeadGroup head_group(int num_heads, int num_kv_heads) {
  const int size = num_heads / num_kv_heads;
  return {size < kTileQueries ? size : kTileQueries, (size + kTileQueries - 1) / kTileQueries};
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A fragment of A (16 rows) or of B given as rows of its columns; `rows` is the first row, FP16 values `stride` apart.
// Matrix m of the four begins at row 8 (m % 2) and value 8 (m / 2), or the other way round.
template <bool kRowsFirst>
__device__ __forceinline__ void load_fragment(uint32_t (&out)[4], const __half* rows, int stride, int lane) {
  const int matrix = lane >> 3;
  const int row = (kRowsFirst ? matrix & 1 : matrix >> 1) * 8 + (lane & 7);
  const int value = (kRowsFirst ? matrix >> 1 : matrix & 1) * 8;
  load_matrices(out, static_cast<uint32_t>(__cvta_generic_to_shared(rows + row * stride + value)));
}

// The same for B given as rows of its k: two columns of 8, transposed on the way.
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const __half* rows, int stride, int lane) {
  const int matrix = lane >> 3;
  const __half* from = rows + ((matrix & 1) * 8 + (lane & 7)) * stride + (matrix >> 1) * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

// Starts copying keys (offset 0) or values of tokens begin … begin + 127; those from `end` on are zeros.
template <int kDim, int kThreads>
__device__ __forceinline__ void stage_heads(__half* to, const AttentionTask& task, const int32_t* table, int kv_head,
                                            int64_t offset, int begin, int end, int thread) {
  constexpr int kChunks = kDim / 8;
  const __half* head = task.cache + head_offset(task, kv_head) + offset;
  if constexpr (kThreads % kChunks == 0) {
    // Each pass takes whole rows; a thread keeps its chunk.
    constexpr int kPassKeys = kThreads / kChunks;
    const int first = thread / kChunks;
    const int chunk = thread % kChunks * 8;
    const int32_t* blocks = table + begin / 16;
    __half* into = to + first * kHeadRow<kDim> + chunk;
#pragma unroll
    for (int pass = 0; pass < kSplitKeys / kPassKeys; ++pass) {
      const int block = kPassKeys % 16 == 0 ? pass * (kPassKeys / 16) + first / 16 : pass * kPassKeys / 16;
      const int place = kPassKeys % 16 == 0 ? first % 16 : pass * kPassKeys % 16 + first;
      const bool exists = begin + pass * kPassKeys + first < end;
      const __half* from = exists ? head + blocks[block] * task.block_stride + place * kDim + chunk : head;
      copy_async16(into + pass * kPassKeys * kHeadRow<kDim>, from, exists);
    }
  } else {
    for (int i = thread; i < kSplitKeys * kChunks; i += kThreads) {
      const int key = i / kChunks;
      const bool exists = begin + key < end;
      const int block = exists ? table[(begin + key) / 16] : 0;
      const __half* from = head + block * task.block_stride + (begin + key) % 16 * kDim + i % kChunks * 8;
      copy_async16(to + key * kHeadRow<kDim> + i % kChunks * 8, exists ? from : head, exists);
    }
  }
}

// Scores of 16 queries and 16 keys. The queries are fragments if those of a head fit into the registers, else rows.
template <int kDim, bool kInRegisters = kDim <= 64>
struct Queries {
  const __half* rows;
  uint32_t fragments[kInRegisters ? kDim / 16 : 1][4];

  __device__ __forceinline__ Queries(const __half* first_row, int lane) : rows(first_row) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int d = 0; d < kDim; d += 16) load_fragment<true>(fragments[d / 16], rows + d, kHeadRow<kDim>, lane);
    }
  }
  __device__ __forceinline__ void score(float (&low)[4], float (&high)[4], const __half* keys, int lane) const {
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t b[4];
      load_fragment<false>(b, keys + d, kHeadRow<kDim>, lane);
      if constexpr (kInRegisters) {
        mma(low, fragments[d / 16], b[0], b[1]);
        mma(high, fragments[d / 16], b[2], b[3]);
      } else {
        uint32_t a[4];
        load_fragment<true>(a, rows + d, kHeadRow<kDim>, lane);
        mma(low, a, b[0], b[1]);
        mma(high, a, b[2], b[3]);
      }
    }
  }
};

// Joins a later split (of these weights' sum, largest score and a value) to what came before.
struct Joint {
  float keep, add;
};
__device__ __forceinline__ Joint join(float* largest, float split_largest) {
  const float joined = fmaxf(*largest, split_largest);
  const Joint joint = {exp2_of(__fsub_rn(*largest, joined)), exp2_of(__fsub_rn(split_largest, joined))};
  *largest = joined;
  return joint;
}
__device__ __forceinline__ float joined(const Joint& joint, float before, float split) {
  return __fmaf_rn(split, joint.add, __fmul_rn(before, joint.keep));
}

constexpr uint32_t kOnes = 0x3c003c00u;

}  // namespace tw::cuda
