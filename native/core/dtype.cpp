#include "core/dtype.h"

namespace tw {
namespace {

constexpr DTypeInfo kRows[] = {
    {DType::kF32, "F32", 1, 4},       {DType::kF16, "F16", 1, 2},       {DType::kBF16, "BF16", 1, 2},
    {DType::kQ8_0, "Q8_0", 32, 34},   {DType::kQ4_0, "Q4_0", 32, 18},   {DType::kQ4_1, "Q4_1", 32, 20},
    {DType::kQ5_0, "Q5_0", 32, 22},   {DType::kQ5_1, "Q5_1", 32, 24},   {DType::kQ4_K, "Q4_K", 256, 144},
    {DType::kQ5_K, "Q5_K", 256, 176}, {DType::kQ6_K, "Q6_K", 256, 210},
};

}  // namespace

const DTypeInfo* find_dtype(uint32_t gguf_type) {
  for (const DTypeInfo& row : kRows) {
    if (static_cast<uint32_t>(row.dtype) == gguf_type) return &row;
  }
  return nullptr;
}

const DTypeInfo& dtype_info(DType dtype) { return *find_dtype(static_cast<uint32_t>(dtype)); }

}  // namespace tw
