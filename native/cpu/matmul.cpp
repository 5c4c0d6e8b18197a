// Projections: out[row][n] = Σ_k W[n][k] · x[row][k] over packed weights, for any number of rows.
//
// Reduction order, the same for every row count, tile shape and instruction set:
//   quantised formats: blocks of 32 inputs in order. Within a block Σ code_w · code_x is an exact integer; then
//     acc = fma(float(Σ) · scale_x, scale_w, acc), and for formats with a minimum acc = fma(min_w, sum_x, acc).
//     Where a scale covers 16 inputs (Q6_K), the same for the block's first half and then its second.
//   float formats: inputs in order, acc = fma(w, x, acc).
// Few rows read the packed tiles directly; one is bound by their bytes. More rows unpack a pair of tiles once into
// scratch (cache resident) and are bound by the integer dot products of 16-bit pairs.
#include "cpu/ops.h"
#include "cpu/tiles.h"

namespace tw::cpu::TW_ISA {
namespace {

// Register tile of the many-row path: rows × tiles; and the rows that read tiles as they are packed. 16 vector
// registers hold less than 32. Accumulators live in memory, which costs a load and a store a block of 32 inputs;
// registers hold the block's integer sums.
#if defined(TW_ISA_AVX512)
constexpr int kMicroRows = 8;
constexpr int kMicroTiles = 2;
constexpr int kPackedRows = 6;
#else
constexpr int kMicroRows = 6;
constexpr int kMicroTiles = 1;
constexpr int kPackedRows = 1;
#endif
// Of more rows than kPackedRows, in passes of at most kMicroRows that are evenly split, none has fewer.
constexpr int kFewestMicroRows = kPackedRows + 1 < (kMicroRows + 1) / 2 ? kPackedRows + 1 : (kMicroRows + 1) / 2;

// --- Quantised formats. ---

// Σ (code_w - zero) · code_x from Σ code_w · code_x, for a block or half of one.
template <class Tile>
I32x16 subtract_zero(I32x16 codes, const Activations& x, int64_t index, int half) {
  if constexpr (Tile::kZero == 0) return codes;
  int32_t code_sum = x.code_sums[2 * index];
  if constexpr (Tile::kHalves == 2) {
    const int32_t first = x.code_sums[2 * index + 1];
    code_sum = half == 0 ? first : code_sum - first;
  }
  return codes - I32x16::broadcast(Tile::kZero * code_sum);
}

// Adds a block, or half of one, to an output's accumulator: the step that fixes the arithmetic of all quantised paths.
template <class Tile>
F32x16 accumulate(F32x16 acc, I32x16 codes, const Activations& x, int64_t index, F32x16 scale, F32x16 min) {
  acc = fma(to_float(codes) * F32x16::broadcast(x.scales[index]), scale, acc);
  if constexpr (Tile::kHasMin) acc = fma(min, F32x16::broadcast(x.sums[index]), acc);
  return acc;
}

template <class Tile>
F32x16 min_of(const uint8_t* tile, int64_t b) {
  if constexpr (Tile::kHasMin) return Tile::min(tile, b);
  return F32x16::zero();
}

// How far ahead of the tile that is computed memory is asked for. Tiles lie one after another and a thread reads them
// in that order, so this keeps several lines on their way, also across the ends of short rows.
constexpr int64_t kPrefetchBytes = 8192;

// kRows rows × one tile → out[kRows][kPairRows], 16 of each.
template <class Tile, int kRows>
void rows_by_packed_tile(const uint8_t* tile, int64_t tile_bytes, const Activations& x, int64_t row, float* out) {
  const int64_t num_blocks = x.num_blocks();
  const int64_t block_bytes = tile_bytes / num_blocks;
  F32x16 acc[kRows];
  for (F32x16& a : acc) a = F32x16::zero();
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t line = 0; line < block_bytes; line += 64) prefetch(tile + b * block_bytes + line + kPrefetchBytes);
    const int16_t* values = x.codes + row * x.num_cols + b * kBlock;
    I32x16 first[kRows];
    I32x16 second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = second[r] = I32x16::zero();
#pragma GCC unroll 4
    for (int chunk = 0; chunk < 4; ++chunk) {
      const CodePair w = Tile::codes(Tile::block(tile, b), chunk);
      const I16x32 codes[4] = {even_bytes(w.first), odd_bytes(w.first), even_bytes(w.second), odd_bytes(w.second)};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int16_t* v = values + r * x.num_cols + 4 * chunk;
        first[r] = dot(first[r], codes[0], X2::load(v));
        first[r] = dot(first[r], codes[1], X2::load(v + 2));
        second[r] = dot(second[r], codes[2], X2::load(v + 16));
        second[r] = dot(second[r], codes[3], X2::load(v + 18));
      }
    }
    const F32x16 min = min_of<Tile>(tile, b);
#pragma GCC unroll 2
    for (int half = 0; half < Tile::kHalves; ++half) {
      const F32x16 scale = Tile::scale(tile, b, half);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t index = (row + r) * num_blocks + b;
        const I32x16 sums = Tile::kHalves == 1 ? first[r] + second[r] : half == 0 ? first[r] : second[r];
        acc[r] = accumulate<Tile>(acc[r], subtract_zero<Tile>(sums, x, index, half), x, index, scale, min);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) acc[r].store(out + r * kPairRows);
}

// The same for `rows` (1 … kMost) rows and both tiles of a pair.
template <class Tile, int kMost>
void rows_by_packed_pair(int64_t rows, const uint8_t* tiles, int64_t tile_bytes, const Activations& x, int64_t row,
                         float* out) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return rows_by_packed_pair<Tile, kMost - 1>(rows, tiles, tile_bytes, x, row, out);
  }
  rows_by_packed_tile<Tile, kMost>(tiles, tile_bytes, x, row, out);
  rows_by_packed_tile<Tile, kMost>(tiles + tile_bytes, tile_bytes, x, row, out + kTileRows);
}

// --- Many rows: tiles unpacked to one form, whatever the format. ---

// One unpacked block of a tile: codes less their zero in 16 groups (group g = the inputs that Activations::codes holds
// at 2g and 2g+1, for 16 rows), then scale and minimum.
struct UnpackedBlock {
  int16_t codes[16][32];
  float scale[16];
  float second[16];  // the minimum, or the scale of the second half
};

template <class Tile>
void unpack_block(const uint8_t* tile, int64_t b, UnpackedBlock* out) {
  for (int chunk = 0; chunk < 4; ++chunk) {
    const CodePair w = Tile::codes(Tile::block(tile, b), chunk);
    const auto less_zero = [](I16x32 codes) {
      if constexpr (Tile::kZero == 0) return codes;
      return codes - I16x32::broadcast(Tile::kZero);
    };
    less_zero(even_bytes(w.first)).store(out->codes[2 * chunk]);
    less_zero(odd_bytes(w.first)).store(out->codes[2 * chunk + 1]);
    less_zero(even_bytes(w.second)).store(out->codes[8 + 2 * chunk]);
    less_zero(odd_bytes(w.second)).store(out->codes[8 + 2 * chunk + 1]);
  }
  Tile::scale(tile, b, 0).store(out->scale);
  if constexpr (Tile::kHalves == 2) Tile::scale(tile, b, 1).store(out->second);
  if constexpr (Tile::kHasMin) Tile::min(tile, b).store(out->second);
}

// What the many-row path works on at a time, so that it stays in the first-level cache: blocks of a pair of tiles, and
// the rows whose accumulators wait meanwhile.
constexpr int64_t kChunkBlocks = 9;
constexpr int64_t kSpanRows = 256;

struct ManyRowScratch {
  UnpackedBlock tiles[2][kChunkBlocks];
  float acc[kSpanRows][kPairRows];
  float products[kSpanRows][kTileRows];
};
static_assert(sizeof(ManyRowScratch) <= kMatmulScratchBytes);

// Asks for the tiles of the next pair a few lines at a time in the course of this pair's arithmetic, which by itself
// leaves memory idle.
struct Lookahead {
  const uint8_t* next;
  int64_t lines_left;
  int64_t lines_a_block;

  void step() {
    const int64_t lines = lines_a_block < lines_left ? lines_a_block : lines_left;
    for (int64_t i = 0; i < lines; ++i) prefetch_l2(next + 64 * i);
    next += 64 * lines;
    lines_left -= lines;
  }
};

// What the first block is added to.
alignas(64) constexpr float kNothing[kMicroRows * kPairRows] = {};

// Adds blocks [begin, end) of kRows rows × kTiles tiles to acc[kRows][kPairRows], tile t at column 16·t; block 0 to
// nothing.
template <class Tile, int kRows, int kTiles>
void rows_by_tiles(const UnpackedBlock (*tiles)[kChunkBlocks], int64_t begin, int64_t end, const Activations& x,
                   int64_t row, float* acc, Lookahead* ahead) {
  constexpr int kGroups = 16 / Tile::kHalves;
  const int64_t num_blocks = x.num_blocks();
  for (int64_t b = begin; b < end; ++b) {
    ahead->step();
    const int16_t* values = x.codes + row * x.num_cols + b * kBlock;
#pragma GCC unroll 2
    for (int half = 0; half < Tile::kHalves; ++half) {
      const float* before = b == 0 && half == 0 ? kNothing : acc;
      I32x16 codes[kRows][kTiles];
      for (auto& r : codes) {
        for (I32x16& c : r) c = I32x16::zero();
      }
#pragma GCC unroll 16
      for (int group = half * kGroups; group < (half + 1) * kGroups; ++group) {
        I16x32 w[kTiles];
        for (int t = 0; t < kTiles; ++t) w[t] = I16x32::load(tiles[t][b - begin].codes[group]);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const X2 value = X2::load(values + r * x.num_cols + 2 * group);
          for (int t = 0; t < kTiles; ++t) codes[r][t] = dot(codes[r][t], w[t], value);
        }
      }
      for (int t = 0; t < kTiles; ++t) {
        const UnpackedBlock& block = tiles[t][b - begin];
        const F32x16 scale = F32x16::load(half == 0 ? block.scale : block.second);
        const F32x16 min = Tile::kHasMin ? F32x16::load(block.second) : F32x16::zero();
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          float* a = acc + r * kPairRows + 16 * t;
          const F32x16 sum = F32x16::load(before + r * kPairRows + 16 * t);
          accumulate<Tile>(sum, codes[r][t], x, (row + r) * num_blocks + b, scale, min).store(a);
        }
      }
    }
  }
}

// The same for `rows` (kFewestMicroRows … kMost) rows and both tiles.
template <class Tile, int kMost>
void some_rows_by_pair(int64_t rows, const UnpackedBlock (*tiles)[kChunkBlocks], int64_t begin, int64_t end,
                       const Activations& x, int64_t row, float* acc, Lookahead* ahead) {
  if constexpr (kMost > kFewestMicroRows) {
    if (rows < kMost) return some_rows_by_pair<Tile, kMost - 1>(rows, tiles, begin, end, x, row, acc, ahead);
  }
  for (int first = 0; first < 2; first += kMicroTiles) {
    rows_by_tiles<Tile, kMost, kMicroTiles>(tiles + first, begin, end, x, row, acc + 16 * first, ahead);
  }
}

// Rows [row_begin, row_end), at most kSpanRows of them, of one pair → scratch->acc.
template <class Tile>
void span_by_pair(const uint8_t* tiles, int64_t tile_stride, const Activations& x, int64_t row_begin, int64_t row_end,
                  ManyRowScratch* scratch) {
  const int64_t num_rows = row_end - row_begin;
  const int64_t num_blocks = x.num_blocks();
  const int64_t num_passes = (num_rows + kMicroRows - 1) / kMicroRows;
  const int64_t num_lines = 2 * tile_stride / 64;
  Lookahead ahead = {tiles + 2 * tile_stride, num_lines, num_lines / (num_passes * (2 / kMicroTiles) * num_blocks) + 1};
  const int64_t num_chunks = (num_blocks + kChunkBlocks - 1) / kChunkBlocks;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t begin = num_blocks * chunk / num_chunks;
    const int64_t end = num_blocks * (chunk + 1) / num_chunks;
    for (int t = 0; t < 2; ++t) {
      for (int64_t b = begin; b < end; ++b) {
        unpack_block<Tile>(tiles + t * tile_stride, b, &scratch->tiles[t][b - begin]);
      }
    }
    // Evenly split: a pass over one or two rows wastes most of its loads.
    int64_t row = 0;
    for (int64_t pass = num_passes; pass > 0; --pass) {
      const int64_t rows = (num_rows - row + pass - 1) / pass;
      some_rows_by_pair<Tile, kMicroRows>(rows, scratch->tiles, begin, end, x, row_begin + row, scratch->acc[row],
                                          &ahead);
      row += rows;
    }
  }
}

// --- Float formats. ---

struct TileF32 {
  static constexpr int64_t kBytes = 64;
  static F32x16 load(const uint8_t* p) { return F32x16::load(reinterpret_cast<const float*>(p)); }
};
struct TileF16 {
  static constexpr int64_t kBytes = 32;
  static F32x16 load(const uint8_t* p) { return F32x16::load_f16(reinterpret_cast<const uint16_t*>(p)); }
};
struct TileBF16 {
  static constexpr int64_t kBytes = 32;
  static F32x16 load(const uint8_t* p) { return F32x16::load_bf16(reinterpret_cast<const uint16_t*>(p)); }
};

// kRows rows × kTiles consecutive tiles of a float format → out[kRows][out_stride].
template <class Tile, int kRows, int kTiles>
void float_rows_by_tiles(const uint8_t* tiles, int64_t stride, const Activations& x, int64_t row, float* out,
                         int64_t out_stride) {
  F32x16 acc[kRows][kTiles];
  for (auto& r : acc) {
    for (F32x16& a : r) a = F32x16::zero();
  }
  const float* values = x.values + row * x.num_cols;
  for (int64_t k = 0; k < x.num_cols; ++k) {
    F32x16 w[kTiles];
    for (int t = 0; t < kTiles; ++t) w[t] = Tile::load(tiles + t * stride + k * Tile::kBytes);
    for (int r = 0; r < kRows; ++r) {
      const F32x16 value = F32x16::broadcast(values[r * x.num_cols + k]);
      for (int t = 0; t < kTiles; ++t) acc[r][t] = fma(w[t], value, acc[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) acc[r][t].store(out + r * out_stride + 16 * t);
  }
}

// --- From a pair's results to the output. ---

void write_segment(const MatmulTask& task, int64_t row, int64_t column, int64_t count, const float* values) {
  float* out = task.out + row * task.out_stride + column;
  const float* bias = task.bias == nullptr ? nullptr : task.bias + column;
  const bool add = task.epilogue == Epilogue::kAdd;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    F32x16 v = F32x16::load(values + i);
    if (bias != nullptr) v = v + F32x16::load(bias + i);
    if (add) v = F32x16::load(out + i) + v;
    v.store(out + i);
  }
  for (; i < count; ++i) {
    float v = values[i];
    if (bias != nullptr) v = v + bias[i];
    if (add) v = out[i] + v;
    out[i] = v;
  }
}

// A gate_up pair's results → silu(gate) · up.
F32x16 gated(const float* values) { return silu(F32x16::load(values)) * F32x16::load(values + kTileRows); }

// `values` holds the pair's 32 results of each of rows [row_begin, row_end).
void write_pair(const MatmulTask& task, const MatrixPart& part, int64_t pair, int64_t row_begin, int64_t row_end,
                const float (*values)[kPairRows]) {
  const int64_t local = pair - part.first_pair;
  const int64_t num_rows = row_end - row_begin;
  if (task.matrix->gate_up) {
    const int64_t column = local * kTileRows;
    const int64_t count = part.num_rows - column < kTileRows ? part.num_rows - column : kTileRows;
    for (int64_t r = 0; r < num_rows; ++r) {
      const F32x16 product = gated(values[r]);
      if (count == kTileRows) {
        product.store(task.out + (row_begin + r) * task.out_stride + column);
      } else {
        float narrow[kTileRows];
        product.store(narrow);
        write_segment(task, row_begin + r, column, count, narrow);
      }
    }
    return;
  }
  const int64_t first = local * kPairRows;
  const int64_t count = part.num_rows - first < kPairRows ? part.num_rows - first : kPairRows;
  for (int64_t r = 0; r < num_rows; ++r)
    write_segment(task, row_begin + r, part.first_column + first, count, values[r]);
}

// Of a gate_up pair and the one before it, block `block` of the output's rows [row_begin, row_end).
void quantize_products(const Activations& out, int64_t block, int64_t row_begin, int64_t row_end,
                       const float (*first)[kTileRows], const float (*second)[kPairRows]) {
  const int64_t num_blocks = out.num_blocks();
  alignas(64) float values[kBlocksTogether][kBlock];
  for (int64_t row = row_begin; row < row_end; row += kBlocksTogether) {
    const int64_t count = row_end - row < kBlocksTogether ? row_end - row : kBlocksTogether;
    for (int64_t i = 0; i < count; ++i, ++first, ++second) {
      F32x16::load(*first).store(values[i]);
      gated(*second).store(values[i] + kTileRows);
    }
    quantize_blocks(values[0], count, out, row * num_blocks + block, num_blocks);
  }
}

// --- Loops over pairs and rows. ---

// Rows [row_begin, row_end), at most kSpanRows of them, of one pair → acc.
template <class Tile>
void pair_results(const uint8_t* tiles, int64_t tile_stride, const Activations& x, int64_t row_begin, int64_t row_end,
                  ManyRowScratch* scratch) {
  if (row_end - row_begin <= kPackedRows) {
    rows_by_packed_pair<Tile, kPackedRows>(row_end - row_begin, tiles, tile_stride, x, row_begin, scratch->acc[0]);
  } else {
    span_by_pair<Tile>(tiles, tile_stride, x, row_begin, row_end, scratch);
  }
}

template <class Tile>
void quantized_pairs(const MatmulTask& task, const MatrixPart& part, int64_t pair_begin, int64_t pair_end,
                     int64_t row_begin, int64_t row_end, ManyRowScratch* scratch) {
  const bool quantize = task.epilogue == Epilogue::kSiluMulQuantize;
  const int64_t pairs_together = quantize ? 2 : 1;
  const int64_t pair_bytes = 2 * part.tile_stride;
  for (int64_t pair = pair_begin; pair < pair_end; pair += pairs_together) {
    const uint8_t* tiles = part.tiles + (pair - part.first_pair) * pair_bytes;
    for (int64_t begin = row_begin; begin < row_end; begin += kSpanRows) {
      const int64_t end = row_end - begin < kSpanRows ? row_end : begin + kSpanRows;
      pair_results<Tile>(tiles, part.tile_stride, task.input, begin, end, scratch);
      if (!quantize) {
        write_pair(task, part, pair, begin, end, scratch->acc);
        continue;
      }
      for (int64_t i = 0; i < end - begin; ++i) gated(scratch->acc[i]).store(scratch->products[i]);
      pair_results<Tile>(tiles + pair_bytes, part.tile_stride, task.input, begin, end, scratch);
      quantize_products(task.quantized_out, pair / 2, begin, end, scratch->products, scratch->acc);
    }
  }
}

template <class Tile>
void float_pairs(const MatmulTask& task, const MatrixPart& part, int64_t pair_begin, int64_t pair_end,
                 int64_t row_begin, int64_t row_end) {
  const Activations& x = task.input;
  alignas(64) float out[4][kPairRows];
  for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
    const uint8_t* tiles = part.tiles + 2 * (pair - part.first_pair) * part.tile_stride;
    int64_t row = row_begin;
    for (; row + 4 <= row_end; row += 4) {
      float_rows_by_tiles<Tile, 4, 2>(tiles, part.tile_stride, x, row, out[0], kPairRows);
      write_pair(task, part, pair, row, row + 4, out);
    }
    for (; row < row_end; ++row) {
      float_rows_by_tiles<Tile, 1, 2>(tiles, part.tile_stride, x, row, out[0], kPairRows);
      write_pair(task, part, pair, row, row + 1, out);
    }
  }
}

template <class Tile>
void dequantize_quantized_row(const MatrixPart& part, int64_t row, int64_t num_cols, float* out) {
  const int64_t lane = row % kTileRows;
  const uint8_t* base = part.tiles + row / kTileRows * part.tile_stride;
  for (int64_t b = 0; b < num_cols / kBlock; ++b) {
    UnpackedBlock block;
    unpack_block<Tile>(base, b, &block);
    for (int64_t k = 0; k < kBlock; ++k) {
      const int64_t place = k % 4 == 1 ? k + 1 : k % 4 == 2 ? k - 1 : k;
      const int32_t code = block.codes[place / 2][2 * lane + place % 2];
      const bool second_half = k >= kBlock / Tile::kHalves;
      const float value = static_cast<float>(code) * (second_half ? block.second : block.scale)[lane];
      out[b * kBlock + k] = Tile::kHasMin ? value + block.second[lane] : value;
    }
  }
}

template <class Tile>
void dequantize_float_row(const MatrixPart& part, int64_t row, int64_t num_cols, float* out) {
  const uint8_t* base = part.tiles + row / kTileRows * part.tile_stride;
  for (int64_t k = 0; k < num_cols; ++k) {
    alignas(64) float lanes[16];
    Tile::load(base + k * Tile::kBytes).store(lanes);
    out[k] = lanes[row % kTileRows];
  }
}

}  // namespace

void matmul(const MatmulTask& task, int64_t pair_begin, int64_t pair_end, int64_t row_begin, int64_t row_end,
            uint8_t* scratch) {
  auto* span = reinterpret_cast<ManyRowScratch*>(scratch);
  while (pair_begin < pair_end) {
    const MatrixPart& part = task.matrix->part_of_pair(pair_begin);
    const int64_t part_end = part.first_pair + part.num_pairs;
    const int64_t end = pair_end < part_end ? pair_end : part_end;
    switch (part.dtype) {
      case DType::kQ4_0: quantized_pairs<TileQ4_0>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ4_1: quantized_pairs<TileQ4_1>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ5_0: quantized_pairs<TileQ5_0>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ5_1: quantized_pairs<TileQ5_1>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ8_0: quantized_pairs<TileQ8_0>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ4_K: quantized_pairs<TileQ4_K>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ5_K: quantized_pairs<TileQ5_K>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kQ6_K: quantized_pairs<TileQ6_K>(task, part, pair_begin, end, row_begin, row_end, span); break;
      case DType::kF32: float_pairs<TileF32>(task, part, pair_begin, end, row_begin, row_end); break;
      case DType::kF16: float_pairs<TileF16>(task, part, pair_begin, end, row_begin, row_end); break;
      case DType::kBF16: float_pairs<TileBF16>(task, part, pair_begin, end, row_begin, row_end); break;
      default: break;  // refused when packed
    }
    pair_begin = end;
  }
}

void dequantize_row(const MatrixPart& part, int64_t row, int64_t num_cols, float* out) {
  switch (part.dtype) {
    case DType::kQ4_0: dequantize_quantized_row<TileQ4_0>(part, row, num_cols, out); break;
    case DType::kQ4_1: dequantize_quantized_row<TileQ4_1>(part, row, num_cols, out); break;
    case DType::kQ5_0: dequantize_quantized_row<TileQ5_0>(part, row, num_cols, out); break;
    case DType::kQ5_1: dequantize_quantized_row<TileQ5_1>(part, row, num_cols, out); break;
    case DType::kQ8_0: dequantize_quantized_row<TileQ8_0>(part, row, num_cols, out); break;
    case DType::kQ4_K: dequantize_quantized_row<TileQ4_K>(part, row, num_cols, out); break;
    case DType::kQ5_K: dequantize_quantized_row<TileQ5_K>(part, row, num_cols, out); break;
    case DType::kQ6_K: dequantize_quantized_row<TileQ6_K>(part, row, num_cols, out); break;
    case DType::kF32: dequantize_float_row<TileF32>(part, row, num_cols, out); break;
    case DType::kF16: dequantize_float_row<TileF16>(part, row, num_cols, out); break;
    case DType::kBF16: dequantize_float_row<TileBF16>(part, row, num_cols, out); break;
    default: break;  // refused when packed
  }
}

}  // namespace tw::cpu::TW_ISA
