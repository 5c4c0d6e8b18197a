#include "cpu/packed_matrix.h"

#include <cstring>
#include <string>

#include "core/error.h"
#include "quant/k_groups.h"

namespace tw::cpu {
namespace {

constexpr int64_t kBlockBytesQ4_K = 256 + 16 + 16;
constexpr int64_t kBlockBytesQ5_K = 256 + 64 + 16 + 16;
constexpr int64_t kBlockBytesQ6_K = 256 + 128 + 16 + 16;

// Inputs that a format stores as a unit.
int64_t unit_inputs(DType dtype) { return dtype_info(dtype).block_values == 256 ? kBlocksPerSuper * kBlock : kBlock; }

// Bytes of a tile for one unit of inputs.
int64_t tile_unit_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32: return kBlock * kTileRows * 4;
    case DType::kF16:
    case DType::kBF16: return kBlock * kTileRows * 2;
    case DType::kQ4_0: return 256 + 32;
    case DType::kQ4_1: return 256 + 32 + 32;
    case DType::kQ5_0: return 256 + 64 + 32;
    case DType::kQ5_1: return 256 + 64 + 32 + 32;
    case DType::kQ8_0: return 512 + 32;
    case DType::kQ4_K: return 64 + kBlocksPerSuper * kBlockBytesQ4_K;
    case DType::kQ5_K: return 64 + kBlocksPerSuper * kBlockBytesQ5_K;
    case DType::kQ6_K: return 32 + kBlocksPerSuper * kBlockBytesQ6_K;
    default: break;
  }
  throw Error(ErrorCode::kUnsupportedModel,
              std::string("the CPU backend has no kernel for ") + dtype_info(dtype).name + " weights yet");
}

// Moves the 16 code bytes of one GGUF 4- or 5-bit block to row `lane` of a tile's codes.
void scatter_nibbles(const uint8_t* codes, int64_t lane, uint8_t* tile) {
  for (int64_t chunk = 0; chunk < 4; ++chunk) std::memcpy(tile + 64 * chunk + 4 * lane, codes + 4 * chunk, 4);
}

// `bits` has bit i of input i: four inputs' bits are a nibble of the tile's.
void scatter_fifth_bits(uint32_t bits, int64_t lane, uint8_t* tile_bits) {
  for (int64_t group = 0; group < 8; ++group) {
    uint8_t* byte = tile_bits + 8 * group + lane / 2;
    *byte = static_cast<uint8_t>(*byte | (bits >> 4 * group & 15) << 4 * (lane % 2));
  }
}

uint32_t load_u32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Moves 32 codes of 4 bits, each in its own byte at bit `shift`, to row `lane` of a tile's codes.
void scatter_nibbles_of_bytes(const uint8_t* bytes, int shift, int64_t lane, uint8_t* tile) {
  constexpr uint32_t kLow = 0x0f0f0f0f;
  for (int64_t chunk = 0; chunk < 4; ++chunk) {
    const uint32_t first = load_u32(bytes + 4 * chunk) >> shift & kLow;
    const uint32_t second = load_u32(bytes + 16 + 4 * chunk) >> shift & kLow;
    const uint32_t both = first | second << 4;
    std::memcpy(tile + 64 * chunk + 4 * lane, &both, sizeof both);
  }
}

// The factors and 6-bit scales that start the K formats with minimums; `tile` is a super-block's.
void pack_groups(const uint8_t* source, int64_t lane, int64_t block_bytes, uint8_t* tile) {
  std::memcpy(tile + 2 * lane, source, 2);
  tile[32 + 2 * lane] = source[2];
  tile[32 + 2 * lane + 1] = source[3] ^ 0x80;  // negated: value = scale · code + minimum, as in the other formats
  for (int group = 0; group < kBlocksPerSuper; ++group) {
    const quant::GroupScale packed = quant::group_scale(source + 4, group);
    uint8_t* scales = tile + 64 + (group + 1) * block_bytes - 2 * kTileRows;
    scales[lane] = static_cast<uint8_t>(packed.scale);
    scales[kTileRows + lane] = static_cast<uint8_t>(packed.minimum);
  }
}

void pack_q4_k(const uint8_t* source, int64_t lane, uint8_t* tile) {
  pack_groups(source, lane, kBlockBytesQ4_K, tile);
  for (int group = 0; group < kBlocksPerSuper; ++group) {
    scatter_nibbles_of_bytes(source + 16 + 32 * (group / 2), 4 * (group % 2), lane,
                             tile + 64 + group * kBlockBytesQ4_K);
  }
}

void pack_q5_k(const uint8_t* source, int64_t lane, uint8_t* tile) {
  pack_groups(source, lane, kBlockBytesQ5_K, tile);
  for (int group = 0; group < kBlocksPerSuper; ++group) {
    uint8_t* block = tile + 64 + group * kBlockBytesQ5_K;
    scatter_nibbles_of_bytes(source + 48 + 32 * (group / 2), 4 * (group % 2), lane, block);
    uint32_t fifth_bits = 0;
    for (int i = 0; i < kBlock; ++i) fifth_bits |= static_cast<uint32_t>(source[16 + i] >> group & 1) << i;
    scatter_fifth_bits(fifth_bits, lane, block + 256);
  }
}

void pack_q6_k(const uint8_t* source, int64_t lane, uint8_t* tile) {
  std::memcpy(tile + 2 * lane, source + 208, 2);
  for (int quarter = 0; quarter < kBlocksPerSuper; ++quarter) {
    const int q = quarter % 4;
    const uint8_t* high = source + 128 + 32 * (quarter / 4);
    uint8_t* block = tile + 32 + quarter * kBlockBytesQ6_K;
    scatter_nibbles_of_bytes(source + 64 * (quarter / 4) + 32 * (q % 2), 4 * (q / 2), lane, block);
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t top = 0;
      for (int i = 0; i < 4; ++i) {  // chunk 2·pair + i / 2, its first or second four inputs
        const uint8_t* bytes = high + 4 * (2 * pair + i / 2) + 16 * (i % 2);
        top |= (load_u32(bytes) >> 2 * q & 0x03030303u) << 2 * i;
      }
      std::memcpy(block + 256 + 64 * pair + 4 * lane, &top, sizeof top);
    }
    block[384 + lane] = source[192 + 2 * quarter];
    block[400 + lane] = source[192 + 2 * quarter + 1];
  }
}

// Packs one unit of one row; block layouts are in native/quant.
void pack_unit(DType dtype, const uint8_t* source, int64_t lane, uint8_t* tile) {
  switch (dtype) {
    case DType::kQ4_0:
      scatter_nibbles(source + 2, lane, tile);
      std::memcpy(tile + 256 + 2 * lane, source, 2);
      return;
    case DType::kQ4_1:
      scatter_nibbles(source + 4, lane, tile);
      std::memcpy(tile + 256 + 2 * lane, source, 2);
      std::memcpy(tile + 288 + 2 * lane, source + 2, 2);
      return;
    case DType::kQ5_0:
      scatter_nibbles(source + 6, lane, tile);
      scatter_fifth_bits(load_u32(source + 2), lane, tile + 256);
      std::memcpy(tile + 320 + 2 * lane, source, 2);
      return;
    case DType::kQ5_1:
      scatter_nibbles(source + 8, lane, tile);
      scatter_fifth_bits(load_u32(source + 4), lane, tile + 256);
      std::memcpy(tile + 320 + 2 * lane, source, 2);
      std::memcpy(tile + 352 + 2 * lane, source + 2, 2);
      return;
    case DType::kQ8_0:
      for (int64_t group = 0; group < 8; ++group) {
        for (int64_t i = 0; i < 4; ++i) {
          tile[64 * group + 4 * lane + i] = static_cast<uint8_t>(source[2 + 4 * group + i] ^ 0x80);
        }
      }
      std::memcpy(tile + 512 + 2 * lane, source, 2);
      return;
    case DType::kQ4_K: pack_q4_k(source, lane, tile); return;
    case DType::kQ5_K: pack_q5_k(source, lane, tile); return;
    case DType::kQ6_K: pack_q6_k(source, lane, tile); return;
    case DType::kF32:
      for (int64_t i = 0; i < kBlock; ++i) std::memcpy(tile + 4 * (kTileRows * i + lane), source + 4 * i, 4);
      return;
    case DType::kF16:
    case DType::kBF16:
      for (int64_t i = 0; i < kBlock; ++i) std::memcpy(tile + 2 * (kTileRows * i + lane), source + 2 * i, 2);
      return;
    default: return;
  }
}

void pack_tile(const MatrixSource& source, int64_t first_row, uint8_t* tile) {
  const DTypeInfo& info = dtype_info(source.dtype);
  const int64_t unit_bytes = tile_unit_bytes(source.dtype);
  const int64_t source_unit_bytes = unit_inputs(source.dtype) / info.block_values * info.block_bytes;
  const int64_t num_units = source.num_cols / unit_inputs(source.dtype);
  const auto* base = static_cast<const uint8_t*>(source.data);
  for (int64_t lane = 0; lane < kTileRows && first_row + lane < source.num_rows; ++lane) {
    const uint8_t* row = base + (first_row + lane) * num_units * source_unit_bytes;
    for (int64_t unit = 0; unit < num_units; ++unit) {
      pack_unit(source.dtype, row + unit * source_unit_bytes, lane, tile + unit * unit_bytes);
    }
  }
}

void check_shape(const MatrixSource& source, int64_t num_cols) {
  const int64_t unit = unit_inputs(source.dtype);
  if (source.num_cols != num_cols || num_cols % unit != 0 || source.num_rows <= 0) {
    throw Error(ErrorCode::kUnsupportedModel,
                "a weight matrix of " + std::to_string(source.num_rows) + " x " + std::to_string(source.num_cols) +
                    ": rows must hold a whole number of " + std::to_string(unit) + " values");
  }
}

void add_format(PackedMatrix* matrix, DType dtype) {
  if (uses_quantized_activations(dtype)) {
    matrix->needs_quantized = true;
  } else {
    matrix->needs_float = true;
  }
}

}  // namespace

int64_t tile_bytes(DType dtype, int64_t num_cols) { return num_cols / unit_inputs(dtype) * tile_unit_bytes(dtype); }

bool uses_quantized_activations(DType dtype) {
  return dtype != DType::kF32 && dtype != DType::kF16 && dtype != DType::kBF16;
}

int64_t PackedMatrix::num_bytes() const {
  int64_t total = static_cast<int64_t>(bias.size() * sizeof(float));
  for (const MatrixPart& part : parts) total += 2 * part.num_pairs * part.tile_stride;
  return total;
}

const MatrixPart& PackedMatrix::part_of_pair(int64_t pair) const {
  size_t index = parts.size() - 1;
  while (parts[index].first_pair > pair) --index;
  return parts[index];
}

const MatrixPart& PackedMatrix::part_of_row(int64_t row) const {
  size_t index = parts.size() - 1;
  while (parts[index].first_column > row) --index;
  return parts[index];
}

PackedMatrix pack_matrix(const std::vector<MatrixSource>& sources, const std::vector<float>& bias, Arena* arena) {
  PackedMatrix matrix;
  matrix.num_cols = sources.at(0).num_cols;
  matrix.bias = bias;
  for (const MatrixSource& source : sources) {
    check_shape(source, matrix.num_cols);
    const int64_t num_pairs = (source.num_rows + kPairRows - 1) / kPairRows;
    const int64_t stride = tile_bytes(source.dtype, source.num_cols);
    uint8_t* tiles = arena->allocate(static_cast<size_t>(2 * num_pairs * stride));
    for (int64_t tile = 0; tile * kTileRows < source.num_rows; ++tile) {
      pack_tile(source, tile * kTileRows, tiles + tile * stride);
    }
    matrix.parts.push_back(
        {source.dtype, source.num_rows, matrix.num_pairs, num_pairs, matrix.num_rows, stride, tiles});
    matrix.num_pairs += num_pairs;
    matrix.num_rows += source.num_rows;
    add_format(&matrix, source.dtype);
  }
  return matrix;
}

PackedMatrix pack_gate_up(const MatrixSource& gate, const MatrixSource& up, Arena* arena) {
  if (gate.dtype != up.dtype || gate.num_rows != up.num_rows || gate.num_cols != up.num_cols) {
    throw Error(ErrorCode::kUnsupportedModel, "the gate and up matrices of a layer differ in format or shape");
  }
  check_shape(gate, gate.num_cols);
  PackedMatrix matrix;
  matrix.gate_up = true;
  matrix.num_rows = gate.num_rows;
  matrix.num_cols = gate.num_cols;
  matrix.num_pairs = (gate.num_rows + kTileRows - 1) / kTileRows;
  const int64_t stride = tile_bytes(gate.dtype, gate.num_cols);
  uint8_t* tiles = arena->allocate(static_cast<size_t>(2 * matrix.num_pairs * stride));
  for (int64_t pair = 0; pair < matrix.num_pairs; ++pair) {
    pack_tile(gate, pair * kTileRows, tiles + 2 * pair * stride);
    pack_tile(up, pair * kTileRows, tiles + (2 * pair + 1) * stride);
  }
  matrix.parts.push_back({gate.dtype, gate.num_rows, 0, matrix.num_pairs, 0, stride, tiles});
  add_format(&matrix, gate.dtype);
  return matrix;
}

}  // namespace tw::cpu
