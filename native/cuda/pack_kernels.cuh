// Packing a matrix into tiles (formats.cuh), and looking rows of it up.
#pragma once

#include "cuda/formats.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"

namespace tw::cuda {

// One block a tile. First the rows' largest magnitudes and so their factors, then the tile's bytes.
template <class Format>
__global__ void pack_kernel(const __grid_constant__ PackTask task) {
  __shared__ float factors[kTileRows];
  const int tile = static_cast<int>(blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const auto row_bytes = [&](int i) {
    const int row = tile * kTileRows + i;
    return row < task.num_rows ? task.rows + row * task.row_bytes : nullptr;
  };
  const int packed_tile = task.first_tile + tile * task.tile_step;
  for (int i = warp; i < kTileRows; i += static_cast<int>(blockDim.x) / 32) {
    const uint8_t* row = row_bytes(i);
    uint32_t largest = 0;
    for (int k = lane * Format::kMagnitudeInputs; row != nullptr && k < task.num_cols;
         k += 32 * Format::kMagnitudeInputs) {
      largest = max(largest, __float_as_uint(Format::magnitude(row, k)));
    }
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) {
      int exponent = largest == 0 ? 0 : 7 - (static_cast<int>(largest >> 23) - 127);
      exponent = min(max(exponent, -100), 100);
      factors[i] = __int_as_float((127 + exponent) << 23);
      task.row_factors[packed_tile * kTileRows + i] = __int_as_float((127 - exponent) << 23);
    }
  }
  __syncthreads();
  uint8_t* out = task.tiles + packed_tile * task.tile_stride;
  uint8_t* supers = out + static_cast<int64_t>(task.num_steps) * Format::kStepBytes;
  for (int step = warp; step < task.num_steps; step += static_cast<int>(blockDim.x) / 32) {
    PackLane pack;
    pack.lane = lane;
    pack.k = step * kStepInputs + (lane & 3) * kLaneInputs;
    const bool inside = pack.k < task.num_cols;
    for (int half = 0; half < 2; ++half) {
      const int i = (lane >> 2) + 8 * half;
      pack.row[half] = inside ? row_bytes(i) : nullptr;
      pack.factor[half] = factors[i];
    }
    pack.step = out + static_cast<int64_t>(step) * Format::kStepBytes;
    pack.super = supers + (step >> 2) * Format::kSuperBytes;
    Format::pack(pack);
  }
}

template <class Format>
void pack_of(const PackTask& task) {
  const int tiles = (task.num_rows + kTileRows - 1) / kTileRows;
  pack_kernel<Format><<<static_cast<unsigned>(tiles), 256, 0, task.stream>>>(task);
  TW_CUDA_CHECK(cudaGetLastError());
}

// One block a token: out[t][k] = W[id][k], and the sums of squares of each 16 values. Reads the tile of the row.
template <class Format>
__global__ void embed_kernel(const __grid_constant__ PackedPart part, const int32_t* token_ids, float* out,
                             int64_t out_stride, float* square_sums, int32_t square_stride) {
  release_successor();
  await_predecessor();
  const int64_t token = blockIdx.x;
  const int id = token_ids[token] - part.first_output;
  if (id < 0 || id >= part.num_rows) return;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int tile = id / kTileRows;
  const int i = id % kTileRows;
  const uint8_t* bytes = part.tiles + tile * part.tile_stride;
  const uint8_t* supers = bytes + static_cast<int64_t>(part.num_steps) * Format::kStepBytes;
  const float factor = part.row_factors[id];
  for (int step = warp; step < part.num_steps; step += static_cast<int>(blockDim.x) / 32) {
    const auto raw = Format::template load<Space::kDevice>(bytes + static_cast<int64_t>(step) * Format::kStepBytes,
                                                           supers + (step >> 2) * Format::kSuperBytes, lane);
    float values[16] = {};
    for (int pass = 0; pass < Format::kPasses; ++pass) {
      uint32_t a[4][4];
      unpack_step<Format>(raw, lane, pass, a);
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {
        const uint32_t two = i < 8 ? a[pair / 2][pair % 2 * 2] : a[pair / 2][pair % 2 * 2 + 1];
        const float2 v = __half22float2(as_half2(two));
        values[2 * pair] = __fadd_rn(values[2 * pair], __fmul_rn(v.x, factor));
        values[2 * pair + 1] = __fadd_rn(values[2 * pair + 1], __fmul_rn(v.y, factor));
      }
    }
    if (lane >> 2 != i % 8) continue;
    const int k = step * kStepInputs + (lane & 3) * kLaneInputs;
    auto* to = reinterpret_cast<float4*>(out + token * out_stride + k);
    float squares[16];
#pragma unroll
    for (int e = 0; e < 16; ++e) squares[e] = __fmul_rn(values[e], values[e]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[e] = {values[4 * e], values[4 * e + 1], values[4 * e + 2], values[4 * e + 3]};
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {  // the same tree as the half warps of the other kernels
#pragma unroll
      for (int e = 0; e < offset; ++e) squares[e] = __fadd_rn(squares[e], squares[e + offset]);
    }
    square_sums[token * square_stride + k / 16] = squares[0];
  }
}

template <class Format>
void embed_of(const PackedPart& part, const int32_t* token_ids, int32_t num_tokens, float* out, int64_t out_stride,
              float* square_sums, int32_t square_stride, cudaStream_t stream) {
  launch(embed_kernel<Format>, dim3(static_cast<unsigned>(num_tokens)), dim3(256), 0, stream, part, token_ids, out,
         out_stride, square_sums, square_stride);
}

}  // namespace tw::cuda
