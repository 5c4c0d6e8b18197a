// Parsing and validation of a GGUF v3 file that lies in memory (SPEC W-40). Every count, length, offset and product
// from the file is checked before it is used, and nothing is allocated for a count that the file is too short to hold.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "gguf/metadata.h"

namespace tw::gguf {

// What a file may declare at most. Larger files are refused even if they hold what they declare.
constexpr uint64_t kMaxKeyBytes = 65535;
constexpr uint64_t kMaxStringBytes = uint64_t{16} << 20;
constexpr uint64_t kMaxKeys = 65536;
constexpr uint64_t kMaxTensors = 65536;
constexpr uint64_t kMaxArrayElements = uint64_t{16} << 20;
constexpr uint64_t kMaxTensorNameBytes = 64;
constexpr uint64_t kMaxAlignment = uint64_t{1} << 20;
constexpr uint64_t kDefaultAlignment = 32;

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  uint32_t n_dims = 0;                         // 1…4
  std::array<int64_t, 4> dims = {1, 1, 1, 1};  // fastest-varying first; 1 beyond n_dims; the product fits int64_t
  uint64_t offset = 0;                         // in the file
  int64_t num_bytes = 0;
  const uint8_t* data = nullptr;  // aligned as the file says, which may be 1 byte: copy, do not cast

  int64_t num_values() const { return dims[0] * dims[1] * dims[2] * dims[3]; }
  int64_t num_rows() const { return dims[1] * dims[2] * dims[3]; }
  int64_t num_blocks() const { return num_bytes / dtype_info(dtype).block_bytes; }
};

// "[576, 49152]"
std::string shape_text(const int64_t* dims, size_t n_dims);

struct Contents {
  Metadata metadata;
  std::vector<TensorInfo> tensors;  // in the file's order, which is also the order of their data
  uint64_t alignment = kDefaultAlignment;
  uint64_t data_offset = 0;     // where tensor data begins
  uint64_t trailing_bytes = 0;  // after the last tensor and its padding; harmless, but worth a warning
};

// Views and data pointers of the result point into `data`, which must outlive it. `name` names the file in messages and
// must be one printable line. Throws Error(kModelLoadFailed) for a malformed file and Error(kUnsupportedModel) for a
// version, byte order, type or split file that is not supported.
Contents parse(const std::string& name, const uint8_t* data, uint64_t size);

}  // namespace tw::gguf
