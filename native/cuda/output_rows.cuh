// Outputs of products of many tokens, from sums in shared memory to what the epilogue makes of them.
#pragma once

#include "cuda/matmul.h"
#include "cuda/numerics.cuh"

namespace tw::cuda {

// Floats between the sums of two tokens of 64 rows: what a warp writes and reads meets no bank twice.
constexpr int kSumRow = 64 + 4;

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
};

// A warp group's outputs from [kTokens][kSumRow] sums, where all 64 rows exist: each thread has four neighbours of some
// tokens. The same arithmetic as OutputRows, with loads and stores of 16 bytes.
template <int kTokens>
class OutputFours {
 public:
  // Whether four neighbours lie at a multiple of 16 bytes.
  __device__ __forceinline__ static bool possible(const MatmulTask& task) {
    return ((task.out_stride | task.part.first_output) & 3) == 0 && (reinterpret_cast<uintptr_t>(task.out) & 15) == 0;
  }

  // The rows of four tiles, and tokens from `first_token` on.
  __device__ __forceinline__ OutputFours(const MatmulTask& task, int first_tile, int64_t first_token, int warp,
                                         int lane)
      : paired_(task.epilogue == Epilogue::kGateUp), first_token_(first_token), lane_(lane) {
    // Lanes of a pair's outputs are such that eight of them read 32 banks.
    const int output = paired_ ? (lane >> 3 & 1) * 16 + (lane & 3) * 4 : (lane & 15) * 4;
    token_ = paired_ ? (lane >> 4) + (warp & 1) * 2 + (lane >> 2 & 1) * 4 + (warp >> 1) * 8 : (lane >> 4) + warp * 2;
    row_ = paired_ ? (lane >> 3 & 1) * 32 + (lane & 3) * 4 : output;
    const float* factors = task.part.row_factors + first_tile * 16 + row_;
    factors_ = __ldg(reinterpret_cast<const float4*>(factors));
    if (paired_) more_ = __ldg(reinterpret_cast<const float4*>(factors + 16));
    output_ = task.part.first_output + first_tile * (paired_ ? 8 : 16) + output;
    if (!paired_ && task.bias != nullptr) {
      const float* bias = task.bias + output_;
      more_ = {__ldg(bias), __ldg(bias + 1), __ldg(bias + 2), __ldg(bias + 3)};
    }
  }

  // Asks for what the outputs of a chunk of tokens need beside their sums.
  __device__ __forceinline__ void prepare(const MatmulTask& task, int chunk) {
    const int64_t token = first_token_ + chunk * kTokens;
#pragma unroll
    for (int i = 0; i < kTokens / 32; ++i) token_factors_[i] = token_factor(task, token + i * 32 + lane_);
    if (task.epilogue != Epilogue::kAdd) return;
    const float* before = task.out + (token + token_) * task.out_stride + output_;
    const int left = own_tokens(task, token);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i * 8 < left) before_[i] = *reinterpret_cast<const float4*>(before + i * 8 * task.out_stride);
    }
  }

  __device__ __forceinline__ void finish(const MatmulTask& task, int chunk, const float* sums) const {
    const int64_t token = first_token_ + chunk * kTokens;
    const float* from = sums + token_ * kSumRow + row_;
    float* out = task.out + (token + token_) * task.out_stride + output_;
    const int left = own_tokens(task, token);
    if (paired_) {
#pragma unroll
      for (int i = 0; i < kOwn / 2; ++i) {
        const float factor = __shfl_sync(~0u, token_factors_[i / 2], token_ + i % 2 * 16);
        const float4 gate = scaled(load(from + i * 16 * kSumRow), factors_, factor);
        const float4 up = scaled(load(from + i * 16 * kSumRow + 16), more_, factor);
        const float4 value = {__fmul_rn(silu(gate.x), up.x), __fmul_rn(silu(gate.y), up.y),
                              __fmul_rn(silu(gate.z), up.z), __fmul_rn(silu(gate.w), up.w)};
        if (i * 16 < left) *reinterpret_cast<float4*>(out + i * 16 * task.out_stride) = value;
      }
      return;
    }
    const bool adds = task.epilogue == Epilogue::kAdd;
    const bool biased = task.bias != nullptr;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float factor = __shfl_sync(~0u, token_factors_[i / 4], token_ + i % 4 * 8);
      float4 value = scaled(load(from + i * 8 * kSumRow), factors_, factor);
      if (adds) {
        value = sum_of(before_[i], value);
      } else if (biased) {
        value = sum_of(value, more_);
      }
      if (i * 8 < left) *reinterpret_cast<float4*>(out + i * 8 * task.out_stride) = value;
    }
  }

 private:
  static constexpr int kOwn = kTokens / 8;  // of a gated pair half as many

  __device__ __forceinline__ static float4 load(const float* from) { return *reinterpret_cast<const float4*>(from); }
  __device__ __forceinline__ static float4 scaled(float4 x, float4 factors, float factor) {
    return {__fmul_rn(__fmul_rn(x.x, factors.x), factor), __fmul_rn(__fmul_rn(x.y, factors.y), factor),
            __fmul_rn(__fmul_rn(x.z, factors.z), factor), __fmul_rn(__fmul_rn(x.w, factors.w), factor)};
  }
  __device__ __forceinline__ static float4 sum_of(float4 a, float4 b) {
    return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)};
  }

  // Tokens of a chunk from the thread's first on.
  __device__ __forceinline__ int own_tokens(const MatmulTask& task, int64_t token) const {
    return static_cast<int>(min(task.num_tokens - token, int64_t{kTokens})) - token_;
  }

  const bool paired_;
  const int64_t first_token_;
  const int lane_;
  int token_, row_, output_;           // of the first four: the token in a chunk, its sum, the output
  float4 factors_, more_;              // of the rows; of a pair's other rows, or the bias
  float token_factors_[kTokens / 32];  // of the lane's token of 32
  float4 before_[kOwn];
};

}  // namespace tw::cuda
