// What the two kernels for single rows of sequences share (attention_decode.cu): what a block works on, the scores and
// weights of a warp, and how results of several splits meet.
#pragma once

#include "cuda/attention.cuh"

namespace tw::cuda {

constexpr int kWarps = 4;  // of a split
constexpr int kSplitThreads = kWarps * 32;
constexpr int kWarpKeys = kSplitKeys / kWarps;

// What a block works on, and where its row stands.
struct DecodeBlock {
  int64_t index, row;  // of the launch, of the step
  int kv_head, first_head, num_heads;
  int position, num_keys, num_splits;
  const int32_t* table;
};
__device__ __forceinline__ DecodeBlock this_block(const AttentionTask& task) {
  DecodeBlock block;
  block.index = blockIdx.z;
  block.row =
      task.single_rows == nullptr ? task.first_row + block.index : task.single_rows[task.first_row + block.index];
  block.position = task.step.positions[block.row];
  block.table = task.step.tables + task.step.table_offsets[block.row];
  const HeadGroup heads = head_group(task.num_heads, task.num_kv_heads);
  const int group_size = task.num_heads / task.num_kv_heads;
  block.kv_head = static_cast<int>(blockIdx.x) / heads.tiles;
  block.first_head = block.kv_head * group_size + static_cast<int>(blockIdx.x) % heads.tiles * heads.per_tile;
  block.num_heads = min(heads.per_tile, (block.kv_head + 1) * group_size - block.first_head);
  block.num_keys = block.position + 1;
  block.num_splits = (block.num_keys + kSplitKeys - 1) / kSplitKeys;
  return block;
}

// Writes two results: of value `i` and the next, counted from the block's first head on.
__device__ __forceinline__ void store_pair(const AttentionTask& task, const DecodeBlock& block, int i, float x,
                                           float y) {
  // Unsigned: a few instructions less.
  const auto row = static_cast<uint32_t>(block.row);
  const auto column = static_cast<uint32_t>(block.first_head * task.head_dim + i);
  *reinterpret_cast<uint32_t*>(task.out + pair_offset(task.tiled_out, row, column, task.out_stride)) = pack_half2(x, y);
}

// A row that belongs to no sequence gets zeros.
template <int kDim>
__device__ __forceinline__ void store_zeros(const AttentionTask& task, const DecodeBlock& block) {
  for (int i = 2 * static_cast<int>(threadIdx.x); i < block.num_heads * kDim; i += 2 * static_cast<int>(blockDim.x)) {
    store_pair(task, block, i, 0, 0);
  }
}

// The scores of a warp's 32 keys; of a lane's two rows, the largest of keys that exist. `first_key` is the lane's
// first.
using Scores = float[kWarpKeys / 8][4];
__device__ __forceinline__ void largest_scores(float (&top)[2], const Scores& score, int first_key, int num_keys) {
  top[0] = top[1] = -FLT_MAX;
#pragma unroll
  for (int n = 0; n < kWarpKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (first_key + n * 8 + (e & 1) < num_keys) top[e / 2] = fmaxf(top[e / 2], score[n][e]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2));
  }
}

// Their weights; `to` is the lane's first.
__device__ __forceinline__ void store_weights(__half* to, const Scores& score, const float (&top)[2], int first_key,
                                              int num_keys) {
#pragma unroll
  for (int n = 0; n < kWarpKeys / 8; ++n) {
    float w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      w[e] = first_key + n * 8 + (e & 1) < num_keys ? exp2_of(__fsub_rn(score[n][e], top[e / 2])) : 0.0f;
    }
    *reinterpret_cast<uint32_t*>(to + n * 8) = pack_half2(w[0], w[1]);
    *reinterpret_cast<uint32_t*>(to + n * 8 + 8 * kWeightRow) = pack_half2(w[2], w[3]);
  }
}

// Where splits leave their results: [head_dim values, largest score, sum of weights] for each head.
template <int kDim>
struct Partials {
  float* base;
  int64_t head_stride, split_stride;
  bool local;  // in this block's shared memory
  __device__ __forceinline__ float* of(int head, int split) const {
    return base + head * head_stride + split * split_stride;
  }
};

// What another block may have written comes from L2.
__device__ __forceinline__ float2 load_result(const float* from, bool local) {
  const auto* pair = reinterpret_cast<const float2*>(from);
  return local ? *pair : __ldcg(pair);
}

// Joins the splits of the block's heads and writes them out.
template <int kDim>
__device__ __forceinline__ void join_splits(const AttentionTask& task, const DecodeBlock& block,
                                            const Partials<kDim>& partials) {
  const int num_threads = static_cast<int>(blockDim.x);
  for (int i = 2 * static_cast<int>(threadIdx.x); i < block.num_heads * kDim; i += 2 * num_threads) {
    const int d = i % kDim;
    float2 value{};
    float largest = 0, sum = 0;
#pragma unroll 4
    for (int s = 0; s < block.num_splits; ++s) {
      const float* split = partials.of(i / kDim, s);
      const float2 more = load_result(split + d, partials.local);
      const float2 stats = load_result(split + kDim, partials.local);
      if (s == 0) {
        value = more;
        largest = stats.x;
        sum = stats.y;
        continue;
      }
      const Joint joint = join(&largest, stats.x);
      sum = joined(joint, sum, stats.y);
      value = {joined(joint, value.x, more.x), joined(joint, value.y, more.y)};
    }
    store_pair(task, block, i, __fdiv_rn(value.x, sum), __fdiv_rn(value.y, sum));
  }
}

// The results of the block's heads in device memory.
template <int kDim>
__device__ __forceinline__ Partials<kDim> device_partials(const AttentionTask& task, const DecodeBlock& block) {
  return {task.partials + (block.index * task.num_heads + block.first_head) * task.max_splits * (kDim + 2),
          int64_t{task.max_splits} * (kDim + 2), kDim + 2, false};
}

// Whether the block is the last of `num_blocks` to have left its results there. All its threads call it.
__device__ __forceinline__ bool ends_last(const AttentionTask& task, const DecodeBlock& block, int num_blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* arrivals = task.arrivals + block.index * gridDim.x + blockIdx.x;
    last = atomicAdd(arrivals, 1) == num_blocks - 1;
    if (last) *arrivals = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace tw::cuda
