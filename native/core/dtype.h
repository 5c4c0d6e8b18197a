// The storage formats of tensors, one row each (SPEC W-41).
#pragma once

#include <cstdint>

namespace tw {

// Values are GGUF's tensor type numbers (ggml docs/gguf.md).
enum class DType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

// How a format packs values: `block_values` consecutive values of a row occupy `block_bytes` bytes.
struct DTypeInfo {
  DType dtype;
  const char* name;
  uint32_t block_values;
  uint32_t block_bytes;
};

// The row of a format, or nullptr if `gguf_type` is not one that the engine knows.
const DTypeInfo* find_dtype(uint32_t gguf_type);

// The row of a known format.
const DTypeInfo& dtype_info(DType dtype);

}  // namespace tw
