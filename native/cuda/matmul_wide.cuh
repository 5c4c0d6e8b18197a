// Matrix products for many tokens with the instructions that all devices have: a block of 8 warps owns 256 outputs and
// 64 tokens. A warp sums all splits of its 32 outputs one after another, weights going from L2 to registers; the
// tokens' inputs pass through shared memory in three stages of 8 KiB. Reads the weights once for each 64 tokens. The
// sums are those of the kernel for few tokens: mma.m16n8k16 in order of k within a split, the splits added in order.
#pragma once

#include "cuda/activations.h"
#include "cuda/formats.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/numerics.cuh"

namespace tw::cuda {

constexpr int kWideWarps = 8;
constexpr int kWideStages = 3;
constexpr int kWideBlockBytes = kTokenBlock * kStepInputs * 2;
constexpr size_t kWideSharedBytes = size_t{kWideStages} * kWideBlockBytes;

// The weights of a step of a tile.
template <class Format>
__device__ __forceinline__ typename Format::Raw load_step(const PackedPart& part, const uint8_t* tile, int step,
                                                          int lane) {
  return Format::template load<Space::kDevice>(
      tile + static_cast<int64_t>(step) * Format::kStepBytes,
      tile + static_cast<int64_t>(part.num_steps) * Format::kStepBytes + (step >> 2) * Format::kSuperBytes, lane);
}

// One output of a product of many tokens.
__device__ __forceinline__ void finish_output(const MatmulTask& task, int64_t token, int row, float y) {
  if (row >= task.part.num_rows) return;
  const int output = task.part.first_output + row;
  float* out = task.out + token * task.out_stride + output;
  if (task.epilogue == Epilogue::kAdd) {
    *out = __fadd_rn(*out, y);
  } else {
    *out = task.bias == nullptr ? y : __fadd_rn(y, task.bias[output]);
  }
}
__device__ __forceinline__ void finish_pair(const MatmulTask& task, int64_t token, int row, float gate, float up) {
  if (row < task.part.num_rows) {
    task.out[token * task.out_stride + task.part.first_output + row] = __fmul_rn(silu(gate), up);
  }
}

template <class Format>
__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_kernel(const __grid_constant__ MatmulTask task) {
  extern __shared__ __align__(128) uint8_t staged[];  // [stages][64 tokens][128 bytes]
  constexpr int kGroups = kTokenBlock / 8;
  const PackedPart& part = task.part;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int tile = (static_cast<int>(blockIdx.y) * kWideWarps + warp) * 2;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokenBlock;
  const bool active = tile < part.num_tiles;
  const uint8_t* tiles = part.tiles + (active ? tile : 0) * part.tile_stride;
  typename Format::Raw raw[2];
  const auto fetch = [&](int step) {
    if (step >= part.num_steps) return;
    raw[0] = load_step<Format>(part, tiles, step, lane);
    raw[1] = load_step<Format>(part, tiles + part.tile_stride, step, lane);
  };
  fetch(0);
  release_successor(task.beside);
  await_predecessor(task.beside);

  const auto* blocks =
      static_cast<const uint8_t*>(task.input) + blockIdx.x * (task.input_stride / 64) * kWideBlockBytes;
  const auto stage = [&](int step) {
    if (step < part.num_steps) {
#pragma unroll
      for (int i = 0; i < kWideBlockBytes / 16 / (kWideWarps * 32); ++i) {
        const int at = (i * kWideWarps * 32 + static_cast<int>(threadIdx.x)) * 16;
        copy_async16(staged + step % kWideStages * kWideBlockBytes + at,
                     blocks + static_cast<int64_t>(step) * kWideBlockBytes + at, true);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int step = 0; step < kWideStages - 1; ++step) stage(step);

  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(staged));
  float sum[2][kGroups][4] = {};
  float acc[2][kGroups][4] = {};
  int split = 0;
  int boundary = part.num_steps / part.num_splits;
  for (int step = 0; step < part.num_steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kWideStages - 2) : "memory");
    __syncthreads();
    stage(step + kWideStages - 1);
    const uint32_t block = shared + static_cast<uint32_t>(step % kWideStages * kWideBlockBytes + (lane & 7) * 128);
#pragma unroll
    for (int pass = 0; pass < Format::kPasses; ++pass) {
      uint32_t a[2][4][4];
      unpack_step<Format>(raw[0], lane, pass, a[0]);
      unpack_step<Format>(raw[1], lane, pass, a[1]);
      if (pass == Format::kPasses - 1) fetch(step + 1);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          uint32_t x[4];
          load_matrices(x, block + static_cast<uint32_t>(g * 1024 + ((2 * j + (lane >> 3)) ^ (lane & 7)) * 16));
#pragma unroll
          for (int e = 0; e < 4; ++e) mma(acc[e & 1][g], a[e & 1][j + e / 2], x[e / 2 * 2], x[e / 2 * 2 + 1]);
        }
      }
    }
    if (step + 1 == boundary) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[t][g][e] = __fadd_rn(sum[t][g][e], acc[t][g][e]);
            acc[t][g][e] = 0;
          }
        }
      }
      ++split;
      boundary = (split + 1) * part.num_steps / part.num_splits;
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (!active) return;

#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t token = first_token + g * 8 + (lane & 3) * 2 + (e & 1);
      const int i = (lane >> 2) + (e >= 2 ? 8 : 0);
      if (token >= task.num_tokens) continue;
      const float token_factor = task.token_factors == nullptr ? 1.0f : task.token_factors[token];
      float y[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        y[t] = __fmul_rn(__fmul_rn(sum[t][g][e], part.row_factors[(tile + t) * 16 + i]), token_factor);
      }
      if (task.epilogue == Epilogue::kGateUp) {
        finish_pair(task, token, tile / 2 * 16 + i, y[0], y[1]);
      } else {
        finish_output(task, token, tile * 16 + i, y[0]);
        finish_output(task, token, (tile + 1) * 16 + i, y[1]);
      }
    }
  }
  end_after_predecessor(task.beside);
}

template <class Format>
void launch_wide(const MatmulTask& task) {
  const dim3 grid(static_cast<unsigned>((task.num_tokens + kTokenBlock - 1) / kTokenBlock),
                  static_cast<unsigned>((task.part.num_tiles + 2 * kWideWarps - 1) / (2 * kWideWarps)));
  launch(wide_kernel<Format>, grid, dim3(kWideWarps * 32), kWideSharedBytes, task.stream, task);
}

}  // namespace tw::cuda
