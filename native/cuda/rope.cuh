// Rotary position embedding (Su et al. 2021): the one rotation that every kernel uses, so all get the same bits.
#pragma once

#include "cuda/ops.h"

namespace tw::cuda {

// What value `d` of a rotated head is made of: two values of the head and, unless `angle` is -1 and the value stays as
// it is, the cosine and sine of that number of the head's position.
struct Rotation {
  int first, second, angle;
};
__device__ __forceinline__ Rotation rotation_of(const AttentionTask& task, int d) {
  if (d >= task.rope_dims) return {d, d, -1};
  const int half = task.rope_dims / 2;
  const int i = task.interleaved ? d / 2 : d % half;
  return {task.interleaved ? d & ~1 : i, task.interleaved ? d | 1 : i + half, i};
}
__device__ __forceinline__ float rotate(const Rotation& rotation, int d, float x, float y, float cos, float sin) {
  if (rotation.angle < 0) return x;
  return d == rotation.first ? __fmaf_rn(x, cos, -__fmul_rn(y, sin)) : __fmaf_rn(x, sin, __fmul_rn(y, cos));
}

// Value `d` of a rotated head. `cos` and `sin` are of the head's position.
__device__ __forceinline__ float rotated(const AttentionTask& task, const float* head, const float* cos,
                                         const float* sin, int d) {
  const Rotation rotation = rotation_of(task, d);
  if (rotation.angle < 0) return head[d];
  return rotate(rotation, d, head[rotation.first], head[rotation.second], cos[rotation.angle], sin[rotation.angle]);
}

// A rotated query as the tensor cores take it: FP16, with 1 / √head_dim and log2(e).
__device__ __forceinline__ __half scaled_query(float value, int dim) {
  const float scale = __fmul_rn(__frsqrt_rn(static_cast<float>(dim)), 1.44269504f);
  return __float2half_rn(fminf(fmaxf(__fmul_rn(value, scale), -65504.0f), 65504.0f));
}

// Keys of a kv head in a block; values follow at values_offset().
__device__ __forceinline__ int64_t head_offset(const AttentionTask& task, int kv_head) {
  return static_cast<int64_t>(kv_head) * 16 * task.head_dim;
}
__device__ __forceinline__ int64_t values_offset(const AttentionTask& task) {
  return static_cast<int64_t>(task.num_kv_heads) * 16 * task.head_dim;
}

// Writes the rotated key and the value of a row to the cache and, if not null, to `key_copy` and `value_copy`. All
// threads of the block take part.
__device__ __forceinline__ void append_row(const AttentionTask& task, int64_t row, int kv_head, int position,
                                           int thread, int num_threads, __half* key_copy = nullptr,
                                           __half* value_copy = nullptr) {
  const int half = task.rope_dims / 2;
  const float* key = task.qkv + row * task.qkv_stride + static_cast<int64_t>(task.num_heads + kv_head) * task.head_dim;
  const float* value = key + static_cast<int64_t>(task.num_kv_heads) * task.head_dim;
  const float* cos = task.rope_cos + static_cast<int64_t>(position) * half;
  const float* sin = task.rope_sin + static_cast<int64_t>(position) * half;
  const int block = task.step.tables[task.step.table_offsets[row] + position / 16];
  __half* keys = task.cache + block * task.block_stride + head_offset(task, kv_head) + position % 16 * task.head_dim;
  for (int d = thread; d < task.head_dim; d += num_threads) {
    const __half key_value = __float2half_rn(rotated(task, key, cos, sin, d));
    const __half value_value = __float2half_rn(value[d]);
    keys[d] = key_value;
    keys[values_offset(task) + d] = value_value;
    if (key_copy != nullptr) {
      key_copy[d] = key_value;
      value_copy[d] = value_value;
    }
  }
}

}  // namespace tw::cuda
