// Matrix products for up to 64 tokens: a block owns kTiles tiles of 16 outputs and up to 8 · kGroups tokens; each of
// its warps sums one split of the inputs, weights going from device memory to registers to the tensor cores, and the
// splits meet in shared memory, where they are added in order. Reads the weights once for each group of tokens.
#pragma once

#include <type_traits>

#include "cuda/formats.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/numerics.cuh"

namespace tw::cuda {

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
  static constexpr int kDepth = kBytes <= 72 ? 3 : 2;
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

// The same through a ring in shared memory, up to 6 KiB a warp, so that 16 warps fit into any device's: for more
// tokens, whose sums fill the registers.
template <class Format, int kTiles>
class RingPipe {
 public:
  static constexpr int kStep = kTiles * kStageBytes<Format>;
  static constexpr int kFitting = 6144 / kStep;
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
// kBatch pairs of values a thread at a time.
template <Input kInput, int kBatch>
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
      // Batches, so that a batch's values are on their way together.
      for (int first = kAhead; column(first) < width(); first += kBatch) {
        float2 x[kBatch], gain[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int k = column(first + i);
          if (k >= width()) break;
          x[i] = *reinterpret_cast<const float2*>(row + k);
          if constexpr (kInput == Input::kNormed) gain[i] = __ldg(reinterpret_cast<const float2*>(task_.gain + k));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int k = column(first + i);
          if (k < width()) store(staged + token * stride + k, x[i], gain[i], token_factor);
        }
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
  // Whether the weights on their way leave registers for more inputs at a time.
  constexpr bool kSmall = Pipe::kSharedBytes > 0 || sizeof(typename Format::Raw) <= 40;
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
  InputStage<kInput, kSmall ? 8 : 2> stage(task);
  release_successor(task.beside);
  await_predecessor(task.beside);

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
    // From device memory, the inputs of some steps are on their way together; staged ones are near.
    constexpr int kBatch = kInput == Input::kHalf && kSmall ? Pipe::kUnroll : 1;
    LaneInputs x_of[kBatch][kGroups];
    const auto load = [&](int d, int step) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        x_of[d][g] = {};
        if (valid[g] && step < end) x_of[d][g] = load_inputs(lane_inputs + g * 8 * input_stride + step * kStepInputs);
      }
    };
    if constexpr (kBatch > 1) {
#pragma unroll
      for (int d = 0; d < kBatch; ++d) load(d, base + d);
    }
#pragma unroll
    for (int d = 0; d < Pipe::kUnroll; ++d) {
      const int step = base + d;
      if (step >= end) break;
      if constexpr (kBatch == 1) load(0, step);
      const auto& x = x_of[kBatch == 1 ? 0 : d];
      pipe.await();
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const auto raw = pipe.get(d, step, t);
#pragma unroll
        for (int pass = 0; pass < Format::kPasses; ++pass) {
          uint32_t a[4][4];
          unpack_step<Format>(raw, lane, pass, a);
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
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < part.num_splits; ++s) {
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
  end_after_predecessor(task.beside);
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

}  // namespace tw::cuda
