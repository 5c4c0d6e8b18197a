// A weight matrix in device memory: still quantised, in tiles of 16 rows (formats.cuh says how a tile is laid out).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "core/thread_pool.h"
#include "cuda/memory.h"

namespace tw::cuda {

// Whether a format's values are codes to unpack.
inline bool holds_codes(DType dtype) { return dtype != DType::kF32 && dtype != DType::kF16 && dtype != DType::kBF16; }

// Most pieces that a matrix's inputs are summed in.
constexpr int32_t kMostPieces = 16;

// What a kernel needs to know of consecutive rows of one format.
struct PackedPart {
  DType dtype;
  int32_t num_rows;      // without padding; of a gate-up pair, of one of the two
  int32_t num_tiles;     // even: a kernel may take two at a time
  int32_t num_steps;     // of 64 inputs
  int32_t num_splits;    // pieces the inputs are summed in, constant for the shape
  int32_t first_output;  // of the matrix's output that row 0 writes
  int64_t tile_stride;   // bytes
  const uint8_t* tiles;
  const float* row_factors;  // [num_tiles * 16], powers of two that take the storing factor back
};

struct PackedMatrix {
  int32_t num_rows = 0;
  int32_t num_cols = 0;
  bool gate_up = false;  // tiles 2t and 2t + 1 hold the same rows of gate and up
  std::vector<PackedPart> parts;
  std::vector<DeviceBuffer> storage;
  DeviceBuffer bias;  // [num_rows] or empty
};

// Copies sources to the device in bounded chunks and packs them there, some in another format that says the same. While
// a chunk travels and is packed, several threads copy the next one from the source, which is a mapped file: its pages
// come from the system's cache one by one.
class Packer {
 public:
  // `keeps_formats`: also where another format that says the same would be faster.
  explicit Packer(MemoryTracker* tracker, bool keeps_formats = false);
  ~Packer();

  PackedMatrix pack_matrix(const std::vector<MatrixSource>& sources, const std::vector<float>& bias);
  PackedMatrix pack_gate_up(const MatrixSource& gate, const MatrixSource& up);

 private:
  DType stored_as(const MatrixSource& source) const;
  PackedPart allocate(const MatrixSource& source, DType dtype, bool paired, PackedMatrix* matrix);
  void upload(const MatrixSource& source, const PackedPart& part, int32_t tile_stride, int32_t first_tile);

  // A chunk under way.
  struct Slot {
    explicit Slot(MemoryTracker* tracker);
    PinnedBuffer staging;
    DeviceBuffer chunk;
    Event packed;
  };

  MemoryTracker* tracker_;
  const bool keeps_formats_;
  Stream stream_;
  Slot slots_[2];
  int next_slot_ = 0;
  ThreadPool copiers_;
};

// The device kernel of a format: packs `num_rows` rows whose bytes are at `rows`, beginning with tile `first_tile`;
// consecutive tiles of the source are `tile_step` apart. Defined in matmul_instance.cu.in.
struct PackTask {
  const uint8_t* rows;
  int64_t row_bytes;
  int32_t num_rows;
  int32_t num_cols;
  int32_t first_tile;
  int32_t tile_step;
  int32_t num_steps;
  int64_t tile_stride;
  uint8_t* tiles;
  float* row_factors;
  cudaStream_t stream;
};

}  // namespace tw::cuda
