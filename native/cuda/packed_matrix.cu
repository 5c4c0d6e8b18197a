#include "cuda/packed_matrix.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/matmul.h"

namespace tw::cuda {
namespace {

constexpr size_t kChunkBytes = size_t{8} << 20;
constexpr int32_t kTileRowCount = 16;
constexpr int32_t kStepWidth = 64;

// Splits of the inputs, each a warp's where there is a single token: many keep the whole device busy, but their blocks
// should run at once, on 132 processors of 16 to 20 warps; and where there are many tokens, each split is a sum to be
// added. A property of shape and format, since it decides the order of summation.
int32_t choose_splits(DType dtype, int32_t num_tiles, int32_t tiles_per_block, int32_t num_steps) {
  constexpr int32_t kProcessors = 132;
  constexpr int32_t kFewestSplits = 4;
  constexpr int32_t kShort = 16;                                       // steps
  const int32_t most_splits = dtype == DType::kF32 ? 4 : kMostPieces;  // F32 takes 8 KiB of shared memory a warp
  const auto up = [](int32_t a, int32_t b) { return (a + b - 1) / b; };
  const auto within = [&](int32_t splits) { return std::clamp(splits, kFewestSplits, most_splits); };
  const int32_t blocks = std::max(1, num_tiles / tiles_per_block);
  const int32_t blocks_each = up(blocks, kProcessors);
  if (holds_codes(dtype)) {
    // As few splits as make none longer, of two or three steps at least: bytes are few, so summing weighs more.
    const int32_t steps = up(num_steps, within(up(num_steps <= kShort ? 20 : 16, blocks_each)));
    return up(num_steps, std::max(steps, std::min(num_steps, num_steps <= kShort ? 2 : 3)));
  }
  if (num_steps <= kShort) return std::min(within(up(16 * kProcessors, blocks)), num_steps);
  // Three steps of a warp are requested at once.
  return std::min(blocks_each < 4 ? within(up(18, blocks_each)) : kFewestSplits, up(num_steps, 3));
}

int64_t row_bytes_of(DType dtype, int64_t num_cols) {
  const DTypeInfo& info = dtype_info(dtype);
  return num_cols / info.block_values * info.block_bytes;
}

// Formats whose values are a block's scale times a small integer are Q8_0 too, exactly.
bool is_symmetric(DType dtype) { return dtype == DType::kQ4_0 || dtype == DType::kQ5_0 || dtype == DType::kQ8_0; }

constexpr int64_t kQ8_0BlockBytes = 34;

// Blocks of such a format as Q8_0; eight codes at a time, a byte each.
void write_as_q8_0(DType dtype, const uint8_t* in, int64_t num_blocks, uint8_t* out) {
  constexpr uint64_t kBytes = 0x0101010101010101;
  const int64_t in_bytes = dtype_info(dtype).block_bytes;
  const bool fifth = dtype == DType::kQ5_0;
  const uint64_t zero = fifth ? 16 * kBytes : 8 * kBytes;  // the code of 0
  // The bits of a byte, each as the fifth bit of a byte of its own.
  const auto spread = [&](uint64_t bits) {
    return (((bits * kBytes & 0x8040201008040201) + 0x7f * kBytes) & 0x80 * kBytes) >> 3;
  };
  for (int64_t block = 0; block < num_blocks; ++block) {
    std::memcpy(out, in, 2);
    for (int i = 0; i < 2; ++i) {
      uint64_t nibbles;
      std::memcpy(&nibbles, in + (fifth ? 6 : 2) + i * 8, 8);
      uint64_t codes[2] = {nibbles & 15 * kBytes, nibbles >> 4 & 15 * kBytes};
      for (int half = 0; half < 2; ++half) {
        if (fifth) codes[half] |= spread(in[2 + half * 2 + i]);
        codes[half] = ((codes[half] | 0x80 * kBytes) - zero) ^ 0x80 * kBytes;
        std::memcpy(out + 2 + half * 16 + i * 8, &codes[half], 8);
      }
    }
    in += in_bytes;
    out += kQ8_0BlockBytes;
  }
}

}  // namespace

Packer::Slot::Slot(MemoryTracker* tracker) : staging(kChunkBytes), chunk(tracker, Purpose::kWorkspace, kChunkBytes) {}

Packer::Packer(MemoryTracker* tracker, bool keeps_formats)
    : tracker_(tracker),
      keeps_formats_(keeps_formats),
      slots_{Slot(tracker), Slot(tracker)},
      copiers_(num_memory_threads()) {}

// The chunks under way use the slots.
Packer::~Packer() { (void)cudaStreamSynchronize(stream_.get()); }

// Five bits take longer to unpack than eight, and a small matrix costs more by that than by its bytes.
DType Packer::stored_as(const MatrixSource& source) const {
  constexpr int64_t kSmallMatrix = int64_t{8} << 20;
  const bool unpacks = source.dtype == DType::kQ5_0 && source.num_rows * source.num_cols <= kSmallMatrix;
  return unpacks && !keeps_formats_ ? DType::kQ8_0 : source.dtype;
}

PackedPart Packer::allocate(const MatrixSource& source, DType dtype, bool paired, PackedMatrix* matrix) {
  if (source.num_cols % 32 != 0) {
    throw Error(ErrorCode::kUnsupportedModel,
                "the CUDA backend needs layer widths divisible by 32, not " + std::to_string(source.num_cols));
  }
  const FormatKernels& kernels = kernels_for(dtype);
  PackedPart part{};
  part.dtype = dtype;
  part.num_rows = static_cast<int32_t>(source.num_rows);
  const auto row_tiles = static_cast<int32_t>((source.num_rows + kTileRowCount - 1) / kTileRowCount);
  part.num_tiles = paired ? 2 * row_tiles : (row_tiles + 1) / 2 * 2;
  part.num_steps = static_cast<int32_t>((source.num_cols + kStepWidth - 1) / kStepWidth);
  part.num_splits = choose_splits(dtype, part.num_tiles, paired ? 2 : 1, part.num_steps);
  part.tile_stride = int64_t{part.num_steps} * kernels.step_bytes + (part.num_steps + 3) / 4 * kernels.super_bytes;
  matrix->storage.emplace_back(tracker_, Purpose::kWeights,
                               static_cast<size_t>(part.tile_stride) * static_cast<size_t>(part.num_tiles));
  part.tiles = matrix->storage.back().as<uint8_t>();
  matrix->storage.emplace_back(tracker_, Purpose::kWeights,
                               static_cast<size_t>(part.num_tiles) * kTileRowCount * sizeof(float));
  part.row_factors = matrix->storage.back().as<float>();
  return part;
}

void Packer::upload(const MatrixSource& source, const PackedPart& part, int32_t tile_step, int32_t first_tile) {
  const int64_t row_bytes = row_bytes_of(part.dtype, source.num_cols);
  const int64_t source_row_bytes = row_bytes_of(source.dtype, source.num_cols);
  const int64_t rows_per_chunk = static_cast<int64_t>(kChunkBytes) / row_bytes / kTileRowCount * kTileRowCount;
  if (rows_per_chunk == 0) throw Error(ErrorCode::kUnsupportedModel, "a row of a matrix is too long");
  for (int64_t row = 0; row < source.num_rows; row += rows_per_chunk) {
    const int64_t rows = std::min(rows_per_chunk, source.num_rows - row);
    const auto bytes = static_cast<size_t>(rows * row_bytes);
    const Slot& slot = slots_[next_slot_];
    next_slot_ = 1 - next_slot_;
    slot.packed.synchronize();
    const uint8_t* const from = static_cast<const uint8_t*>(source.data) + row * source_row_bytes;
    auto* const to = slot.staging.as<uint8_t>();
    if (source.dtype == part.dtype) {
      constexpr auto kItem = static_cast<size_t>(kMemoryItemBytes);
      copiers_.for_each(static_cast<int64_t>((bytes + kItem - 1) / kItem), [&](int64_t item, int) {
        const size_t begin = static_cast<size_t>(item) * kItem;
        std::memcpy(to + begin, from + begin, std::min(kItem, bytes - begin));
      });
    } else {
      copiers_.for_each(rows, [&](int64_t item, int) {
        write_as_q8_0(source.dtype, from + item * source_row_bytes, row_bytes / kQ8_0BlockBytes, to + item * row_bytes);
      });
    }
    TW_CUDA_CHECK(cudaMemcpyAsync(slot.chunk.as<uint8_t>(), to, bytes, cudaMemcpyHostToDevice, stream_.get()));
    PackTask task{};
    task.rows = slot.chunk.as<uint8_t>();
    task.row_bytes = row_bytes;
    task.num_rows = static_cast<int32_t>(rows);
    task.num_cols = static_cast<int32_t>(source.num_cols);
    task.first_tile = first_tile + static_cast<int32_t>(row / kTileRowCount) * tile_step;
    task.tile_step = tile_step;
    task.num_steps = part.num_steps;
    task.tile_stride = part.tile_stride;
    task.tiles = const_cast<uint8_t*>(part.tiles);
    task.row_factors = const_cast<float*>(part.row_factors);
    task.stream = stream_.get();
    kernels_for(part.dtype).pack(task);
    slot.packed.record(stream_.get());
  }
}

// Small matrices beside each other, such as q, k and v, cost more by their launches than by their bytes: where their
// formats differ but all are symmetric, they become Q8_0.
PackedMatrix Packer::pack_matrix(const std::vector<MatrixSource>& sources, const std::vector<float>& bias) {
  const auto differs = [&](const MatrixSource& part) { return part.dtype != sources.at(0).dtype; };
  const bool joins =
      std::any_of(sources.begin(), sources.end(), differs) &&
      std::all_of(sources.begin(), sources.end(), [](const auto& part) { return is_symmetric(part.dtype); });
  const auto dtype_of = [&](const MatrixSource& part) { return joins ? DType::kQ8_0 : stored_as(part); };
  PackedMatrix matrix;
  matrix.num_cols = static_cast<int32_t>(sources.at(0).num_cols);
  size_t next = 0;
  while (next < sources.size()) {
    // Neighbours of one format whose rows fill whole tiles become one part, so one launch serves them.
    size_t end = next + 1;
    MatrixSource joined = sources[next];
    const DType dtype = dtype_of(joined);
    while (end < sources.size() && dtype_of(sources[end]) == dtype && joined.num_rows % kTileRowCount == 0) {
      joined.num_rows += sources[end].num_rows;
      ++end;
    }
    PackedPart part = allocate(joined, dtype, false, &matrix);
    part.first_output = matrix.num_rows;
    int64_t rows = 0;
    for (; next < end; ++next) {
      upload(sources[next], part, 1, static_cast<int32_t>(rows / kTileRowCount));
      rows += sources[next].num_rows;
    }
    matrix.num_rows += part.num_rows;
    matrix.parts.push_back(part);
  }
  if (!bias.empty()) {
    matrix.bias = DeviceBuffer(tracker_, Purpose::kWeights, bias.size() * sizeof(float));
    TW_CUDA_CHECK(
        cudaMemcpy(matrix.bias.as<float>(), bias.data(), bias.size() * sizeof(float), cudaMemcpyHostToDevice));
  }
  return matrix;
}

PackedMatrix Packer::pack_gate_up(const MatrixSource& gate, const MatrixSource& up) {
  if (gate.dtype != up.dtype || gate.num_rows != up.num_rows || gate.num_cols != up.num_cols) {
    throw Error(ErrorCode::kUnsupportedModel, "gate and up matrices of different format or shape");
  }
  PackedMatrix matrix;
  matrix.gate_up = true;
  matrix.num_rows = static_cast<int32_t>(gate.num_rows);
  matrix.num_cols = static_cast<int32_t>(gate.num_cols);
  const PackedPart part = allocate(gate, stored_as(gate), true, &matrix);
  upload(gate, part, 2, 0);
  upload(up, part, 2, 1);
  matrix.parts.push_back(part);
  return matrix;
}

}  // namespace tw::cuda
