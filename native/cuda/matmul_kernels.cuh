// The kernels behind matmul.h, templates over the storage format.
//
// narrow: a block owns kTiles tiles of 16 outputs and up to 8 · kGroups tokens; each of its warps sums one split of the
// inputs, weights going from device memory to registers to the tensor cores, and the splits meet in shared memory.
// Reads the weights once for each group of tokens; meant for few tokens, where those bytes are all that counts. wide: a
// block of 8 warps owns 256 outputs and 64 tokens; a warp sums all splits of its 32 outputs one after another, and the
// tokens' inputs pass through shared memory. Reads the weights once for each 64 tokens, from L2.
#pragma once

#include <type_traits>

#include "cuda/formats.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"

namespace tw::cuda {

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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

// 16 consecutive inputs, in device or shared memory.
__device__ __forceinline__ LaneInputs load_inputs(const __half* inputs) {
  const auto* x = reinterpret_cast<const uint4*>(inputs);
  const uint4 low = x[0];
  const uint4 high = x[1];
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Bytes of a step of one tile in shared memory: the step's own, then those of its super.
template <class Format>
constexpr int kStageBytes = Format::kStepBytes + Format::kSuperBytes;

// A warp starts copying one step of kTiles neighbouring tiles.
template <class Format, int kTiles>
__device__ __forceinline__ void stage_weights(uint8_t* to, const uint8_t* tiles, const PackedPart& part, int step,
                                              int lane) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const uint8_t* tile = tiles + t * part.tile_stride;
    const uint8_t* from = tile + static_cast<int64_t>(step) * Format::kStepBytes;
    uint8_t* into = to + t * kStageBytes<Format>;
#pragma unroll
    for (int piece = lane; piece < Format::kStepBytes / 16; piece += 32) {
      copy_async16(into + piece * 16, from + piece * 16, true);
    }
    if constexpr (Format::kSuperBytes > 0) {
      const uint8_t* super = tile + static_cast<int64_t>(part.num_steps) * Format::kStepBytes +
                             static_cast<int64_t>(step >> 2) * Format::kSuperBytes;
      if (lane < Format::kSuperBytes / 16) {
        copy_async16(into + Format::kStepBytes + lane * 16, super + lane * 16, true);
      }
    }
  }
}

template <class Format>
__device__ __forceinline__ typename Format::Raw load_staged(const uint8_t* from, int lane) {
  return Format::template load<Space::kShared>(from, from + Format::kStepBytes, lane);
}

// The weights of a warp's steps, requested some steps ahead and kept in registers: for few tokens, whose kernels last
// little longer than one trip to memory, and leave registers free. Loops are unrolled by kUnroll.
template <class Format, int kTiles>
class RegisterPipe {
 public:
  static constexpr size_t kBytes = sizeof(typename Format::Raw) * kTiles;
  static constexpr int kDepth = kBytes <= 64 ? 3 : 2;
  static constexpr int kUnroll = kDepth;
  static constexpr int kSharedBytes = 0;

  __device__ __forceinline__ RegisterPipe(const PackedPart& part, const uint8_t* tiles, uint8_t*, int begin, int end,
                                          int lane)
      : part_(part), tiles_(tiles), end_(end), lane_(lane) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(d, begin + d);
  }
  __device__ __forceinline__ void await() {}
  __device__ __forceinline__ typename Format::Raw get(int d, int, int tile) const { return raw_[d][tile]; }
  __device__ __forceinline__ void refill(int d, int step) { fetch(d, step + kDepth); }

 private:
  __device__ __forceinline__ void fetch(int d, int step) {
    if (step >= end_) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* tile = tiles_ + t * part_.tile_stride;
      raw_[d][t] = Format::template load<Space::kDevice>(
          tile + static_cast<int64_t>(step) * Format::kStepBytes,
          tile + static_cast<int64_t>(part_.num_steps) * Format::kStepBytes + (step >> 2) * Format::kSuperBytes, lane_);
    }
  }

  const PackedPart& part_;
  const uint8_t* tiles_;
  const int end_;
  const int lane_;
  typename Format::Raw raw_[kDepth][kTiles];
};

// The same through a ring in shared memory, about 8 KiB a warp: for more tokens, whose sums fill the registers.
template <class Format, int kTiles>
class RingPipe {
 public:
  static constexpr int kStep = kTiles * kStageBytes<Format>;
  static constexpr int kFitting = 8192 / kStep;
  static constexpr int kDepth = kFitting < 1 ? 1 : kFitting > 6 ? 6 : kFitting;
  static constexpr int kUnroll = 1;
  static constexpr int kSharedBytes = kDepth * kStep;

  __device__ __forceinline__ RingPipe(const PackedPart& part, const uint8_t* tiles, uint8_t* ring, int begin, int end,
                                      int lane)
      : part_(part), tiles_(tiles), ring_(ring), begin_(begin), end_(end), lane_(lane) {
    for (int d = 0; d < kDepth; ++d) fetch(begin + d);
  }
  __device__ __forceinline__ void await() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - 1) : "memory");
    __syncwarp();
  }
  __device__ __forceinline__ typename Format::Raw get(int, int step, int tile) const {
    return load_staged<Format>(place(step) + tile * kStageBytes<Format>, lane_);
  }
  __device__ __forceinline__ void refill(int, int step) {
    __syncwarp();
    fetch(step + kDepth);
  }

 private:
  __device__ __forceinline__ uint8_t* place(int step) const { return ring_ + (step - begin_) % kDepth * kStep; }
  __device__ __forceinline__ void fetch(int step) {
    if (step < end_) stage_weights<Format, kTiles>(place(step), tiles_, part_, step, lane_);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  const PackedPart& part_;
  const uint8_t* tiles_;
  uint8_t* const ring_;
  const int begin_;
  const int end_;
  const int lane_;
};

template <class Format, int kTiles, int kGroups>
using WeightPipe = std::conditional_t<kGroups == 1 && RegisterPipe<Format, kTiles>::kBytes <= 80,
                                      RegisterPipe<Format, kTiles>, RingPipe<Format, kTiles>>;

// FP16 values between the staged inputs of two tokens beyond their width: eight lanes' 16-byte reads meet no bank
// twice.
constexpr int kStagePad = 8;

// Normalises or scales the inputs of up to eight tokens into shared memory, [tokens, width + kStagePad]. What does not
// depend on earlier kernels is fetched before they are awaited; then the values and what their factor needs together.
template <Input kInput>
class InputStage {
 public:
  __device__ __forceinline__ explicit InputStage(const MatmulTask& task) : task_(task) {
    if constexpr (kInput == Input::kNormed) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (column(i) < width()) gains_[i] = __ldg(reinterpret_cast<const float2*>(task.gain + column(i)));
      }
    }
  }

  __device__ __forceinline__ void run(__half* staged) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const auto row_of = [&](int token) {
      return task_.input_rows == nullptr ? static_cast<int64_t>(token) : task_.input_rows[token];
    };
    const auto* input = static_cast<const float*>(task_.input);
    const float* first = input + row_of(0) * task_.input_stride;
    float2 values[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (column(i) < width()) values[i] = *reinterpret_cast<const float2*>(first + column(i));
    }
    const int own = min(lane >> 2, task_.num_tokens - 1);  // each quad finds the factor of one token
    float factor;
    if constexpr (kInput == Input::kNormed) {
      factor = inverse_rms(task_.input_square_sums + row_of(own) * task_.square_stride, task_.square_stride, lane & 3,
                           task_.inverse_size, task_.epsilon);
      factor = __fmul_rn(factor, task_.gain_factor);
    } else {
      float inverse;
      factor = range_factor(task_.input_magnitudes[own], &inverse);
    }
    const int stride = width() + kStagePad;
    for (int token = 0; token < task_.num_tokens; ++token) {
      const float token_factor = __shfl_sync(~0u, factor, token * 4);
      const float* row = input + row_of(token) * task_.input_stride;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int k = column(i);
        if (k >= width()) break;
        const float2 x = token == 0 ? values[i] : *reinterpret_cast<const float2*>(row + k);
        store(staged + token * stride + k, x, gains_[i], token_factor);
      }
      for (int k = column(kAhead); k < width(); k += 2 * static_cast<int>(blockDim.x)) {
        float2 gain = {};
        if constexpr (kInput == Input::kNormed) gain = __ldg(reinterpret_cast<const float2*>(task_.gain + k));
        store(staged + token * stride + k, *reinterpret_cast<const float2*>(row + k), gain, token_factor);
      }
    }
    __syncthreads();
  }

 private:
  static constexpr int kAhead = kInput == Input::kNormed ? 2 : 5;

  __device__ __forceinline__ int width() const { return task_.part.num_steps * kStepInputs; }
  __device__ __forceinline__ static int column(int i) {
    return 2 * (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ static void store(__half* to, float2 x, float2 gain, float factor) {
    x = {__fmul_rn(x.x, factor), __fmul_rn(x.y, factor)};
    if constexpr (kInput == Input::kNormed) x = {__fmul_rn(x.x, gain.x), __fmul_rn(x.y, gain.y)};
    *reinterpret_cast<uint32_t*>(to) = pack_half2(x.x, x.y);
  }

  const MatmulTask& task_;
  float2 gains_[kAhead] = {};
};

template <class Format, int kTiles, int kGroups>
__host__ __device__ constexpr int narrow_ring_bytes(int num_splits) {
  const int ring = WeightPipe<Format, kTiles, kGroups>::kSharedBytes;
  const int partials = kTiles * kGroups * 128 * static_cast<int>(sizeof(float));
  return num_splits * (ring > partials ? ring : partials);
}

template <class Format, int kTiles, int kGroups, Input kInput>
__global__ void __launch_bounds__(512) narrow_kernel(const __grid_constant__ MatmulTask task) {
  // [splits] rings of weights, later [splits][kTiles][kGroups][8 tokens][16 outputs] partial sums; then staged inputs
  extern __shared__ __align__(16) uint8_t shared[];
  using Pipe = WeightPipe<Format, kTiles, kGroups>;
  auto* const partials = reinterpret_cast<float*>(shared);
  const PackedPart& part = task.part;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int q = lane & 3;
  const int tile = static_cast<int>(blockIdx.x) * kTiles;
  const int first_token = static_cast<int>(blockIdx.y) * 8 * kGroups;
  const int begin = warp * part.num_steps / part.num_splits;
  const int end = (warp + 1) * part.num_steps / part.num_splits;
  const uint8_t* tiles = part.tiles + tile * part.tile_stride;
  Pipe pipe(part, tiles, shared + warp * Pipe::kSharedBytes, begin, end, lane);
  // A thread ends with output `i` of its tile, whichever token.
  const int i = static_cast<int>(threadIdx.x) & 15;
  float row_factors[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) row_factors[t] = __ldg(part.row_factors + (tile + t) * 16 + i);
  const int output = part.first_output + (task.epilogue == Epilogue::kGateUp ? tile / 2 : tile) * 16 + i;
  const bool exists = output - part.first_output < part.num_rows;
  const float bias = task.bias != nullptr && exists ? __ldg(task.bias + output) : 0.0f;
  InputStage<kInput> stage(task);
  release_successor();
  await_predecessor();

  if (task.magnitudes_to_clear != nullptr && blockIdx.x == 0 && threadIdx.x < kFusedTokens) {
    task.magnitudes_to_clear[threadIdx.x] = 0;
  }
  const int num_tokens = min(8 * kGroups, task.num_tokens - first_token);
  float residual = 0;  // of the thread's first output
  if (task.epilogue == Epilogue::kAdd && exists && static_cast<int>(threadIdx.x) < num_tokens * 16) {
    residual = task.out[static_cast<int64_t>(first_token + (threadIdx.x >> 4)) * task.out_stride + output];
  }
  const __half* inputs = static_cast<const __half*>(task.input);
  int64_t input_stride = task.input_stride;
  if constexpr (kInput != Input::kHalf) {
    auto* staged = reinterpret_cast<__half*>(shared + narrow_ring_bytes<Format, kTiles, kGroups>(part.num_splits));
    stage.run(staged);
    inputs = staged;
    input_stride = part.num_steps * kStepInputs + kStagePad;
  }
  bool valid[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int token = first_token + g * 8 + (lane >> 2);
    valid[g] = token < task.num_tokens;
  }
  const __half* lane_inputs = inputs + (first_token + (lane >> 2)) * input_stride + q * kLaneInputs;

  float acc[kTiles][kGroups][4] = {};
  for (int base = begin; base < end; base += Pipe::kUnroll) {
#pragma unroll
    for (int d = 0; d < Pipe::kUnroll; ++d) {
      const int step = base + d;
      if (step >= end) break;
      LaneInputs x[kGroups] = {};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (valid[g]) x[g] = load_inputs(lane_inputs + g * 8 * input_stride + step * kStepInputs);
      }
      pipe.await();
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const auto raw = pipe.get(d, step, t);
#pragma unroll
        for (int pass = 0; pass < Format::kPasses; ++pass) {
          uint32_t a[4][4];
          Format::unpack(raw, lane, pass, a);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) mma(acc[t][g], a[j], x[g].pair[2 * j], x[g].pair[2 * j + 1]);
          }
        }
      }
      pipe.refill(d, step);
    }
  }
  if constexpr (Pipe::kSharedBytes > 0) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();  // the partial sums lie where the rings were
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

  const auto total = [&](int t, int index) {
    float sum = partials[t * kGroups * 128 + index];
    for (int s = 1; s < part.num_splits; ++s) {
      sum = __fadd_rn(sum, partials[(s * kTiles + t) * kGroups * 128 + index]);
    }
    return sum;
  };
  // The 16 outputs of a token are a half warp, which stays together: the bound is a multiple of 16.
  for (int index = static_cast<int>(threadIdx.x); index < num_tokens * 16; index += static_cast<int>(blockDim.x)) {
    const int token = first_token + index / 16;
    float token_factor = 1.0f;
    if constexpr (kInput == Input::kNormed) token_factor = __fdiv_rn(1.0f, task.gain_factor);
    if constexpr (kInput == Input::kScaled) range_factor(task.input_magnitudes[token], &token_factor);
    if (task.token_factors != nullptr) token_factor = task.token_factors[token];
    float y = __fmul_rn(__fmul_rn(total(0, index), row_factors[0]), token_factor);
    float* out = task.out + static_cast<int64_t>(token) * task.out_stride + output;
    const unsigned half_warp = 0xffffu << (lane & 16);
    if constexpr (kTiles == 2) {
      const float up = __fmul_rn(__fmul_rn(total(1, index), row_factors[1]), token_factor);
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
    } else if (task.epilogue == Epilogue::kStore) {
      if (exists) *out = task.bias == nullptr ? y : __fadd_rn(y, bias);
    } else {
      float square = 0;
      if (exists) {
        y = __fadd_rn(index < static_cast<int>(blockDim.x) ? residual : *out, y);
        *out = y;
        square = __fmul_rn(y, y);
      }
      if (task.square_sums != nullptr) {
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) {
          square = __fadd_rn(square, __shfl_xor_sync(half_warp, square, offset, 16));
        }
        if (i == 0) task.square_sums[static_cast<int64_t>(token) * task.square_stride_out + tile] = square;
      }
    }
  }
}

constexpr int kWideWarps = 8;
constexpr int kWideTokens = 64;
constexpr int kWideStages = 3;
constexpr int kWideRowBytes = kStepInputs * 2 + 16;  // padded: eight lanes' 16-byte reads meet no bank twice

template <class Format>
constexpr size_t wide_shared_bytes() {
  return size_t{kWideStages} * (kWideTokens * kWideRowBytes + kWideWarps * 2 * kStageBytes<Format>);
}

template <class Format>
__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_kernel(const __grid_constant__ MatmulTask task) {
  extern __shared__ __align__(16) uint8_t staged[];  // inputs [stages][tokens][row], weights [stages][warps][2 tiles]
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
  release_successor();
  await_predecessor();

  const auto* source = static_cast<const __half*>(task.input);
  const auto inputs_of = [&](int step, int token) {
    return staged + ((step % kWideStages) * kWideTokens + token) * kWideRowBytes;
  };
  const auto weights_of = [&](int step) {
    return staged + kWideStages * kWideTokens * kWideRowBytes +
           ((step % kWideStages) * kWideWarps + warp) * 2 * kStageBytes<Format>;
  };
  const auto stage = [&](int step) {
    if (step < part.num_steps) {
      stage_weights<Format, 2>(weights_of(step), tiles, part, step, lane);
#pragma unroll
      for (int i = 0; i < kWideTokens * 8 / (kWideWarps * 32); ++i) {
        const int piece = i * kWideWarps * 32 + static_cast<int>(threadIdx.x);
        const int token = piece >> 3;
        const bool valid = first_token + token < task.num_tokens;
        const int64_t row = valid ? first_token + token : 0;
        copy_async16(inputs_of(step, token) + (piece & 7) * 16,
                     source + row * task.input_stride + step * kStepInputs + (piece & 7) * 8, valid);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int step = 0; step < kWideStages - 1; ++step) stage(step);

  float sum[2][kGroups][4];
  float acc[2][kGroups][4] = {};
  int split = 0;
  int boundary = part.num_steps / part.num_splits;
  for (int step = 0; step < part.num_steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kWideStages - 2) : "memory");
    __syncthreads();
    stage(step + kWideStages - 1);
    typename Format::Raw raw[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      raw[t] = load_staged<Format>(weights_of(step) + t * kStageBytes<Format>, lane);
    }
#pragma unroll
    for (int pass = 0; pass < Format::kPasses; ++pass) {
      uint32_t a[2][4][4];
      Format::unpack(raw[0], lane, pass, a[0]);
      Format::unpack(raw[1], lane, pass, a[1]);
#pragma unroll
      for (int g = 0; g < kGroups; g += 2) {
        LaneInputs x[2];
        x[0] = load_inputs(reinterpret_cast<const __half*>(inputs_of(step, g * 8 + r) + q * 32));
        x[1] = load_inputs(reinterpret_cast<const __half*>(inputs_of(step, g * 8 + 8 + r) + q * 32));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            mma(acc[e & 1][g + e / 2], a[e & 1][j], x[e / 2].pair[2 * j], x[e / 2].pair[2 * j + 1]);
          }
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
  auto shared = static_cast<size_t>(narrow_ring_bytes<Format, kTiles, kGroups>(part.num_splits));
  if (kInput != Input::kHalf) {
    shared += static_cast<size_t>(task.num_tokens * (part.num_steps * kStepInputs + kStagePad)) * sizeof(__half);
  }
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
    allow_shared(wide_kernel<Format>, wide_shared_bytes<Format>());
    launch(wide_kernel<Format>, grid, dim3(kWideWarps * 32), wide_shared_bytes<Format>(), task.stream, task);
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
    const auto raw = Format::template load<Space::kDevice>(bytes + static_cast<int64_t>(step) * Format::kStepBytes,
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
