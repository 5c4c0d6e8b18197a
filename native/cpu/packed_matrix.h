// A weight matrix as the CPU kernels read it: still quantised, rows interleaved in tiles of 16.
//
// Rows are padded to whole tile pairs with zero weights. A tile holds, for each block of 32 inputs in order, what the
// 16 rows need for that block, so a kernel reads it front to back with full-width loads:
//   Q4_0   256 B codes, 16 × f16 scale                     code c of chunk j, row r: low nibble of byte 64j + 4r + i is
//   Q4_1   256 B codes, 16 × f16 scale, 16 × f16 minimum   input 4j + i, the high nibble input 16 + 4j + i
//   Q5_0   as Q4_0 with 64 B of fifth bits after the codes: bit 64g + 4r + i is input 4g + i of row r (g = 0…7)
//   Q5_1   as Q4_1 with the same 64 B
//   Q8_0   512 B codes + 128 (unsigned), 16 × f16 scale    byte 64g + 4r + i is input 4g + i of row r
// The K formats share factors between the 8 blocks of 256 inputs, so there a tile holds for each 256 inputs:
//   Q4_K   16 × f16 scale factor, 16 × f16 minimum factor (negated), then 8 blocks of
//            256 B codes as Q4_0, 16 × u8 scale, 16 × u8 minimum
//   Q5_K   the same factors, then 8 blocks of
//            256 B codes and 64 B of fifth bits as Q5_0, 16 × u8 scale, 16 × u8 minimum
//   Q6_K   16 × f16 scale factor, then 8 blocks of 256 B low nibbles as Q4_0, 128 B top bits (byte 64v + 4r + i: from
//            bit 0 on, two bits each of inputs 8v + i, 16 + 8v + i, 8v + 4 + i and 16 + 8v + 4 + i of row r),
//            16 × i8 scale of inputs 0…15, 16 × i8 scale of inputs 16…31
// Float formats hold for each input the 16 rows' values, in the stored format.
#pragma once

#include <cstdint>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"

namespace tw::cpu {

constexpr int64_t kTileRows = 16;
constexpr int64_t kPairRows = 2 * kTileRows;
constexpr int64_t kBlock = 32;          // inputs that share a scale; also the grain of activation quantisation
constexpr int64_t kBlocksPerSuper = 8;  // blocks that share the factors of a K format

// Bytes one tile takes for `num_cols` inputs.
int64_t tile_bytes(DType dtype, int64_t num_cols);

// Whether kernels for this format read quantised activations (else float ones).
bool uses_quantized_activations(DType dtype);

// Consecutive tile pairs of one format.
struct MatrixPart {
  DType dtype;
  int64_t num_rows;    // without padding
  int64_t first_pair;  // pairs of the matrix before this part
  int64_t num_pairs;
  int64_t first_column;  // of the output that row 0 writes
  int64_t tile_stride;   // bytes
  const uint8_t* tiles;
};

struct PackedMatrix {
  int64_t num_rows = 0;
  int64_t num_cols = 0;
  int64_t num_pairs = 0;
  bool gate_up = false;  // the tiles of a pair are gate rows and up rows; `num_rows` counts gate rows
  bool needs_quantized = false;
  bool needs_float = false;
  std::vector<MatrixPart> parts;
  std::vector<float> bias;  // [num_rows] or empty

  int64_t num_bytes() const;
  // The part that holds a pair.
  const MatrixPart& part_of_pair(int64_t pair) const;
  // The part that holds a row.
  const MatrixPart& part_of_row(int64_t row) const;
};

// The tiles lie in `arena`, which must outlive the matrix.
PackedMatrix pack_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias, Arena* arena);
PackedMatrix pack_gate_up(const MatrixSource& gate, const MatrixSource& up, Arena* arena);

}  // namespace tw::cpu
