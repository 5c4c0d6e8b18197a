// Prepares attention for many rows: rotated keys and values go to the cache, rotated and scaled queries to a buffer.
// One block of 128 threads a row; reads 4 and writes 2 bytes a value.
#include "cuda/launch.h"
#include "cuda/rope.cuh"

namespace tw::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) rope_append_kernel(const __grid_constant__ AttentionTask task) {
  release_successor();
  await_predecessor();
  const int64_t row = blockIdx.x;
  const int position = task.step.positions[row];
  if (position < 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (int kv_head = 0; kv_head < task.num_kv_heads; ++kv_head) {
    append_row(task, row, kv_head, position, thread, kThreads);
  }
  const int64_t rope = static_cast<int64_t>(position) * (task.rope_dims / 2);
  const float* queries = task.qkv + row * task.qkv_stride;
  for (int i = thread; i < task.num_heads * task.head_dim; i += kThreads) {
    const int d = i % task.head_dim;
    const float value = rotated(task, queries + i - d, task.rope_cos + rope, task.rope_sin + rope, d);
    task.queries[row * task.query_stride + i] = scaled_query(value, task.head_dim);
  }
}

}  // namespace

void rope_append(const AttentionTask& task) {
  launch(rope_append_kernel, dim3(static_cast<unsigned>(task.num_rows)), dim3(kThreads), 0, task.stream, task);
}

}  // namespace tw::cuda
