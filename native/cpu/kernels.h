// The kernels of one instruction set, as functions over raw ranges. The backend decides who computes which range.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "cpu/packed_matrix.h"

namespace tw::cpu {

// Rows of activations as a projection reads them. Quantised rows are split in blocks of kBlock values with one scale
// each: value ≈ scale · code with codes of 16 bits, so that products with weight codes are exact integers and the
// rounding (1/65024 of the block's largest value) is far below that of the weights.
struct Activations {
  int64_t num_cols = 0;
  float* values = nullptr;       // [rows, num_cols]
  int16_t* codes = nullptr;      // [rows, num_cols], every four of them in the order 0, 2, 1, 3
  float* scales = nullptr;       // [rows, num_cols / kBlock]
  int32_t* code_sums = nullptr;  // [rows, num_cols / kBlock, 2]: Σ of the block's codes, Σ of its first 16
  float* sums = nullptr;         // [rows, num_cols / kBlock]: scale · Σ of the codes

  int64_t num_blocks() const { return num_cols / kBlock; }
};

enum class Epilogue {
  kStore,    // out = W·x + bias
  kAdd,      // out += W·x + bias
  kSiluMul,  // out = silu(gate) · up, for gate_up matrices
  // quantized_out = silu(gate) · up, for quantised gate_up matrices. Pairs come in twos from an even one on, since two
  // make a block.
  kSiluMulQuantize,
};

// What a normalisation leaves in its Activations.
enum class NormOutput { kValues, kCodes, kBoth };

struct MatmulTask {
  const PackedMatrix* matrix = nullptr;
  const float* bias = nullptr;  // [matrix->num_rows] or null
  Activations input;
  float* out = nullptr;  // [rows, out_stride]
  int64_t out_stride = 0;
  Epilogue epilogue = Epilogue::kStore;
  Activations quantized_out;  // of kSiluMulQuantize; its values are left alone
};

// The paged cache of one layer. A block holds, for each kv head, keys [head_dim][kBlockTokens] and then values
// [kBlockTokens][head_dim], FP16: sixteen keys of one dimension, and one token's values, are each contiguous.
struct KvLayer {
  uint16_t* blocks = nullptr;
  int64_t block_stride = 0;  // values from one block to the next
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;

  uint16_t* keys(int32_t block, int32_t kv_head) const {
    return blocks + block * block_stride + int64_t{2} * kv_head * head_dim * kBlockTokens;
  }
  uint16_t* values(int32_t block, int32_t kv_head) const {
    return keys(block, kv_head) + int64_t{head_dim} * kBlockTokens;
  }
};

// Keys are attended to in splits of this many positions, always cut at its multiples; the splits' partial results are
// combined in order. This fixes the order of every sum whatever the chunking, the batch or the threads.
constexpr int32_t kSplitTokens = 256;

// Up to kAttentionRows query vectors that share a sequence and a kv head.
constexpr int32_t kAttentionRows = 96;

// Positions whose keys or values are widened to floats at a time, for a tile of more rows than fit in registers.
constexpr int32_t kChunkTokens = 64;

// A query vector's running result over splits: output = values / sum.
struct AttentionState {
  float* values = nullptr;  // [head_dim], Σ e^(score - max) · v
  float max = 0;
  float sum = 0;
};

struct AttentionTile {
  const int32_t* block_table = nullptr;
  int32_t kv_head = 0;
  int32_t num_rows = 0;
  const float* queries[kAttentionRows];  // [head_dim] each, already scaled by 1/√head_dim
  int32_t num_keys[kAttentionRows];      // keys the row sees: its position + 1
};

struct Kernels {
  Isa isa;
  // Rows [begin, end) of input.values → codes, scales, code_sums, sums.
  void (*quantize_rows)(const Activations& rows, int64_t begin, int64_t end);
  // x[r] / rms(x[r]) · gain as values, codes or both. Of values that are not asked for, those of row `begin` are
  // spoilt.
  void (*rms_norm)(const float* x, int64_t x_stride, const float* gain, float eps, const Activations& out,
                   int64_t begin, int64_t end, NormOutput output);
  // Pairs [pair_begin, pair_end) × rows [row_begin, row_end). `scratch` holds kMatmulScratchBytes.
  void (*matmul)(const MatmulTask& task, int64_t pair_begin, int64_t pair_end, int64_t row_begin, int64_t row_end,
                 uint8_t* scratch);
  // out[0 … num_cols) = row `row` of a part of a matrix that is not gate_up.
  void (*dequantize_row)(const MatrixPart& part, int64_t row, int64_t num_cols, float* out);
  // Rotates a token's heads in place: the first `rope_dims` values of each, with cos/sin [rope_dims / 2]. All values of
  // a head are then multiplied by `scale`.
  void (*rope_heads)(float* heads, int32_t num_heads, int32_t head_dim, int32_t rope_dims, bool interleaved,
                     const float* cos, const float* sin, float scale);
  // Writes one token's key and value of one head.
  void (*store_kv)(const KvLayer& layer, int32_t block, int32_t slot, int32_t kv_head, const float* key,
                   const float* value);
  // Partial attention over the keys of split `split` into states[0 … num_rows); a row with no key there gets sum 0.
  // `scratch` holds attention_scratch_floats(head_dim).
  void (*attend_split)(const KvLayer& layer, const AttentionTile& tile, int32_t split, AttentionState* states,
                       float* scratch);
  // Adds a later split's partial result to `total`; total.sum = 0 means empty.
  void (*combine_splits)(AttentionState* total, const AttentionState& part, int32_t head_dim);
  // out = state.values / state.sum
  void (*finish_attention)(const AttentionState& state, int32_t head_dim, float* out);
  // The largest of x[0 … n); *finite tells whether all are finite.
  float (*max_value)(const float* x, int64_t n, bool* finite);
  // e[i] = e^((x[i] - max) · scale), and the sum of each run of kExpRun of them. `e` may be null, or x itself.
  void (*exp_runs)(const float* x, int64_t n, float max, float scale, float* e, float* run_sums);
};

// Values that exp_runs() sums at a time.
constexpr int64_t kExpRun = 256;

constexpr int64_t kMatmulScratchBytes = 69888;
// Scores of a tile's rows, and a chunk of keys or values as floats.
constexpr int64_t attention_scratch_floats(int32_t head_dim) {
  return int64_t{kAttentionRows} * kSplitTokens + int64_t{kChunkTokens} * head_dim;
}

const Kernels& kernels_for(Isa isa);

namespace portable {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace tw::cpu
