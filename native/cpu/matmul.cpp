// Projections: out[row][n] = Σ_k W[n][k] · x[row][k] over packed weights, for any number of rows.
//
// Reduction order, the same for every row count, tile shape and instruction set:
//   quantised formats: blocks of 32 inputs in order. Within a block Σ code_w · code_x is an exact integer; then
//     acc = fma(float(Σ) · scale_x, scale_w, acc), and for formats with a minimum acc = fma(min_w, sum_x, acc).
//     Where a scale covers 16 inputs (Q6_K), the same for the block's first half and then its second.
//   float formats: inputs in order, acc = fma(w, x, acc).
// One row reads the packed tiles directly and is bound by their bytes. More rows unpack a pair of tiles once into
// scratch (cache resident) and are bound by the integer dot products: 2 · 2 a weight, for the two bytes of an
// activation code.
#include "cpu/ops.h"
#include "cpu/tiles.h"

namespace tw::cpu::TW_ISA {
namespace {

// Register tile of the many-row path: rows × tiles. 16 vector registers hold less than 32.
#if defined(TW_ISA_AVX512)
constexpr int kMicroRows = 6;
constexpr int kMicroTiles = 2;
#else
constexpr int kMicroRows = 2;
constexpr int kMicroTiles = 1;
#endif

// --- Quantised formats. ---

template <bool kSmallCodes>
I32x16 dot_codes(I32x16 acc, U8x64 w, X4 x) {
  if constexpr (kSmallCodes) {
    return dot_small(acc, w, x);
  } else {
    return dot(acc, w, x);
  }
}

// Adds a block, or half of one, to an output's accumulator: the step that fixes the arithmetic of all quantised paths.
template <class Tile>
F32x16 accumulate(F32x16 acc, I32x16 codes, const Activations& x, int64_t index, int half, F32x16 scale, F32x16 min) {
  if constexpr (Tile::kZero != 0) {
    int32_t code_sum = x.code_sums[2 * index];
    if constexpr (Tile::kHalves == 2) {
      const int32_t first = x.code_sums[2 * index + 1];
      code_sum = half == 0 ? first : code_sum - first;
    }
    codes = codes - I32x16::broadcast(Tile::kZero * code_sum);
  }
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

// One row × one tile → out[16].
template <class Tile>
void row_by_tile(const uint8_t* tile, int64_t tile_bytes, const Activations& x, int64_t row, float* out) {
  constexpr int kSecond = Tile::kHalves - 1;  // where the second halves' sums go
  const int64_t num_blocks = x.num_blocks();
  const int64_t block_bytes = tile_bytes / num_blocks;
  F32x16 acc = F32x16::zero();
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t line = 0; line < block_bytes; line += 64) prefetch(tile + b * block_bytes + line + kPrefetchBytes);
    const int64_t index = row * num_blocks + b;
    const int8_t* high = x.planes + index * 2 * kBlock;
    const int8_t* low = high + kBlock;
    I32x16 sum_high[Tile::kHalves];
    I32x16 sum_low[Tile::kHalves];
    for (int half = 0; half < Tile::kHalves; ++half) sum_high[half] = sum_low[half] = I32x16::zero();
#pragma GCC unroll 4
    for (int chunk = 0; chunk < 4; ++chunk) {
      const CodePair w = Tile::codes(Tile::block(tile, b), chunk);
      const X4 high0 = X4::load(high + 4 * chunk);
      const X4 high1 = X4::load(high + 16 + 4 * chunk);
      const X4 low0 = X4::load(low + 4 * chunk);
      const X4 low1 = X4::load(low + 16 + 4 * chunk);
      sum_high[0] = dot_codes<Tile::kSmallCodes>(sum_high[0], w.first, high0);
      sum_low[0] = dot_codes<Tile::kSmallCodes>(sum_low[0], w.first, low0);
      sum_high[kSecond] = dot_codes<Tile::kSmallCodes>(sum_high[kSecond], w.second, high1);
      sum_low[kSecond] = dot_codes<Tile::kSmallCodes>(sum_low[kSecond], w.second, low1);
    }
#pragma GCC unroll 2
    for (int half = 0; half < Tile::kHalves; ++half) {
      acc = accumulate<Tile>(acc, shift_left_8(sum_high[half]) + sum_low[half], x, index, half,
                             Tile::scale(tile, b, half), min_of<Tile>(tile, b));
    }
  }
  acc.store(out);
}

// --- Many rows: tiles unpacked to one form, whatever the format. ---

// One unpacked block of a tile: 8 groups of 64 codes (group g = inputs 4g … 4g+3), then scale and minimum.
struct UnpackedBlock {
  uint8_t codes[8][64];
  float scale[16];
  float second[16];  // the minimum, or the scale of the second half
};

template <class Tile>
void unpack_block(const uint8_t* tile, int64_t b, UnpackedBlock* out) {
  for (int chunk = 0; chunk < 4; ++chunk) {
    const CodePair w = Tile::codes(Tile::block(tile, b), chunk);
    w.first.store(out->codes[chunk]);
    w.second.store(out->codes[4 + chunk]);
  }
  Tile::scale(tile, b, 0).store(out->scale);
  if constexpr (Tile::kHalves == 2) Tile::scale(tile, b, 1).store(out->second);
  if constexpr (Tile::kHasMin) Tile::min(tile, b).store(out->second);
}

template <class Tile>
void unpack_tile(const uint8_t* tile, int64_t num_blocks, UnpackedBlock* out) {
  for (int64_t b = 0; b < num_blocks; ++b) unpack_block<Tile>(tile, b, out + b);
}

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

// A pair of tiles as the many-row kernel reads it: unpacked, or in place where the packed codes already have that form.
template <class Tile>
struct UnpackedPair {
  const UnpackedBlock* blocks;
  int64_t num_blocks;

  U8x64 codes(int tile, int64_t b, int group) const { return U8x64::load(at(tile, b).codes[group]); }
  F32x16 scale(int tile, int64_t b, int half) const {
    return F32x16::load(half == 0 ? at(tile, b).scale : at(tile, b).second);
  }
  F32x16 min(int tile, int64_t b) const { return Tile::kHasMin ? F32x16::load(at(tile, b).second) : F32x16::zero(); }

 private:
  const UnpackedBlock& at(int tile, int64_t b) const { return blocks[tile * num_blocks + b]; }
};

template <class Tile>
struct PairInPlace {
  const uint8_t* tiles;
  int64_t tile_stride;

  U8x64 codes(int tile, int64_t b, int group) const {
    return U8x64::load(Tile::block(tiles + tile * tile_stride, b) + 64 * group);
  }
  F32x16 scale(int tile, int64_t b, int half) const { return Tile::scale(tiles + tile * tile_stride, b, half); }
  F32x16 min(int, int64_t) const { return F32x16::zero(); }
};

// kRows rows × kTiles tiles of a pair from `first` on → out[kRows][kPairRows], tile t at column 16·t.
template <class Tile, int kRows, int kTiles, class Pair>
void rows_by_tiles(const Pair& pair, int first, const Activations& x, int64_t row, float* out, Lookahead* ahead) {
  constexpr int kGroups = 8 / Tile::kHalves;
  const int64_t num_blocks = x.num_blocks();
  F32x16 acc[kRows][kTiles];
  for (auto& r : acc) {
    for (F32x16& a : r) a = F32x16::zero();
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    ahead->step();
    const int8_t* planes = x.planes + (row * num_blocks + b) * 2 * kBlock;
    const int64_t row_stride = num_blocks * 2 * kBlock;
#pragma GCC unroll 2
    for (int half = 0; half < Tile::kHalves; ++half) {
      I32x16 codes[kRows][kTiles];
      for (auto& r : codes) {
        for (I32x16& c : r) c = I32x16::zero();
      }
#pragma GCC unroll 2
      for (int plane = 0; plane < 2; ++plane) {
        if (plane == 1) {
          for (auto& r : codes) {
            for (I32x16& c : r) c = shift_left_8(c);
          }
        }
#pragma GCC unroll 8
        for (int group = half * kGroups; group < (half + 1) * kGroups; ++group) {
          U8x64 w[kTiles];
          for (int t = 0; t < kTiles; ++t) w[t] = pair.codes(first + t, b, group);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const X4 value = X4::load(planes + r * row_stride + plane * kBlock + 4 * group);
            for (int t = 0; t < kTiles; ++t) codes[r][t] = dot_codes<Tile::kSmallCodes>(codes[r][t], w[t], value);
          }
        }
      }
      for (int t = 0; t < kTiles; ++t) {
        const F32x16 scale = pair.scale(first + t, b, half);
        const F32x16 min = pair.min(first + t, b);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          acc[r][t] = accumulate<Tile>(acc[r][t], codes[r][t], x, (row + r) * num_blocks + b, half, scale, min);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) acc[r][t].store(out + r * kPairRows + 16 * (first + t));
  }
}

template <class Tile, int kRows, class Pair>
void rows_by_pair(const Pair& pair, const Activations& x, int64_t row, float* out, Lookahead* ahead) {
  for (int first = 0; first < 2; first += kMicroTiles) {
    rows_by_tiles<Tile, kRows, kMicroTiles>(pair, first, x, row, out, ahead);
  }
}

// `rows` (at most kMicroRows) rows of one pair.
template <class Tile, class Pair>
void some_rows_by_pair(int64_t rows, const Pair& pair, const Activations& x, int64_t row, float* out,
                       Lookahead* ahead) {
  if constexpr (kMicroRows == 6) {
    switch (rows) {
      case 1: return rows_by_pair<Tile, 1>(pair, x, row, out, ahead);
      case 2: return rows_by_pair<Tile, 2>(pair, x, row, out, ahead);
      case 3: return rows_by_pair<Tile, 3>(pair, x, row, out, ahead);
      case 4: return rows_by_pair<Tile, 4>(pair, x, row, out, ahead);
      case 5: return rows_by_pair<Tile, 5>(pair, x, row, out, ahead);
      default: return rows_by_pair<Tile, 6>(pair, x, row, out, ahead);
    }
  } else if (rows == 1) {
    rows_by_pair<Tile, 1>(pair, x, row, out, ahead);
  } else {
    rows_by_pair<Tile, 2>(pair, x, row, out, ahead);
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

// `values` holds the pair's 32 results of one row.
void write_pair(const MatmulTask& task, const MatrixPart& part, int64_t pair, int64_t row, const float* values) {
  const int64_t local = pair - part.first_pair;
  if (task.matrix->gate_up) {
    const int64_t column = local * kTileRows;
    float product[16];
    (silu(F32x16::load(values)) * F32x16::load(values + 16)).store(product);
    const int64_t count = part.num_rows - column < 16 ? part.num_rows - column : 16;
    write_segment(task, row, column, count, product);
    return;
  }
  const int64_t first = local * kPairRows;
  const int64_t count = part.num_rows - first < kPairRows ? part.num_rows - first : kPairRows;
  write_segment(task, row, part.first_column + first, count, values);
}

// --- Loops over pairs and rows. ---

template <class Tile>
void quantized_pairs(const MatmulTask& task, const MatrixPart& part, int64_t pair_begin, int64_t pair_end,
                     int64_t row_begin, int64_t row_end, uint8_t* scratch) {
  const Activations& x = task.input;
  const uint8_t* tiles = part.tiles + 2 * (pair_begin - part.first_pair) * part.tile_stride;
  alignas(64) float out[kMicroRows * kPairRows];
  if (row_end - row_begin == 1) {
    for (int64_t pair = pair_begin; pair < pair_end; ++pair, tiles += 2 * part.tile_stride) {
      row_by_tile<Tile>(tiles, part.tile_stride, x, row_begin, out);
      row_by_tile<Tile>(tiles + part.tile_stride, part.tile_stride, x, row_begin, out + kTileRows);
      write_pair(task, part, pair, row_begin, out);
    }
    return;
  }
  auto* unpacked = reinterpret_cast<UnpackedBlock*>(scratch);
  const int64_t num_blocks = x.num_blocks();
  for (int64_t pair = pair_begin; pair < pair_end; ++pair, tiles += 2 * part.tile_stride) {
    if constexpr (!Tile::kCodesInOrder) {
      unpack_tile<Tile>(tiles, num_blocks, unpacked);
      unpack_tile<Tile>(tiles + part.tile_stride, num_blocks, unpacked + num_blocks);
    }
    const int64_t num_lines = 2 * part.tile_stride / 64;
    const int64_t num_micro = (row_end - row_begin + kMicroRows - 1) / kMicroRows * (2 / kMicroTiles);
    Lookahead ahead = {tiles + 2 * part.tile_stride, num_lines, num_lines / (num_micro * num_blocks) + 1};
    int64_t row = row_begin;
    while (row < row_end) {
      const int64_t left = row_end - row;
      int64_t rows = left < kMicroRows ? left : kMicroRows;
      // 7 and 8 rows split evenly: a tile of one or two rows wastes most of its loads.
      if (kMicroRows == 6 && (left == 7 || left == 8)) rows = 4;
      if constexpr (Tile::kCodesInOrder) {
        some_rows_by_pair<Tile>(rows, PairInPlace<Tile>{tiles, part.tile_stride}, x, row, out, &ahead);
      } else {
        some_rows_by_pair<Tile>(rows, UnpackedPair<Tile>{unpacked, num_blocks}, x, row, out, &ahead);
      }
      for (int64_t r = 0; r < rows; ++r) write_pair(task, part, pair, row + r, out + r * kPairRows);
      row += rows;
    }
  }
}

template <class Tile>
void float_pairs(const MatmulTask& task, const MatrixPart& part, int64_t pair_begin, int64_t pair_end,
                 int64_t row_begin, int64_t row_end) {
  const Activations& x = task.input;
  alignas(64) float out[4 * kPairRows];
  for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
    const uint8_t* tiles = part.tiles + 2 * (pair - part.first_pair) * part.tile_stride;
    int64_t row = row_begin;
    for (; row + 4 <= row_end; row += 4) {
      float_rows_by_tiles<Tile, 4, 2>(tiles, part.tile_stride, x, row, out, kPairRows);
      for (int64_t r = 0; r < 4; ++r) write_pair(task, part, pair, row + r, out + r * kPairRows);
    }
    for (; row < row_end; ++row) {
      float_rows_by_tiles<Tile, 1, 2>(tiles, part.tile_stride, x, row, out, kPairRows);
      write_pair(task, part, pair, row, out);
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
      const int32_t code = block.codes[k / 4][4 * lane + k % 4] - Tile::kZero;
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
  while (pair_begin < pair_end) {
    const MatrixPart& part = task.matrix->part_of_pair(pair_begin);
    const int64_t part_end = part.first_pair + part.num_pairs;
    const int64_t end = pair_end < part_end ? pair_end : part_end;
    switch (part.dtype) {
      case DType::kQ4_0: quantized_pairs<TileQ4_0>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ4_1: quantized_pairs<TileQ4_1>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ5_0: quantized_pairs<TileQ5_0>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ5_1: quantized_pairs<TileQ5_1>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ8_0: quantized_pairs<TileQ8_0>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ4_K: quantized_pairs<TileQ4_K>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ5_K: quantized_pairs<TileQ5_K>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
      case DType::kQ6_K: quantized_pairs<TileQ6_K>(task, part, pair_begin, end, row_begin, row_end, scratch); break;
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
