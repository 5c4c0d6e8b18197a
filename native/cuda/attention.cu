// Paged attention over FP16 keys and values, one row at a time, so prefill and decode give the same bits.
//
// A block of 128 threads owns a row, up to 4 query heads of one kv head (8 for many rows), and one split of 128 keys.
// Scores: Σ q·k in order of the dimensions (fma). Weights: e^(score - the split's maximum); their sum runs over lanes
// in a tree, then over the warps in order. Values: each thread sums 8 dimensions over its keys in order, the threads'
// sums are added in order. Splits are combined in order by the block that ends last. Reads 4 · head_dim bytes a key, kv
// head and row.
#include <cfloat>

#include "cuda/launch.h"
#include "cuda/rope.cuh"

namespace tw::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kManyRows = 128;

__device__ __forceinline__ void to_floats(const uint4& packed, float (&out)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    out[2 * i] = two.x;
    out[2 * i + 1] = two.y;
  }
}

template <int kDim, int kHeads>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ AttentionTask task) {
  constexpr int kChunks = kDim / 8;
  constexpr int kKeyGroups = kThreads / kChunks;
  constexpr int kSumThreads = kKeyGroups * kChunks;  // fewer than kThreads if 128 is no multiple of kChunks
  constexpr int kEarlyValues = kSplitKeys / kKeyGroups < 8 ? kSplitKeys / kKeyGroups : 8;
  __shared__ __align__(16) float queries[kHeads][kDim];
  __shared__ float weights[kHeads][kSplitKeys];
  __shared__ float warp_values[kHeads][4];
  __shared__ __align__(16) float sums[kKeyGroups][kHeads][kDim];
  __shared__ bool last;
  release_successor();
  await_predecessor();

  const int thread = static_cast<int>(threadIdx.x);
  const int group_size = task.num_heads / task.num_kv_heads;
  const int groups = (group_size + kHeads - 1) / kHeads;
  const int kv_head = static_cast<int>(blockIdx.x) / groups;
  const int first_head = kv_head * group_size + static_cast<int>(blockIdx.x) % groups * kHeads;
  const int num_heads = min(kHeads, (kv_head + 1) * group_size - first_head);
  const int64_t row = blockIdx.z;
  const int split = static_cast<int>(blockIdx.y);
  const int position = task.step.positions[row];
  __half* out = task.out + row * task.out_stride + static_cast<int64_t>(first_head) * kDim;
  if (position < 0) {
    if (split == 0) {
      for (int i = thread; i < num_heads * kDim; i += kThreads) out[i] = __float2half_rn(0.0f);
    }
    return;
  }
  const int num_keys = position + 1;
  const int begin = split * kSplitKeys;
  if (begin >= num_keys) return;
  const int count = min(kSplitKeys, num_keys - begin);
  const int num_splits = (num_keys + kSplitKeys - 1) / kSplitKeys;
  const int32_t* table = task.step.tables + task.step.table_offsets[row];

  const int64_t rope_row = static_cast<int64_t>(position) * (task.rope_dims / 2);
  const float query_scale = __frsqrt_rn(static_cast<float>(kDim));
  for (int i = thread; i < kHeads * kDim; i += kThreads) {
    const int h = i / kDim;
    float value = 0;
    if (h < num_heads) {
      const float* head = task.qkv + row * task.qkv_stride + static_cast<int64_t>(first_head + h) * kDim;
      value = rotated(task, head, task.rope_cos + rope_row, task.rope_sin + rope_row, i % kDim);
    }
    queries[h][i % kDim] = __fmul_rn(value, query_scale);
  }
  if (task.append && split == num_splits - 1) append_row(task, row, kv_head, position, thread, kThreads);
  __syncthreads();

  float score[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) score[h] = -FLT_MAX;
  const auto keys_of = [&](int key) {
    return task.cache + table[key / 16] * task.block_stride + head_offset(task, kv_head) + key % 16 * kDim;
  };
  // The first values of this thread are on their way while scores are computed.
  const int chunk = thread % kChunks;
  const int key_group = thread / kChunks;
  const auto value_of = [&](int key) {
    return reinterpret_cast<const uint4*>(keys_of(begin + key) + values_offset(task))[chunk];
  };
  uint4 early[kEarlyValues];
#pragma unroll
  for (int n = 0; n < kEarlyValues; ++n) {
    const int key = key_group + n * kKeyGroups;
    if (thread < kSumThreads && key < count) early[n] = value_of(key);
  }
  if (thread < count) {
    const auto* key = reinterpret_cast<const uint4*>(keys_of(begin + thread));
#pragma unroll
    for (int h = 0; h < kHeads; ++h) score[h] = 0;
#pragma unroll 4
    for (int c = 0; c < kChunks; ++c) {
      float k[8];
      to_floats(key[c], k);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const auto* q = reinterpret_cast<const float4*>(&queries[h][c * 8]);
        const float4 q0 = q[0];
        const float4 q1 = q[1];
        score[h] = __fmaf_rn(q0.x, k[0], score[h]);
        score[h] = __fmaf_rn(q0.y, k[1], score[h]);
        score[h] = __fmaf_rn(q0.z, k[2], score[h]);
        score[h] = __fmaf_rn(q0.w, k[3], score[h]);
        score[h] = __fmaf_rn(q1.x, k[4], score[h]);
        score[h] = __fmaf_rn(q1.y, k[5], score[h]);
        score[h] = __fmaf_rn(q1.z, k[6], score[h]);
        score[h] = __fmaf_rn(q1.w, k[7], score[h]);
      }
    }
  }
  float maximum[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    maximum[h] = score[h];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      maximum[h] = fmaxf(maximum[h], __shfl_xor_sync(~0u, maximum[h], offset));
    }
    if ((thread & 31) == 0) warp_values[h][thread >> 5] = maximum[h];
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    maximum[h] = fmaxf(fmaxf(warp_values[h][0], warp_values[h][1]), fmaxf(warp_values[h][2], warp_values[h][3]));
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float weight = thread < count ? expf(__fsub_rn(score[h], maximum[h])) : 0.0f;
    weights[h][thread] = weight;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) weight = __fadd_rn(weight, __shfl_xor_sync(~0u, weight, offset));
    if ((thread & 31) == 0) warp_values[h][thread >> 5] = weight;
  }
  __syncthreads();

  if (thread < kSumThreads) {
    float acc[kHeads][8] = {};
    const auto add = [&](const uint4& packed, int key) {
      float v[8];
      to_floats(packed, v);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float weight = weights[h][key];
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[h][e] = __fmaf_rn(weight, v[e], acc[h][e]);
      }
    };
#pragma unroll
    for (int n = 0; n < kEarlyValues; ++n) {
      const int key = key_group + n * kKeyGroups;
      if (key < count) add(early[n], key);
    }
    for (int key = key_group + kEarlyValues * kKeyGroups; key < count; key += kKeyGroups) add(value_of(key), key);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      auto* to = reinterpret_cast<float4*>(&sums[key_group][h][chunk * 8]);
      to[0] = {acc[h][0], acc[h][1], acc[h][2], acc[h][3]};
      to[1] = {acc[h][4], acc[h][5], acc[h][6], acc[h][7]};
    }
  }
  __syncthreads();

  const auto weight_sum = [&](int h) {
    return __fadd_rn(__fadd_rn(__fadd_rn(warp_values[h][0], warp_values[h][1]), warp_values[h][2]), warp_values[h][3]);
  };
  constexpr int kPartial = kDim + 2;
  const auto partial = [&](int h, int s) {
    return task.partials + ((row * task.num_heads + first_head + h) * task.max_splits + s) * kPartial;
  };
  for (int i = thread; i < num_heads * kDim; i += kThreads) {
    const int h = i / kDim;
    const int d = i % kDim;
    float value = sums[0][h][d];
    for (int g = 1; g < kKeyGroups; ++g) value = __fadd_rn(value, sums[g][h][d]);
    if (num_splits == 1) {
      out[i] = __float2half_rn(__fdiv_rn(value, weight_sum(h)));
    } else {
      partial(h, split)[d] = value;
    }
  }
  if (num_splits == 1) return;
  // The maximum is the same in all threads, but its index must be known at compile time.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (thread == 0 && h < num_heads) {
      partial(h, split)[kDim] = maximum[h];
      partial(h, split)[kDim + 1] = weight_sum(h);
    }
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    int32_t* arrivals = task.arrivals + row * gridDim.x + blockIdx.x;
    last = atomicAdd(arrivals, 1) == num_splits - 1;
    if (last) *arrivals = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = thread; i < num_heads * kDim; i += kThreads) {
    const int h = i / kDim;
    const int d = i % kDim;
    float top = -FLT_MAX;
    for (int s = 0; s < num_splits; ++s) top = fmaxf(top, __ldcg(partial(h, s) + kDim));
    float value = 0;
    float sum = 0;
    for (int s = 0; s < num_splits; ++s) {
      const float* part = partial(h, s);
      const float factor = expf(__fsub_rn(__ldcg(part + kDim), top));
      value = __fmaf_rn(__ldcg(part + d), factor, value);
      sum = __fmaf_rn(__ldcg(part + kDim + 1), factor, sum);
    }
    out[i] = __float2half_rn(__fdiv_rn(value, sum));
  }
}

template <int kDim, int kHeads>
void launch_attention(const AttentionTask& task) {
  const int group_size = task.num_heads / task.num_kv_heads;
  const int blocks = task.num_kv_heads * ((group_size + kHeads - 1) / kHeads);
  launch(
      attention_kernel<kDim, kHeads>,
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(task.max_splits), static_cast<unsigned>(task.num_rows)),
      dim3(kThreads), 0, task.stream, task);
}

template <int kDim>
void launch_attention(const AttentionTask& task) {
  const int group_size = task.num_heads / task.num_kv_heads;
  if (group_size == 1) return launch_attention<kDim, 1>(task);
  // Few rows need many blocks, many rows few reads of the keys. A head's arithmetic is the same either way.
  if (group_size <= 4 || task.num_rows <= kManyRows) return launch_attention<kDim, 4>(task);
  return launch_attention<kDim, 8>(task);
}

}  // namespace

bool supports_head_dim(int32_t head_dim) {
  return head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128;
}

void attention(const AttentionTask& task) {
  switch (task.head_dim) {
    case 16: return launch_attention<16>(task);
    case 32: return launch_attention<32>(task);
    case 64: return launch_attention<64>(task);
    case 96: return launch_attention<96>(task);
    case 128: return launch_attention<128>(task);
    default: throw Error(ErrorCode::kInternal, "no attention kernel for this head size");
  }
}

}  // namespace tw::cuda
