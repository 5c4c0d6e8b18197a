// Matrix products of activations with packed weights, for any number of rows, every row with the same bits.
//
// y[t][n] = Σ_k W[n][k] · x[t][k], with the inputs cut in part.num_splits pieces at multiples of 64 that depend on the
// weight's shape and format. A piece is summed by consecutive mma.m16n8k16 (FP16 in, FP32 accumulate) in order of k;
// the pieces are added in order. Which kernel runs, and how many tokens share it, changes neither.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/packed_matrix.h"

namespace tw::cuda {

enum class Input : int32_t {
  kHalf,    // FP16 [tokens, stride], times token_factors if not null
  kNormed,  // FP32 [rows, stride], normalised on the fly with `gain` and the rows' partial sums of squares
  kScaled,  // FP32 [tokens, stride], brought into FP16's range by the row's largest magnitude
};

enum class Epilogue : int32_t {
  kStore,   // out = y + bias
  kAdd,     // out += y; sums of squares of each 16 outputs go to `square_sums`
  kGateUp,  // out = silu(gate) · up; the row's largest magnitude goes to `magnitudes`
};

// The kernels for many tokens: for any device (matmul_wide.cuh) or Hopper (matmul_hopper.cuh). Those of matmul_tall.cuh
// have 32, 64 or 128 tokens a tile of outputs; tiles are dealt out whole, by pieces of the inputs, or to pairs of
// blocks.
enum class Kernel : int32_t {
  kAuto,
  kWide,
  kFlat,
  kTall32,
  kTall64,
  kTall128,
  kTall32Pieces,
  kTall64Pieces,
  kTall128Pairs
};

// Tokens whose input may be kNormed or kScaled.
constexpr int kFusedTokens = 8;

// Device memory in which blocks meet that share a tile of outputs.
struct MatmulScratch {
  float* sums;
  int64_t num_floats;
  int32_t* arrivals;  // zero between products
  int32_t num_arrivals;
};
// What the products of the models that we know need; with less, tiles are dealt out whole.
constexpr int64_t kScratchBytes = int64_t{80} << 20;
constexpr int32_t kScratchArrivals = 16384;

struct MatmulTask {
  PackedPart part;
  Input input_kind;
  Epilogue epilogue;
  int32_t num_tokens;

  const void* input;
  int64_t input_stride;            // elements; the inputs are zero up to a multiple of 64
  const int32_t* input_rows;       // row of each token, or null: token t reads row t
  const float* gain;               // [input_stride]
  const float* input_square_sums;  // [rows, square_stride]
  int32_t square_stride;           // multiple of 16, zero padded
  float inverse_size;              // 1 / width of the norm
  float epsilon;
  float gain_factor;                 // power of two that keeps normalised values inside FP16
  const float* token_factors;        // [tokens] or null
  const uint32_t* input_magnitudes;  // [tokens], bits of floats

  const float* bias;  // [outputs of the matrix] or null
  float* out;         // [tokens, out_stride]
  int64_t out_stride;
  float* square_sums;  // [tokens, square_stride_out]
  int32_t square_stride_out;
  uint32_t* magnitudes;           // [tokens], bits of floats
  uint32_t* magnitudes_to_clear;  // [kFusedTokens] or null

  Beside beside;  // which products launched before and after this one run at the same time
  bool tiled;     // the inputs are in the layout for many tokens (activations.h); else in rows. Needs kHalf
  Kernel kernel;  // one for many tokens; tests name it
  MatmulScratch scratch;
  cudaStream_t stream;
};

// Launches the kernel for the inputs' layout, the task's size and the device.
void matmul(const MatmulTask& task);

// Whether a product of this many tokens takes its inputs in the layout for many (activations.h).
bool takes_tiles(const PackedPart& part, int32_t num_tokens);

// Whether the current device runs, and this build has, code for sm_90a.
bool has_hopper();

// One format's kernels. Defined in matmul_instance.cu.in, one file a format.
struct FormatKernels {
  DType dtype;
  int32_t step_bytes;
  int32_t super_bytes;
  void (*pack)(const PackTask& task);
  void (*matmul)(const MatmulTask& task);
  // out[t] = row token_ids[t] of the parts' matrix, for ids inside this part
  void (*embed)(const PackedPart& part, const int32_t* token_ids, int32_t num_tokens, float* out, int64_t out_stride,
                float* square_sums, int32_t square_stride, cudaStream_t stream);
};

const FormatKernels& kernels_for(DType dtype);

}  // namespace tw::cuda
