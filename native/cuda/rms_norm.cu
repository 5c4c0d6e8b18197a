// Inputs of the kernels for many tokens: normalised or scaled rows as FP16. One block a token; reads 4 and writes 2
// bytes a value. The results are the bits that the kernels for few tokens compute on the fly: sums of squares run over
// 16 values in a tree, then over those sums as inverse_rms() does.
//
// A thread owns units: the four pairs of a row's 64 values that are one chunk of the layout for many tokens
// (activations.h). It keeps their values from the first pass over the row to the second, so a row is read once; what no
// thread's registers hold is read twice.
#include "cuda/activations.h"
#include "cuda/launch.h"
#include "cuda/numerics.cuh"
#include "cuda/ops.h"

namespace tw::cuda {
namespace {

constexpr int kUnitPairs = 4;

// Unit u: pairs u % 8 + 8j of the 64 values that begin at 64 (u / 8).
struct Unit {
  float2 pair[kUnitPairs];
};
__device__ __forceinline__ int first_value(int unit) { return unit / 8 * 64 + unit % 8 * 2; }
__device__ __forceinline__ Unit load_unit(const float* row, int unit) {
  Unit values;
#pragma unroll
  for (int j = 0; j < kUnitPairs; ++j) {
    values.pair[j] = *reinterpret_cast<const float2*>(row + first_value(unit) + 16 * j);
  }
  return values;
}
__device__ __forceinline__ Unit load_constant_unit(const float* row, int unit) {
  Unit values;
#pragma unroll
  for (int j = 0; j < kUnitPairs; ++j) {
    values.pair[j] = __ldg(reinterpret_cast<const float2*>(row + first_value(unit) + 16 * j));
  }
  return values;
}

__device__ __forceinline__ void store_unit(__half* out, bool tiled, int64_t token, int unit, int64_t stride,
                                           const uint32_t (&packed)[kUnitPairs]) {
  __half* const to = out + pair_offset(tiled, token, first_value(unit), stride);
  if (tiled) {
    *reinterpret_cast<uint4*>(to) = {packed[0], packed[1], packed[2], packed[3]};
    return;
  }
#pragma unroll
  for (int j = 0; j < kUnitPairs; ++j) *reinterpret_cast<uint32_t*>(to + 16 * j) = packed[j];
}

// The sums of squares of the four times 16 values that eight consecutive lanes hold as units: a tree over values 8, 4,
// 2 and 1 apart. The lanes share the work: each ends with the sum of 16 values j = lane % 8 / 2.
__device__ __forceinline__ float square_sum(const Unit& values, int lane) {
  const auto add = [](float2 a, float2 b) { return float2{__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; };
  const auto from = [](float2 v, int distance) {
    return float2{__shfl_xor_sync(~0u, v.x, distance), __shfl_xor_sync(~0u, v.y, distance)};
  };
  float2 square[kUnitPairs];
#pragma unroll
  for (int j = 0; j < kUnitPairs; ++j) {
    const float2 v = values.pair[j];
    square[j] = {__fmul_rn(v.x, v.x), __fmul_rn(v.y, v.y)};
  }
  const bool later_two = (lane & 4) != 0;
  float2 two[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    two[j] = add(later_two ? square[2 + j] : square[j], from(later_two ? square[j] : square[2 + j], 4));
  }
  const bool later = (lane & 2) != 0;
  float2 one = add(later ? two[1] : two[0], from(later ? two[0] : two[1], 2));
  one = add(one, from(one, 1));
  return __fadd_rn(one.x, one.y);
}

template <int kThreads, int kUnits>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const __grid_constant__ NormTask task) {
  extern __shared__ __align__(16) float sums[];  // [stride of sums]
  __shared__ float row_factor;
  release_successor();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token = blockIdx.x;
  // Gains are weights, and a step's inputs are in place before its first kernel begins.
  const int64_t row = task.rows == nullptr ? token : task.rows[token];
  const int num_units = static_cast<int>(task.input_stride / 8);
  Unit gain[kUnits], held[kUnits] = {};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = thread + i * kThreads;
    if (unit < num_units) gain[i] = load_constant_unit(task.gain, unit);
  }
  for (int i = num_units / 2 + thread; i < task.square_stride; i += kThreads) sums[i] = 0;
  await_predecessor();

  const float* const x = task.input + row * task.input_stride;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = thread + i * kThreads;
    if (unit < num_units) held[i] = load_unit(x, unit);
  }
  // Whole warps go on together: the lanes beyond the row give sums that nobody keeps.
  const auto keep_sum = [&](const Unit& values, int unit) {
    const float sum = square_sum(values, thread & 31);
    if (unit < num_units && thread % 2 == 0) sums[unit / 2] = sum;
  };
#pragma unroll
  for (int i = 0; i < kUnits; ++i) keep_sum(held[i], thread + i * kThreads);
  for (int unit = thread + kUnits * kThreads; unit - thread < num_units; unit += kThreads) {
    keep_sum(unit < num_units ? load_unit(x, unit) : Unit{}, unit);
  }
  __syncthreads();
  if (thread < 32) {
    const float inverse = inverse_rms(sums, task.square_stride, thread & 3, task.inverse_size, task.epsilon);
    if (thread == 0) {
      row_factor = __fmul_rn(inverse, task.gain_factor);
      task.token_factors[token] = __fdiv_rn(1.0f, task.gain_factor);
    }
  }
  __syncthreads();
  const float factor = row_factor;
  const auto store = [&](const Unit& v, const Unit& g, int unit) {
    uint32_t packed[kUnitPairs];
#pragma unroll
    for (int j = 0; j < kUnitPairs; ++j) {
      packed[j] = pack_half2(__fmul_rn(__fmul_rn(v.pair[j].x, factor), g.pair[j].x),
                             __fmul_rn(__fmul_rn(v.pair[j].y, factor), g.pair[j].y));
    }
    store_unit(task.out, task.tiled, token, unit, task.input_stride, packed);
  };
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = thread + i * kThreads;
    if (unit < num_units) store(held[i], gain[i], unit);
  }
  for (int unit = thread + kUnits * kThreads; unit < num_units; unit += kThreads) {
    store(load_unit(x, unit), load_constant_unit(task.gain, unit), unit);
  }
}

template <int kThreads, int kUnits>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* input, int64_t stride, bool tiled, __half* out, float* token_factors) {
  __shared__ uint32_t largest[kThreads / 32];
  release_successor();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token = blockIdx.x;
  const int num_units = static_cast<int>(stride / 8);
  const float* const x = input + token * stride;
  await_predecessor();

  Unit held[kUnits] = {};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = thread + i * kThreads;
    if (unit < num_units) held[i] = load_unit(x, unit);
  }
  uint32_t magnitude = 0;
  const auto include = [&](const Unit& values) {
#pragma unroll
    for (int j = 0; j < kUnitPairs; ++j) {
      magnitude = max(magnitude, max(__float_as_uint(values.pair[j].x) & 0x7fffffffu,
                                     __float_as_uint(values.pair[j].y) & 0x7fffffffu));
    }
  };
#pragma unroll
  for (int i = 0; i < kUnits; ++i) include(held[i]);
  for (int unit = thread + kUnits * kThreads; unit < num_units; unit += kThreads) include(load_unit(x, unit));
  magnitude = __reduce_max_sync(~0u, magnitude);
  if (thread % 32 == 0) largest[thread / 32] = magnitude;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) magnitude = max(magnitude, largest[i]);
  float inverse;
  const float factor = range_factor(magnitude, &inverse);
  const auto store = [&](const Unit& v, int unit) {
    uint32_t packed[kUnitPairs];
#pragma unroll
    for (int j = 0; j < kUnitPairs; ++j) {
      packed[j] = pack_half2(__fmul_rn(v.pair[j].x, factor), __fmul_rn(v.pair[j].y, factor));
    }
    store_unit(out, tiled, token, unit, stride, packed);
  };
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = thread + i * kThreads;
    if (unit < num_units) store(held[i], unit);
  }
  for (int unit = thread + kUnits * kThreads; unit < num_units; unit += kThreads) store(load_unit(x, unit), unit);
  if (thread == 0) token_factors[token] = inverse;
}

// Calls `run` with the threads of a block and the units that one holds, for rows of `stride` values. With 512 threads
// at most, 256 rows are at work at once on half as many processors; they hold up to 16,384 values.
template <int kThreads, int kUnits>
struct RowShape {
  static constexpr int kBlock = kThreads;
  static constexpr int kHeld = kUnits;
};
template <class Run>
void with_shape(int64_t stride, const Run& run) {
  const int64_t units = stride / 8;
  if (units <= 128) return run(RowShape<128, 1>{});
  if (units <= 256) return run(RowShape<256, 1>{});
  if (units <= 512) return run(RowShape<512, 1>{});
  if (units <= 1024) return run(RowShape<512, 2>{});
  return run(RowShape<512, 4>{});
}

}  // namespace

void normalize(const NormTask& task) {
  with_shape(task.input_stride, [&](auto shape) {
    using Shape = decltype(shape);
    launch(normalize_kernel<Shape::kBlock, Shape::kHeld>, dim3(static_cast<unsigned>(task.num_tokens)),
           dim3(Shape::kBlock), static_cast<size_t>(task.square_stride) * sizeof(float), task.stream, task);
  });
}

void scale_to_half(const float* input, int64_t stride, int32_t num_tokens, bool tiled, __half* out,
                   float* token_factors, cudaStream_t stream) {
  with_shape(stride, [&](auto shape) {
    using Shape = decltype(shape);
    launch(scale_kernel<Shape::kBlock, Shape::kHeld>, dim3(static_cast<unsigned>(num_tokens)), dim3(Shape::kBlock), 0,
           stream, input, stride, tiled, out, token_factors);
  });
}

}  // namespace tw::cuda
