// Outputs of products of many tokens, from sums in shared memory to what the epilogue makes of them.
#pragma once

#include "cuda/matmul.h"
#include "cuda/numerics.cuh"

namespace tw::cuda {

// 1 for tokens past the last.
__device__ __forceinline__ float token_factor(const MatmulTask& task, int64_t token) {
  return task.token_factors == nullptr || token >= task.num_tokens ? 1.0f : task.token_factors[token];
}

// One thread's outputs of kCount rows of one token, which begin as sums: rows first, first + stride, … of the block's
// tiles. Of a gate-up pair, row / 16 counts pairs of tiles, and sums[kCount / 2 …] belong to the upper halves.
template <int kCount>
struct OutputRows {
  int rows[kCount];       // of the matrix
  float factors[kCount];  // of the tiles' rows
  float bias[kCount];

  __device__ __forceinline__ static int sum_row(bool paired, int i, int first, int stride) {
    if (!paired) return first + i * stride;
    const int row = first + i % (kCount / 2) * stride;
    return row / 16 * 32 + row % 16 + (i < kCount / 2 ? 0 : 16);
  }

  __device__ __forceinline__ void load(const MatmulTask& task, int first_tile, int first, int stride) {
    const bool paired = task.epilogue == Epilogue::kGateUp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int tile_row = first_tile * 16 + sum_row(paired, i, first, stride);
      factors[i] = tile_row < task.part.num_tiles * 16 ? task.part.row_factors[tile_row] : 0.0f;
      rows[i] = paired ? first_tile * 8 + first + i % (kCount / 2) * stride : tile_row;
      const bool biased = task.bias != nullptr && rows[i] < task.part.num_rows;
      bias[i] = biased ? task.bias[task.part.first_output + rows[i]] : 0.0f;
    }
  }

  // kTokens tokens at once, so that what they add to is on its way together.
  template <int kTokens>
  __device__ __forceinline__ void finish(const MatmulTask& task, int64_t token, int token_step,
                                         const float (&token_factors)[kTokens], float (&sums)[kTokens][kCount]) const {
    float* const out = task.out + task.part.first_output + token * task.out_stride;
    const int64_t step = token_step * task.out_stride;
    const auto num_tokens =
        static_cast<int>(min(int64_t{kTokens}, (task.num_tokens - token + token_step - 1) / token_step));
    bool exists[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) exists[i] = rows[i] < task.part.num_rows;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sums[t][i] = __fmul_rn(__fmul_rn(sums[t][i], factors[i]), token_factors[t]);
      }
    }
    if (task.epilogue == Epilogue::kGateUp) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          const float value = __fmul_rn(silu(sums[t][i]), sums[t][kCount / 2 + i]);
          if (t < num_tokens && exists[i]) out[t * step + rows[i]] = value;
        }
      }
      return;
    }
    if (task.epilogue == Epilogue::kAdd) {
      float before[kTokens][kCount];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) before[t][i] = t < num_tokens && exists[i] ? out[t * step + rows[i]] : 0.0f;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[t][i] = __fadd_rn(before[t][i], sums[t][i]);
      }
    } else if (task.bias != nullptr) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[t][i] = __fadd_rn(sums[t][i], bias[i]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (t < num_tokens && exists[i]) out[t * step + rows[i]] = sums[t][i];
      }
    }
  }

  // The same where all tokens and rows exist, and a pair's rows are kRowStep apart.
  template <int kRowStep, int kTokens>
  __device__ __forceinline__ void finish_whole(const MatmulTask& task, int64_t token, int token_step,
                                               const float (&token_factors)[kTokens],
                                               float (&sums)[kTokens][kCount]) const {
    static_assert(kCount == 2);
    float* out = task.out + task.part.first_output + rows[0] + token * task.out_stride;
    const int64_t step = token_step * task.out_stride;
    if (task.epilogue == Epilogue::kGateUp) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float gate = __fmul_rn(__fmul_rn(sums[t][0], factors[0]), token_factors[t]);
        const float up = __fmul_rn(__fmul_rn(sums[t][1], factors[1]), token_factors[t]);
        *out = __fmul_rn(silu(gate), up);
        out += step;
      }
      return;
    }
    if (task.epilogue == Epilogue::kAdd) {
      float before[kTokens][2];
      const float* from = out;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        before[t][0] = from[0];
        before[t][1] = from[kRowStep];
        from += step;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          out[i * kRowStep] = __fadd_rn(before[t][i], __fmul_rn(__fmul_rn(sums[t][i], factors[i]), token_factors[t]));
        }
        out += step;
      }
      return;
    }
    const bool biased = task.bias != nullptr;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = __fmul_rn(__fmul_rn(sums[t][i], factors[i]), token_factors[t]);
        out[i * kRowStep] = biased ? __fadd_rn(value, bias[i]) : value;
      }
      out += step;
    }
  }
};

}  // namespace tw::cuda
