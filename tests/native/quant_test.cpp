// The plain references of native/quant against vectors of another implementation (make_quant_vectors.py).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "quant/formats.h"
#include "quant/q4_k.h"

namespace {

using tw::DType;

constexpr DType kAll[] = {DType::kF32,  DType::kF16,  DType::kBF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4_1,
                          DType::kQ5_0, DType::kQ5_1, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

std::vector<char> vectors() {
  std::ifstream in(TW_TEST_DATA "/quant_vectors.bin", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <class T>
T take(const std::vector<char>& bytes, size_t& at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  at += sizeof value;
  return value;
}

// Byte offsets of a block's F16 scales; for float formats, of the value.
std::vector<size_t> scale_offsets(DType dtype) {
  switch (dtype) {
    case DType::kQ4_1:
    case DType::kQ5_1:
    case DType::kQ4_K:
    case DType::kQ5_K: return {0, 2};
    case DType::kQ6_K: return {208};
    default: return {0};
  }
}

void write_scale(DType dtype, uint8_t* at, float value) {
  const uint32_t bits = tw::bits_of(value);
  const uint16_t half = tw::f32_to_f16(value);
  const auto upper = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kF32) {
    std::memcpy(at, &bits, sizeof bits);
  } else {
    std::memcpy(at, dtype == DType::kBF16 ? &upper : &half, sizeof half);
  }
}

}  // namespace

TEST(every_format_dequantises_to_the_vectors_exactly) {
  const std::vector<char> bytes = vectors();
  size_t at = 0;
  size_t num_formats = 0;
  while (at < bytes.size()) {
    const tw::DTypeInfo* info = tw::find_dtype(take<uint32_t>(bytes, at));
    CHECK(info != nullptr);
    if (info == nullptr) return;
    const auto num_blocks = take<uint32_t>(bytes, at);
    CHECK_EQ(take<uint32_t>(bytes, at), info->block_values);
    // One byte off any alignment, as data of a file may be.
    std::vector<char> blocks(size_t{num_blocks} * info->block_bytes + 1);
    std::memcpy(blocks.data() + 1, bytes.data() + at, blocks.size() - 1);
    at += blocks.size() - 1;
    const size_t num_values = size_t{num_blocks} * info->block_values;
    std::vector<float> values(num_values + 1, -12345.0f);
    tw::quant::dequantize_row(info->dtype, blocks.data() + 1, values.data(), static_cast<int64_t>(num_values));
    size_t num_different = 0;
    for (size_t i = 0; i < num_values; ++i) num_different += values[i] == take<float>(bytes, at) ? 0 : 1;
    CHECK_EQ(std::string(info->name) + ": " + std::to_string(num_different), std::string(info->name) + ": 0");
    CHECK_EQ(values[num_values], -12345.0f);
    CHECK(tw::quant::all_scales_finite(info->dtype, blocks.data() + 1, num_blocks));
    ++num_formats;
  }
  CHECK_EQ(num_formats, std::size(kAll));
}

TEST(a_scale_that_is_not_finite_is_found_in_any_block) {
  constexpr int64_t kBlocks = 5000;
  for (const DType dtype : kAll) {
    const size_t block_bytes = tw::dtype_info(dtype).block_bytes;
    std::vector<uint8_t> data(kBlocks * block_bytes, 0);
    CHECK(tw::quant::all_scales_finite(dtype, data.data(), kBlocks));
    for (const size_t offset : scale_offsets(dtype)) {
      for (const size_t block : {size_t{0}, size_t{4095}, size_t{4096}, size_t{kBlocks - 1}}) {
        for (const float value : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                                  std::numeric_limits<float>::quiet_NaN()}) {
          uint8_t* at = data.data() + block * block_bytes + offset;
          write_scale(dtype, at, value);
          CHECK(!tw::quant::all_scales_finite(dtype, data.data(), kBlocks));
          write_scale(dtype, at, 1.0f);
        }
      }
    }
    CHECK(tw::quant::all_scales_finite(dtype, data.data(), kBlocks));
  }
}

TEST(codes_are_never_taken_for_scales) {
  for (const DType dtype : kAll) {
    if (tw::dtype_info(dtype).block_values == 1) continue;
    std::vector<uint8_t> block(tw::dtype_info(dtype).block_bytes, 0xff);
    for (const size_t offset : scale_offsets(dtype)) write_scale(dtype, block.data() + offset, 0.5f);
    CHECK(tw::quant::all_scales_finite(dtype, block.data(), 1));
  }
}

TEST(half_conversions_agree_in_both_directions) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = tw::f16_to_f32(half);
    if (std::isnan(value)) {
      CHECK((half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0);
      CHECK(std::isnan(tw::f16_to_f32(tw::f32_to_f16(value))));
    } else {
      CHECK_EQ(tw::f32_to_f16(value), half);
    }
  }
}

TEST(rounding_to_half_is_to_nearest_with_ties_to_even) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const auto low = static_cast<uint16_t>(bits);
    const auto high = static_cast<uint16_t>(bits + 1);
    const float a = tw::f16_to_f32(low);
    const float b = tw::f16_to_f32(high);
    const float middle = a + (b - a) / 2;
    CHECK_EQ(tw::f32_to_f16(middle), bits % 2 == 0 ? low : high);
    CHECK_EQ(tw::f32_to_f16(std::nextafter(middle, 0.0f)), low);
    CHECK_EQ(tw::f32_to_f16(std::nextafter(middle, b)), high);
  }
  CHECK_EQ(tw::f32_to_f16(65519.0f), 0x7bff);
  CHECK_EQ(tw::f32_to_f16(65520.0f), 0x7c00);
  CHECK_EQ(tw::f32_to_f16(-1e30f), 0xfc00);
}

TEST(a_k_block_by_hand) {
  tw::quant::BlockQ4_K block = {};
  block.scale = tw::f32_to_f16(0.5f);
  block.min_scale = tw::f32_to_f16(0.25f);
  block.groups[1] = 3;            // scale of group 1
  block.groups[5] = 4;            // minimum of group 1
  block.groups[2] = 1 << 6;       // bits 4 and 5 of the scale of group 6
  block.groups[10] = 2 | 5 << 4;  // low bits of group 6: scale 2, minimum 5
  block.codes[7] = 9 << 4;        // value 7 of group 1
  block.codes[96 + 31] = 11;      // value 31 of group 6
  float values[256];
  tw::quant::dequantize_row(DType::kQ4_K, &block, values, 256);
  CHECK_EQ(values[32 + 7], 0.5f * 3 * 9 - 0.25f * 4);
  CHECK_EQ(values[32 + 8], -0.25f * 4);
  CHECK_EQ(values[6 * 32 + 31], 0.5f * (16 + 2) * 11 - 0.25f * 5);
  CHECK_EQ(values[0], 0.0f);
}
