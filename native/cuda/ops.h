// The operations between the matrix products, each in the file of its name.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tw::cuda {

// --- rms_norm.cu ---

struct NormTask {
  const float* input;    // [rows, input_stride]
  const int32_t* rows;   // row of each token, or null
  int64_t input_stride;  // multiple of 64
  int32_t num_tokens;
  int32_t square_stride;  // multiple of 16, at least input_stride / 16
  float inverse_size;
  float epsilon;
  float gain_factor;
  const float* gain;     // [input_stride]
  __half* out;           // [tokens, input_stride]
  bool tiled;            // `out` is in the layout for many tokens (activations.h)
  float* token_factors;  // [tokens]
  cudaStream_t stream;
};
void normalize(const NormTask& task);

// out = input · 2^e with e chosen by the row's largest magnitude; token_factors gets 2^-e. `tiled`: `out` is in the
// layout for many tokens (activations.h).
void scale_to_half(const float* input, int64_t stride, int32_t num_tokens, bool tiled, __half* out,
                   float* token_factors, cudaStream_t stream);

// --- rope.cu, attention_decode.cu, attention_prefill.cu ---

// Where one row of a step stands. Rows with position -1 belong to no sequence.
struct StepRows {
  const int32_t* positions;      // [rows]
  const int32_t* table_offsets;  // [rows], into tables
  const int32_t* tables;         // block ids of all sequences
};

// One layer's heads and cache. A block of the pool is [layers][keys, values][kv heads][16 tokens][head_dim] FP16.
struct AttentionTask {
  StepRows step;
  int32_t num_rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  bool interleaved;
  int32_t rope_dims;
  const float* rope_cos;  // [positions, rope_dims / 2]
  const float* rope_sin;
  const float* qkv;  // [rows, qkv_stride], before rotation
  int64_t qkv_stride;
  __half* cache;               // of this layer in block 0
  int64_t block_stride;        // FP16 values between blocks
  int32_t max_splits;          // of the rows of this launch
  bool append;                 // attention also writes the rows' own keys and values: each sequence has one row
  float* partials;             // [rows, heads, max_splits, head_dim + 2]
  int32_t* arrivals;           // [rows, heads], zero between launches
  int32_t first_row;           // for decode: of num_rows
  __half* queries;             // [rows, query_stride]: rope_append() leaves the scaled queries for attend_prefill()
  int64_t query_stride;        // multiple of 8
  const int32_t* single_rows;  // for decode: the rows, from first_row on, or null: row i itself
  const int2* row_tiles;       // for prefill: first row and number of rows, consecutive tokens of one sequence
  int32_t num_row_tiles;
  __half* out;  // [rows of the step, out_stride]
  int64_t out_stride;
  bool tiled_out;  // in the layout for many tokens (activations.h)
  cudaStream_t stream;
};

// Keys a split holds; splits begin at its multiples.
constexpr int kSplitKeys = 128;

bool supports_head_dim(int32_t head_dim);
// Writes the rows' keys and values to the cache, and their queries to `queries`.
void rope_append(const AttentionTask& task);
// num_rows rows, each by itself and its splits side by side.
void attend_decode(const AttentionTask& task);
// All row_tiles, of at most prefill_tile_rows() rows each.
void attend_prefill(const AttentionTask& task);
int32_t prefill_tile_rows(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim);

}  // namespace tw::cuda
