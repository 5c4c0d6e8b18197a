// Writes the rotated keys and the values of many rows to the cache: one block of 64 threads a row and kv head.
#include "cuda/launch.h"
#include "cuda/rope.cuh"

namespace tw::cuda {
namespace {

__global__ void rope_append_kernel(const __grid_constant__ AttentionTask task) {
  release_successor();
  await_predecessor();
  const int64_t row = blockIdx.y;
  const int position = task.step.positions[row];
  if (position < 0) return;
  append_row(task, row, static_cast<int>(blockIdx.x), position, static_cast<int>(threadIdx.x), 64);
}

}  // namespace

void rope_append(const AttentionTask& task) {
  launch(rope_append_kernel, dim3(static_cast<unsigned>(task.num_kv_heads), static_cast<unsigned>(task.num_rows)),
         dim3(64), 0, task.stream, task);
}

}  // namespace tw::cuda
