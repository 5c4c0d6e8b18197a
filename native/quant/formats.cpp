#include "quant/formats.h"

#include "core/error.h"
#include "quant/float_formats.h"
#include "quant/q4_0.h"
#include "quant/q4_1.h"
#include "quant/q4_k.h"
#include "quant/q5_0.h"
#include "quant/q5_1.h"
#include "quant/q5_k.h"
#include "quant/q6_k.h"
#include "quant/q8_0.h"

namespace tw::quant {
namespace {

constexpr Format kFormats[] = {
    {DType::kF32, dequantize_f32, all_finite_f32},       {DType::kF16, dequantize_f16, all_finite_f16},
    {DType::kBF16, dequantize_bf16, all_finite_bf16},    {DType::kQ8_0, dequantize_q8_0, scales_finite_q8_0},
    {DType::kQ4_0, dequantize_q4_0, scales_finite_q4_0}, {DType::kQ4_1, dequantize_q4_1, scales_finite_q4_1},
    {DType::kQ5_0, dequantize_q5_0, scales_finite_q5_0}, {DType::kQ5_1, dequantize_q5_1, scales_finite_q5_1},
    {DType::kQ4_K, dequantize_q4_k, scales_finite_q4_k}, {DType::kQ5_K, dequantize_q5_k, scales_finite_q5_k},
    {DType::kQ6_K, dequantize_q6_k, scales_finite_q6_k},
};

}  // namespace

const Format& format(DType dtype) {
  for (const Format& row : kFormats) {
    if (row.dtype == dtype) return row;
  }
  throw Error(ErrorCode::kInternal, "a storage format without a row in the format table");
}

}  // namespace tw::quant
