// Declares one instruction set's kernels, so that kernels.cpp can gather what each op's file defines.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace tw::cpu::TW_ISA {

void quantize_rows(const Activations& rows, int64_t begin, int64_t end);
// One row of values from anywhere.
void quantize_row(const float* x, const Activations& out, int64_t row);
// Up to kBlocksTogether blocks of values from anywhere, one after another, as blocks `first`, `first` + `step` … of all
// rows' blocks.
constexpr int64_t kBlocksTogether = 16;
void quantize_blocks(const float* x, int64_t count, const Activations& out, int64_t first, int64_t step);
void rms_norm(const float* x, int64_t x_stride, const float* gain, float eps, const Activations& out, int64_t begin,
              int64_t end, NormOutput output);
void matmul(const MatmulTask& task, int64_t pair_begin, int64_t pair_end, int64_t row_begin, int64_t row_end,
            uint8_t* scratch);
void dequantize_row(const MatrixPart& part, int64_t row, int64_t num_cols, float* out);
void rope_heads(float* heads, int32_t num_heads, int32_t head_dim, int32_t rope_dims, bool interleaved,
                const float* cos, const float* sin, float scale);
void store_kv(const KvLayer& layer, int32_t block, int32_t slot, int32_t kv_head, const float* key, const float* value);
void attend_split(const KvLayer& layer, const AttentionTile& tile, int32_t split, AttentionState* states,
                  float* scratch);
void combine_splits(AttentionState* total, const AttentionState& part, int32_t head_dim);
void finish_attention(const AttentionState& state, int32_t head_dim, float* out);
float max_value(const float* x, int64_t n, bool* finite);
void exp_runs(const float* x, int64_t n, float max, float scale, float* e, float* run_sums);

}  // namespace tw::cpu::TW_ISA
