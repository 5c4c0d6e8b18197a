// The kernels behind matmul.h, templates over the storage format.
//
// narrow: a block owns kTiles tiles of 16 outputs and up to 8 · kGroups tokens; each of its warps sums one split of the
// inputs, weights going from device memory to registers to the tensor cores, and the splits meet in shared memory. Reads
// the weights once for each group of tokens; meant for few tokens, where those bytes are all that counts.
// wide: a block of 8 warps owns 256 outputs and 64 tokens; a warp sums all splits of its 32 outputs one after another,
// and the tokens' inputs pass through shared memory. Reads the weights once for each 64 tokens, from L2.
#pragma once

#include "cuda/formats.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"

namespace tw::cuda {

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A lane's 16 inputs of one token as FP16 pairs.
struct LaneInputs {
  uint32_t pair[8];
};

// The factor 2^(14 - e) for a largest magnitude in [2^e, 2^(e+1)), and its inverse.
__device__ __forceinline__ float range_factor(uint32_t magnitude_bits, float* inverse) {
  int exponent = static_cast<int>(magnitude_bits >> 23) - 127;
  if (magnitude_bits == 0) exponent = 14;
  exponent = min(max(exponent, -100), 126);
  *inverse = __int_as_float((127 + exponent - 14) << 23);
  return __int_as_float((127 + 14 - exponent) << 23);
}

// 1 / √(mean of squares + ε), from sums of 16 values each. The four lanes of a quad call it together and get the same.
__device__ __forceinline__ float inverse_rms(const float* sums, int count, int q, float inverse_size, float epsilon) {
  float sum = 0;
  for (int i = q * 4; i < count; i += 16) {
    const float4 v = *reinterpret_cast<const float4*>(sums + i);
    sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(v.x, v.y), __fadd_rn(v.z, v.w)));
  }
  sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
  sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
  return __frsqrt_rn(__fadd_rn(__fmul_rn(sum, inverse_size), epsilon));
}

__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, expf(-x))); }

template <Input kInput>
__device__ __forceinline__ LaneInputs load_inputs(const MatmulTask& task, int64_t row, int k, float factor) {
  LaneInputs result;
  if constexpr (kInput == Input::kHalf) {
    const auto* x = reinterpret_cast<const uint4*>(static_cast<const __half*>(task.input) + row * task.input_stride + k);
    const uint4 low = x[0];
    const uint4 high = x[1];
    result = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  } else {
    const auto* x =
        reinterpret_cast<const float4*>(static_cast<const float*>(task.input) + row * task.input_stride + k);
    const auto* gain = reinterpret_cast<const float4*>(task.gain + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float4 v = x[i];
      v = {__fmul_rn(v.x, factor), __fmul_rn(v.y, factor), __fmul_rn(v.z, factor), __fmul_rn(v.w, factor)};
      if constexpr (kInput == Input::kNormed) {
        const float4 g = __ldg(gain + i);
        v = {__fmul_rn(v.x, g.x), __fmul_rn(v.y, g.y), __fmul_rn(v.z, g.z), __fmul_rn(v.w, g.w)};
      }
      result.pair[2 * i] = pack_half2(v.x, v.y);
      result.pair[2 * i + 1] = pack_half2(v.z, v.w);
    }
  }
  return result;
}

template <class Format, int kTiles, int kGroups, Input kInput>
__global__ void __launch_bounds__(512) narrow_kernel(const __grid_constant__ MatmulTask task) {
  extern __shared__ float partials[];  // [splits][kTiles][kGroups][8 tokens][16 outputs]
  constexpr size_t kRawBytes = sizeof(typename Format::Raw) * kTiles;
  constexpr int kDepth = kRawBytes <= 64 ? 3 : kRawBytes <= 128 ? 2 : 1;
  using Raw = typename Format::Raw;
  const PackedPart& part = task.part;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int q = lane & 3;
  const int tile = static_cast<int>(blockIdx.x) * kTiles;
  const int first_token = static_cast<int>(blockIdx.y) * 8 * kGroups;
  const int begin = warp * part.num_steps / part.num_splits;
  const int end = (warp + 1) * part.num_steps / part.num_splits;
  const uint8_t* tiles = part.tiles + tile * part.tile_stride;
  const uint8_t* supers = tiles + static_cast<int64_t>(part.num_steps) * Format::kStepBytes;

  Raw raw[kDepth][kTiles];
  const auto fetch = [&](int step, Raw(&into)[kTiles]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      into[t] = Format::load(tiles + t * part.tile_stride + static_cast<int64_t>(step) * Format::kStepBytes,
                             supers + t * part.tile_stride + (step >> 2) * Format::kSuperBytes, lane);
    }
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (begin + d < end) fetch(begin + d, raw[d]);
  }
  release_successor();
  await_predecessor();

  if (task.magnitudes_to_clear != nullptr && blockIdx.x == 0 && threadIdx.x < kFusedTokens) {
    task.magnitudes_to_clear[threadIdx.x] = 0;
  }
  int64_t rows[kGroups];
  bool valid[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int token = first_token + g * 8 + (lane >> 2);
    valid[g] = token < task.num_tokens;
    rows[g] = valid[g] && task.input_rows != nullptr ? task.input_rows[token] : token;
  }
  float factor = 1.0f;
  if constexpr (kInput == Input::kNormed) {
    factor = inverse_rms(task.input_square_sums + (valid[0] ? rows[0] : 0) * task.square_stride,
                         task.square_stride, q, task.inverse_size, task.epsilon);
    factor = __fmul_rn(factor, task.gain_factor);
  } else if constexpr (kInput == Input::kScaled) {
    float inverse;
    factor = range_factor(valid[0] ? task.input_magnitudes[rows[0]] : 0, &inverse);
  }

  float acc[kTiles][kGroups][4] = {};
  for (int base = begin; base < end; base += kDepth) {
    LaneInputs x[kGroups == 1 ? kDepth : 1][kGroups];
    if constexpr (kGroups == 1) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (valid[0] && base + d < end) {
          x[d][0] = load_inputs<kInput>(task, rows[0], (base + d) * kStepInputs + q * kLaneInputs, factor);
        } else {
          x[d][0] = {};
        }
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int step = base + d;
      if (step >= end) break;
      if constexpr (kGroups > 1) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (valid[g]) {
            x[0][g] = load_inputs<kInput>(task, rows[g], step * kStepInputs + q * kLaneInputs, factor);
          } else {
            x[0][g] = {};
          }
        }
      }
      const auto& inputs = x[kGroups == 1 ? d : 0];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int pass = 0; pass < Format::kPasses; ++pass) {
          uint32_t a[4][4];
          Format::unpack(raw[d][t], lane, pass, a);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) mma(acc[t][g], a[j], inputs[g].pair[2 * j], inputs[g].pair[2 * j + 1]);
          }
        }
      }
      if (step + kDepth < end) fetch(step + kDepth, raw[d]);
    }
  }

  const int r = lane >> 2;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float* at = partials + ((warp * kTiles + t) * kGroups + g) * 128 + q * 32 + r;
      at[0] = acc[t][g][0];
      at[16] = acc[t][g][1];
      at[8] = acc[t][g][2];
      at[24] = acc[t][g][3];
    }
  }
  __syncthreads();

  const int num_tokens = min(8 * kGroups, task.num_tokens - first_token);
  const int pieces = task.epilogue == Epilogue::kGateUp ? 1 : kTiles;
  const auto total = [&](int t, int index) {
    float sum = partials[t * kGroups * 128 + index];
    for (int s = 1; s < part.num_splits; ++s) {
      sum = __fadd_rn(sum, partials[(s * kTiles + t) * kGroups * 128 + index]);
    }
    return sum;
  };
  // All 16 lanes of a tile's row stay together, so the loop bound is the same for each half warp.
  for (int index = static_cast<int>(threadIdx.x); index < pieces * num_tokens * 16;
       index += static_cast<int>(blockDim.x)) {
    const int t = index / (num_tokens * 16);
    const int within = index - t * num_tokens * 16;
    const int token = first_token + within / 16;
    const int i = within & 15;
    const int row = (task.epilogue == Epilogue::kGateUp ? tile / 2 : tile + t) * 16 + i;
    const bool exists = row < part.num_rows;
    float y = __fmul_rn(total(t, within), part.row_factors[(tile + t) * 16 + i]);
    float token_factor = 1.0f;
    if constexpr (kInput == Input::kNormed) token_factor = __fdiv_rn(1.0f, task.gain_factor);
    if constexpr (kInput == Input::kScaled) range_factor(task.input_magnitudes[token], &token_factor);
    if (task.token_factors != nullptr) token_factor = task.token_factors[token];
    y = __fmul_rn(y, token_factor);
    float* out = task.out + static_cast<int64_t>(token) * task.out_stride + part.first_output + row;
    const unsigned half_warp = 0xffffu << (lane & 16);
    if (task.epilogue == Epilogue::kStore) {
      if (exists) *out = task.bias == nullptr ? y : __fadd_rn(y, task.bias[part.first_output + row]);
    } else if (task.epilogue == Epilogue::kAdd) {
      float square = 0;
      if (exists) {
        y = __fadd_rn(*out, y);
        *out = y;
        square = __fmul_rn(y, y);
      }
      if (task.square_sums != nullptr) {
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) {
          square = __fadd_rn(square, __shfl_xor_sync(half_warp, square, offset, 16));
        }
        if (i == 0) task.square_sums[static_cast<int64_t>(token) * task.square_stride_out + tile + t] = square;
      }
    } else {
      float up = 0;
      if constexpr (kTiles == 2) {
        up = __fmul_rn(__fmul_rn(total(1, within), part.row_factors[(tile + 1) * 16 + i]), token_factor);
      }
      const float value = exists ? __fmul_rn(silu(y), up) : 0.0f;
      if (exists) *out = value;
      if (task.magnitudes != nullptr) {
        uint32_t magnitude = __float_as_uint(value) & 0x7fffffffu;
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) {
          magnitude = max(magnitude, __shfl_xor_sync(half_warp, magnitude, offset, 16));
        }
        if (i == 0) atomicMax(task.magnitudes + token, magnitude);
      }
    }
  }
}

constexpr int kWideWarps = 8;
constexpr int kWideTokens = 64;
constexpr int kWideStages = 4;
constexpr int kWideRowBytes = kStepInputs * 2 + 16;  // padded: eight lanes' 16-byte reads meet no bank twice

__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

template <class Format>
__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_kernel(const __grid_constant__ MatmulTask task) {
  __shared__ __align__(16) uint8_t inputs[kWideStages][kWideTokens][kWideRowBytes];
  constexpr int kGroups = kWideTokens / 8;
  const PackedPart& part = task.part;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int q = lane & 3;
  const int r = lane >> 2;
  const int tile = (static_cast<int>(blockIdx.y) * kWideWarps + warp) * 2;
  const int first_token = static_cast<int>(blockIdx.x) * kWideTokens;
  const bool active = tile < part.num_tiles;
  const uint8_t* tiles = part.tiles + (active ? tile : 0) * part.tile_stride;
  const uint8_t* supers = tiles + static_cast<int64_t>(part.num_steps) * Format::kStepBytes;
  release_successor();
  await_predecessor();

  const auto* source = static_cast<const __half*>(task.input);
  const auto stage_inputs = [&](int step) {
    if (step < part.num_steps) {
#pragma unroll
      for (int i = 0; i < kWideTokens * 8 / (kWideWarps * 32); ++i) {
        const int piece = i * kWideWarps * 32 + static_cast<int>(threadIdx.x);
        const int token = piece >> 3;
        const bool valid = first_token + token < task.num_tokens;
        const int64_t row = valid ? first_token + token : 0;
        copy_async16(&inputs[step % kWideStages][token][(piece & 7) * 16],
                     source + row * task.input_stride + step * kStepInputs + (piece & 7) * 8, valid);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int step = 0; step < kWideStages - 1; ++step) stage_inputs(step);

  typename Format::Raw raw[2];
  const auto fetch = [&](int step, typename Format::Raw(&into)[2]) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      into[t] = Format::load(tiles + t * part.tile_stride + static_cast<int64_t>(step) * Format::kStepBytes,
                             supers + t * part.tile_stride + (step >> 2) * Format::kSuperBytes, lane);
    }
  };
  fetch(0, raw);

  float sum[2][kGroups][4];
  float acc[2][kGroups][4] = {};
  int split = 0;
  int boundary = part.num_steps / part.num_splits;
  for (int step = 0; step < part.num_steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kWideStages - 2) : "memory");
    __syncthreads();
    stage_inputs(step + kWideStages - 1);
    typename Format::Raw current[2] = {raw[0], raw[1]};
    if (step + 1 < part.num_steps) fetch(step + 1, raw);
#pragma unroll
    for (int pass = 0; pass < Format::kPasses; ++pass) {
      uint32_t a[2][4][4];
      Format::unpack(current[0], lane, pass, a[0]);
      Format::unpack(current[1], lane, pass, a[1]);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const auto* x = reinterpret_cast<const uint4*>(&inputs[step % kWideStages][g * 8 + r][q * 32]);
        const uint4 low = x[0];
        const uint4 high = x[1];
        const uint32_t pair[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma(acc[0][g], a[0][j], pair[2 * j], pair[2 * j + 1]);
          mma(acc[1][g], a[1][j], pair[2 * j], pair[2 * j + 1]);
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
            sum[t][g][e] = split == 0 ? acc[t][g][e] : __fadd_rn(sum[t][g][e], acc[t][g][e]);
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
      const int token = first_token + g * 8 + q * 2 + (e & 1);
      const int i = r + (e >= 2 ? 8 : 0);
      if (token >= task.num_tokens) continue;
      const float token_factor = task.token_factors == nullptr ? 1.0f : task.token_factors[token];
      float y[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        y[t] = __fmul_rn(__fmul_rn(sum[t][g][e], part.row_factors[(tile + t) * 16 + i]), token_factor);
      }
      float* out = task.out + static_cast<int64_t>(token) * task.out_stride + part.first_output;
      if (task.epilogue == Epilogue::kGateUp) {
        const int row = tile / 2 * 16 + i;
        if (row < part.num_rows) out[row] = __fmul_rn(silu(y[0]), y[1]);
        continue;
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int row = (tile + t) * 16 + i;
        if (row >= part.num_rows) continue;
        if (task.epilogue == Epilogue::kAdd) {
          out[row] = __fadd_rn(out[row], y[t]);
        } else {
          out[row] = task.bias == nullptr ? y[t] : __fadd_rn(y[t], task.bias[part.first_output + row]);
        }
      }
    }
  }
}

template <class Kernel>
void allow_shared(Kernel kernel, size_t num_bytes) {
  if (num_bytes <= 48 * 1024) return;
  TW_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(num_bytes)));
}

template <class Format, int kTiles, int kGroups, Input kInput>
void launch_narrow(const MatmulTask& task) {
  const auto kernel = narrow_kernel<Format, kTiles, kGroups, kInput>;
  const PackedPart& part = task.part;
  const size_t shared = static_cast<size_t>(part.num_splits) * kTiles * kGroups * 128 * sizeof(float);
  allow_shared(kernel, shared);
  const dim3 grid(static_cast<unsigned>(part.num_tiles / kTiles),
                  static_cast<unsigned>((task.num_tokens + 8 * kGroups - 1) / (8 * kGroups)));
  launch(kernel, grid, dim3(static_cast<unsigned>(part.num_splits) * 32), shared, task.stream, task);
}

template <class Format, int kTiles>
void launch_narrow(const MatmulTask& task) {
  if (task.num_tokens <= 8) {
    if (task.input_kind == Input::kHalf) return launch_narrow<Format, kTiles, 1, Input::kHalf>(task);
    if (task.input_kind == Input::kNormed) return launch_narrow<Format, kTiles, 1, Input::kNormed>(task);
    if constexpr (kTiles == 1) return launch_narrow<Format, 1, 1, Input::kScaled>(task);
    throw Error(ErrorCode::kInternal, "no kernel for scaled inputs of a gate-up pair");
  }
  if (task.input_kind != Input::kHalf) throw Error(ErrorCode::kInternal, "many tokens need FP16 inputs");
  if (task.num_tokens <= 16) return launch_narrow<Format, kTiles, 2, Input::kHalf>(task);
  if (task.num_tokens <= 32) return launch_narrow<Format, kTiles, 4, Input::kHalf>(task);
  return launch_narrow<Format, kTiles, 8 / kTiles, Input::kHalf>(task);
}

template <class Format>
void matmul_of(const MatmulTask& task) {
  if (task.wide) {
    const dim3 grid(static_cast<unsigned>((task.num_tokens + kWideTokens - 1) / kWideTokens),
                    static_cast<unsigned>((task.part.num_tiles + 2 * kWideWarps - 1) / (2 * kWideWarps)));
    launch(wide_kernel<Format>, grid, dim3(kWideWarps * 32), 0, task.stream, task);
  } else if (task.epilogue == Epilogue::kGateUp) {
    launch_narrow<Format, 2>(task);
  } else {
    launch_narrow<Format, 1>(task);
  }
}

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
    for (int k = lane; row != nullptr && k < task.num_cols; k += 32) {
      largest = max(largest, __float_as_uint(fabsf(Format::value(row, k))));
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
    const auto raw = Format::load(bytes + static_cast<int64_t>(step) * Format::kStepBytes,
                                  supers + (step >> 2) * Format::kSuperBytes, lane);
    float values[16] = {};
    for (int pass = 0; pass < Format::kPasses; ++pass) {
      uint32_t a[4][4];
      Format::unpack(raw, lane, pass, a);
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

template <class Format>
constexpr FormatKernels kernels_of(DType dtype) {
  return {dtype, Format::kStepBytes, Format::kSuperBytes, pack_of<Format>, matmul_of<Format>, embed_of<Format>};
}

}  // namespace tw::cuda
