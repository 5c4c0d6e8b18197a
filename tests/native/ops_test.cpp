// Every CPU kernel against float64, on every instruction set this machine has, with guard values around outputs; and
// the same bits on all of them, for any number of rows (W-42).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "cpu/kernels.h"
#include "cpu/packed_matrix.h"
#include "cpu/sampler.h"
#include "quant/formats.h"

namespace {

using namespace tw;
using namespace tw::cpu;

constexpr float kGuard = 12345.0f;

// Weights of all tests.
Arena& arena() {
  static Arena arena("weights");
  return arena;
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::kAvx512Vnni, Isa::kAvx2, Isa::kPortable}) {
    if (isa <= select_isa()) isas.push_back(isa);
  }
  return isas;
}

// Random rows of a format: random bytes, with the 16-bit scales replaced by moderate ones.
std::vector<uint8_t> random_rows(DType dtype, int64_t rows, int64_t cols, std::mt19937* random) {
  const DTypeInfo& info = dtype_info(dtype);
  std::vector<uint8_t> data(static_cast<size_t>(rows * cols / info.block_values * info.block_bytes));
  std::uniform_real_distribution<float> real(-1.0f, 1.0f);
  const auto half = [&](uint8_t* at) {
    const uint16_t bits = f32_to_f16(real(*random) * 0.02f);
    std::memcpy(at, &bits, sizeof bits);
  };
  for (size_t block = 0; block < data.size(); block += info.block_bytes) {
    uint8_t* at = data.data() + block;
    for (uint32_t i = 0; i < info.block_bytes; ++i) at[i] = static_cast<uint8_t>((*random)());
    switch (dtype) {
      case DType::kF32: {
        const float value = real(*random);
        std::memcpy(at, &value, sizeof value);
        break;
      }
      case DType::kF16: half(at); break;
      case DType::kBF16: {
        const uint32_t bits = bits_of(real(*random));
        const auto top = static_cast<uint16_t>(bits >> 16);
        std::memcpy(at, &top, sizeof top);
        break;
      }
      case DType::kQ6_K: half(at + 208); break;
      case DType::kQ4_K:
      case DType::kQ5_K:
      case DType::kQ4_1:
      case DType::kQ5_1: half(at + 2); [[fallthrough]];
      default: half(at);
    }
  }
  return data;
}

// Activations with an outlier, as real ones have.
struct Input {
  Input(int64_t rows, int64_t cols, std::mt19937* random)
      : values(static_cast<size_t>(rows * cols)),
        codes(values.size()),
        scales(values.size() / 32),
        sums(values.size() / 32),
        code_sums(values.size() / 16) {
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(*random);
    for (int64_t row = 0; row < rows; ++row) values[static_cast<size_t>(row * cols + row % cols)] *= 60.0f;
    view = {cols, values.data(), codes.data(), scales.data(), code_sums.data(), sums.data()};
  }
  std::vector<float> values;
  std::vector<int16_t> codes;
  std::vector<float> scales, sums;
  std::vector<int32_t> code_sums;
  Activations view;
};

std::vector<float> multiply(const Kernels& kernels, const PackedMatrix& matrix, const Input& input, int64_t rows,
                            int64_t begin, int64_t end, const std::vector<float>& bias, Epilogue epilogue,
                            float initial) {
  const int64_t stride = matrix.num_rows + 3;
  std::vector<float> out(static_cast<size_t>(rows * stride), kGuard);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < matrix.num_rows; ++n) out[static_cast<size_t>(row * stride + n)] = initial;
  }
  std::vector<uint8_t> scratch(static_cast<size_t>(kMatmulScratchBytes) + 64, 0xAB);
  const MatmulTask task = {&matrix, bias.empty() ? nullptr : bias.data(), input.view, out.data(), stride, epilogue, {}};
  kernels.matmul(task, 0, matrix.num_pairs, begin, end, scratch.data());
  for (size_t i = scratch.size() - 64; i < scratch.size(); ++i) CHECK_EQ(int{scratch[i]}, 0xAB);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = matrix.num_rows; n < stride; ++n) CHECK_EQ(out[static_cast<size_t>(row * stride + n)], kGuard);
  }
  return out;
}

constexpr DType kFormats[] = {DType::kF32,  DType::kF16,  DType::kBF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4_1,
                              DType::kQ5_0, DType::kQ5_1, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

struct Shape {
  int64_t outputs, inputs, rows;
};
// The next multiple of a format's block.
int64_t whole_blocks(DType dtype, int64_t cols) {
  const int64_t block = dtype_info(dtype).block_values;
  return (cols + block - 1) / block * block;
}

constexpr Shape kShapes[] = {{16, 32, 1}, {32, 64, 2}, {33, 96, 3}, {80, 160, 7}, {48, 576, 13}, {100, 320, 29}};

}  // namespace

TEST(matmul_agrees_with_float64_and_with_itself) {
  std::mt19937 random(7);
  for (const DType dtype : kFormats) {
    for (Shape shape : kShapes) {
      shape.inputs = whole_blocks(dtype, shape.inputs);
      const std::vector<uint8_t> weights = random_rows(dtype, shape.outputs, shape.inputs, &random);
      std::vector<float> bias(static_cast<size_t>(shape.outputs));
      for (float& value : bias) value = static_cast<float>(random() % 100) / 50.0f;
      const PackedMatrix matrix = pack_matrix({{dtype, shape.outputs, shape.inputs, weights.data()}}, bias, &arena());
      std::vector<float> plain(static_cast<size_t>(shape.outputs * shape.inputs));
      quant::dequantize_row(dtype, weights.data(), plain.data(), shape.outputs * shape.inputs);
      Input input(shape.rows, shape.inputs, &random);

      std::vector<float> first;
      for (const Isa isa : usable_isas()) {
        const Kernels& kernels = kernels_for(isa);
        if (matrix.needs_quantized) kernels.quantize_rows(input.view, 0, shape.rows);
        const std::vector<float> out =
            multiply(kernels, matrix, input, shape.rows, 0, shape.rows, bias, Epilogue::kAdd, 0.5f);
        if (first.empty()) {
          first = out;
          for (int64_t row = 0; row < shape.rows; ++row) {
            for (int64_t n = 0; n < shape.outputs; ++n) {
              double exact = 0.5 + static_cast<double>(bias[static_cast<size_t>(n)]);
              double bound = 1e-6;  // half an activation code for each product, and float rounding
              for (int64_t k = 0; k < shape.inputs; ++k) {
                const double term = double{plain[static_cast<size_t>(n * shape.inputs + k)]} *
                                    double{input.values[static_cast<size_t>(row * shape.inputs + k)]};
                exact += term;
                const size_t block = static_cast<size_t>(row * shape.inputs + k) / 32;
                const double half_code = matrix.needs_quantized ? double{input.scales[block]} / 2 : 0;
                bound += std::fabs(double{plain[static_cast<size_t>(n * shape.inputs + k)]}) * half_code +
                         1e-6 * std::fabs(term);
              }
              const double error = std::fabs(exact - double{out[static_cast<size_t>(row * (shape.outputs + 3) + n)]});
              CHECK(error <= bound * 1.01);
            }
          }
        }
        CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0);
        // Each row alone, and a range from the middle.
        for (int64_t row = 0; row < shape.rows; ++row) {
          const std::vector<float> alone =
              multiply(kernels, matrix, input, shape.rows, row, row + 1, bias, Epilogue::kAdd, 0.5f);
          const auto offset = static_cast<size_t>(row * (shape.outputs + 3));
          CHECK(std::memcmp(&first[offset], &alone[offset], static_cast<size_t>(shape.outputs) * sizeof(float)) == 0);
        }
        if (shape.rows > 4) {
          const std::vector<float> middle =
              multiply(kernels, matrix, input, shape.rows, 1, shape.rows - 1, bias, Epilogue::kAdd, 0.5f);
          const auto offset = static_cast<size_t>(shape.outputs + 3);
          const auto count = static_cast<size_t>((shape.rows - 2) * (shape.outputs + 3));
          CHECK(std::memcmp(&first[offset], &middle[offset], count * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST(matmul_of_several_formats_writes_each_part_in_its_place) {
  std::mt19937 random(8);
  const auto a = random_rows(DType::kQ4_1, 40, 64, &random);
  const auto b = random_rows(DType::kQ8_0, 24, 64, &random);
  const PackedMatrix both =
      pack_matrix({{DType::kQ4_1, 40, 64, a.data()}, {DType::kQ8_0, 24, 64, b.data()}}, {}, &arena());
  const PackedMatrix only_b = pack_matrix({{DType::kQ8_0, 24, 64, b.data()}}, {}, &arena());
  Input input(5, 64, &random);
  const Kernels& kernels = kernels_for(select_isa());
  kernels.quantize_rows(input.view, 0, 5);
  const auto out = multiply(kernels, both, input, 5, 0, 5, {}, Epilogue::kStore, 0);
  const auto part = multiply(kernels, only_b, input, 5, 0, 5, {}, Epilogue::kStore, 0);
  for (size_t row = 0; row < 5; ++row) {
    CHECK(std::memcmp(&out[row * 67 + 40], &part[row * 27], 24 * sizeof(float)) == 0);
  }
}

TEST(gate_and_up_agree_with_float64) {
  std::mt19937 random(9);
  const auto gate = random_rows(DType::kQ4_0, 40, 96, &random);
  const auto up = random_rows(DType::kQ4_0, 40, 96, &random);
  const PackedMatrix matrix =
      pack_gate_up({DType::kQ4_0, 40, 96, gate.data()}, {DType::kQ4_0, 40, 96, up.data()}, &arena());
  std::vector<float> g(40 * 96), u(40 * 96);
  quant::dequantize_row(DType::kQ4_0, gate.data(), g.data(), 40 * 96);
  quant::dequantize_row(DType::kQ4_0, up.data(), u.data(), 40 * 96);
  Input input(9, 96, &random);
  std::vector<float> first;
  for (const Isa isa : usable_isas()) {
    const Kernels& kernels = kernels_for(isa);
    kernels.quantize_rows(input.view, 0, 9);
    const auto out = multiply(kernels, matrix, input, 9, 0, 9, {}, Epilogue::kSiluMul, 0);
    if (first.empty()) first = out;
    CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0);
    const auto alone = multiply(kernels, matrix, input, 9, 4, 5, {}, Epilogue::kSiluMul, 0);
    CHECK(std::memcmp(&first[4 * 43], &alone[4 * 43], 40 * sizeof(float)) == 0);
  }
  for (size_t row = 0; row < 9; ++row) {
    for (size_t n = 0; n < 40; ++n) {
      double a = 0, b = 0;
      for (size_t k = 0; k < 96; ++k) {
        a += double{g[n * 96 + k]} * double{input.values[row * 96 + k]};
        b += double{u[n * 96 + k]} * double{input.values[row * 96 + k]};
      }
      const double exact = a / (1 + std::exp(-a)) * b;
      CHECK(std::fabs(exact - double{first[row * 43 + n]}) < 1e-3 * (1 + std::fabs(exact)));
    }
  }
}

TEST(gate_and_up_leave_the_codes_that_quantising_their_product_gives) {
  std::mt19937 random(10);
  constexpr int64_t kOutputs = 96;
  constexpr int64_t kRows = 300;  // more than are computed at a time
  for (const DType dtype : {DType::kQ4_1, DType::kQ6_K}) {
    const int64_t cols = whole_blocks(dtype, 160);
    const auto gate = random_rows(dtype, kOutputs, cols, &random);
    const auto up = random_rows(dtype, kOutputs, cols, &random);
    const PackedMatrix matrix =
        pack_gate_up({dtype, kOutputs, cols, gate.data()}, {dtype, kOutputs, cols, up.data()}, &arena());
    Input input(kRows, cols, &random);
    std::vector<float> zero(static_cast<size_t>(cols));
    std::copy(zero.begin(), zero.end(), input.values.begin() + 5 * cols);
    Input product(kRows, kOutputs, &random);
    Input codes(kRows, kOutputs, &random);
    for (const Isa isa : usable_isas()) {
      const Kernels& kernels = kernels_for(isa);
      kernels.quantize_rows(input.view, 0, kRows);
      std::vector<uint8_t> scratch(static_cast<size_t>(kMatmulScratchBytes) + 64, 0xAB);
      MatmulTask task = {&matrix, nullptr, input.view, product.values.data(), kOutputs, Epilogue::kSiluMul, {}};
      kernels.matmul(task, 0, matrix.num_pairs, 0, kRows, scratch.data());
      kernels.quantize_rows(product.view, 0, kRows);
      task.epilogue = Epilogue::kSiluMulQuantize;
      task.quantized_out = codes.view;
      for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 1}, {1, 20}, {20, kRows}}) {
        for (int64_t pair = 0; pair < matrix.num_pairs; pair += 2) {
          kernels.matmul(task, pair, pair + 2, begin, end, scratch.data());
        }
      }
      CHECK(product.codes == codes.codes);
      CHECK(product.scales == codes.scales);
      CHECK(product.sums == codes.sums);
      CHECK(product.code_sums == codes.code_sums);
      for (size_t i = scratch.size() - 64; i < scratch.size(); ++i) CHECK_EQ(int{scratch[i]}, 0xAB);
      std::fill(codes.codes.begin(), codes.codes.end(), int16_t{7});
    }
  }
}

TEST(rows_that_are_no_whole_number_of_blocks_are_refused) {
  const std::vector<uint8_t> zeros(1 << 16);
  for (const DType dtype : kFormats) {
    const auto block = std::max<int64_t>(32, dtype_info(dtype).block_values);
    CHECK_EQ(pack_matrix({{dtype, 3, 2 * block, zeros.data()}}, {}, &arena()).num_pairs, 1);
    for (const int64_t cols : {block / 2, block + block / 2}) {
      CHECK_THROWS(ErrorCode::kUnsupportedModel, "a whole number of " + std::to_string(block),
                   pack_matrix({{dtype, 3, cols, zeros.data()}}, {}, &arena()));
    }
  }
}

TEST(a_row_of_a_packed_matrix_can_be_read_back) {
  std::mt19937 random(10);
  for (const DType dtype : kFormats) {
    const int64_t cols = whole_blocks(dtype, 96);
    const auto width = static_cast<size_t>(cols);
    const auto weights = random_rows(dtype, 50, cols, &random);
    const PackedMatrix matrix = pack_matrix({{dtype, 50, cols, weights.data()}}, {}, &arena());
    std::vector<float> plain(50 * width);
    quant::dequantize_row(dtype, weights.data(), plain.data(), 50 * cols);
    for (const Isa isa : usable_isas()) {
      for (int64_t row = 0; row < 50; ++row) {
        std::vector<float> out(width + 1, kGuard);
        kernels_for(isa).dequantize_row(matrix.part_of_row(row), row, cols, out.data());
        CHECK_EQ(out[width], kGuard);
        CHECK(std::memcmp(out.data(), &plain[static_cast<size_t>(row) * width], width * sizeof(float)) == 0);
      }
    }
  }
}

TEST(rms_norm_agrees_with_float64) {
  std::mt19937 random(11);
  Input input(3, 160, &random);
  std::vector<float> gain(160);
  for (float& value : gain) value = static_cast<float>(random() % 100) / 50.0f;
  std::vector<float> first;
  for (const Isa isa : usable_isas()) {
    Input out(3, 160, &random);
    kernels_for(isa).rms_norm(input.values.data(), 160, gain.data(), 1e-5f, out.view, 0, 3, NormOutput::kBoth);
    Input codes_only(3, 160, &random);
    kernels_for(isa).rms_norm(input.values.data(), 160, gain.data(), 1e-5f, codes_only.view, 0, 3, NormOutput::kCodes);
    CHECK(out.codes == codes_only.codes);
    CHECK(out.sums == codes_only.sums);
    if (first.empty()) first = out.values;
    CHECK(std::memcmp(first.data(), out.values.data(), first.size() * sizeof(float)) == 0);
  }
  for (size_t row = 0; row < 3; ++row) {
    double squares = 0;
    for (size_t i = 0; i < 160; ++i) squares += std::pow(double{input.values[row * 160 + i]}, 2);
    for (size_t i = 0; i < 160; ++i) {
      const double exact = double{input.values[row * 160 + i]} / std::sqrt(squares / 160 + 1e-5) * double{gain[i]};
      CHECK(std::fabs(exact - double{first[row * 160 + i]}) < 1e-5 * (1 + std::fabs(exact)));
    }
  }
}

TEST(rope_agrees_with_float64) {
  std::mt19937 random(13);
  struct RopeCase {
    int32_t head_dim, rope_dims;
    bool interleaved;
  };
  for (const RopeCase& c :
       {RopeCase{64, 64, true}, {64, 64, false}, {80, 48, true}, {80, 32, false}, {80, 20, true}, {48, 40, false}}) {
    const int32_t half = c.rope_dims / 2;
    std::vector<float> cos, sin, first;
    for (int32_t i = 0; i < half; ++i) {
      cos.push_back(std::cos(0.37f * static_cast<float>(i)));
      sin.push_back(std::sin(0.37f * static_cast<float>(i)));
    }
    std::vector<float> heads(static_cast<size_t>(3 * c.head_dim));
    for (float& value : heads) value = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
    for (const Isa isa : usable_isas()) {
      std::vector<float> out = heads;
      out.push_back(kGuard);
      kernels_for(isa).rope_heads(out.data(), 3, c.head_dim, c.rope_dims, c.interleaved, cos.data(), sin.data(), 0.5f);
      CHECK_EQ(out.back(), kGuard);
      if (first.empty()) first = out;
      CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0);
    }
    for (int32_t head = 0; head < 3; ++head) {
      const float* before = &heads[static_cast<size_t>(head * c.head_dim)];
      const float* after = &first[static_cast<size_t>(head * c.head_dim)];
      for (int32_t i = 0; i < half; ++i) {
        const int32_t a = c.interleaved ? 2 * i : i;
        const int32_t b = c.interleaved ? 2 * i + 1 : i + half;
        const auto n = static_cast<size_t>(i);
        const double x = 0.5 * (double{before[a]} * double{cos[n]} - double{before[b]} * double{sin[n]});
        const double y = 0.5 * (double{before[b]} * double{cos[n]} + double{before[a]} * double{sin[n]});
        CHECK(std::fabs(x - double{after[a]}) < 1e-6 && std::fabs(y - double{after[b]}) < 1e-6);
      }
      for (int32_t i = c.rope_dims; i < c.head_dim; ++i) CHECK_EQ(after[i], 0.5f * before[i]);
    }
  }
}

// Attention over a context that ends inside a split and inside a block, each row with its own end.
TEST(attention_agrees_with_float64_whatever_the_tile) {
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  for (const int32_t head_dim : {16, 64, 80, 128}) {
    const int32_t num_keys = 2 * kSplitTokens + 37;
    const int32_t num_blocks = (num_keys + kBlockTokens - 1) / kBlockTokens;
    KvLayer layer;
    layer.num_kv_heads = 2;
    layer.head_dim = head_dim;
    layer.block_stride = int64_t{2} * 2 * head_dim * kBlockTokens;
    std::vector<uint16_t> cache(static_cast<size_t>(layer.block_stride * (num_blocks + 3)), 0x7bff);
    layer.blocks = cache.data();
    std::vector<int32_t> table;
    for (int32_t i = 0; i < num_blocks; ++i) table.push_back((i * 8 + 3) % num_blocks);
    std::vector<float> keys(static_cast<size_t>(num_keys * head_dim)), values(keys.size());
    const Kernels& writer = kernels_for(select_isa());
    for (int32_t t = 0; t < num_keys; ++t) {
      for (int32_t d = 0; d < head_dim; ++d) {
        const auto i = static_cast<size_t>(t * head_dim + d);
        keys[i] = normal(random);
        values[i] = normal(random);
      }
      writer.store_kv(layer, table[static_cast<size_t>(t / kBlockTokens)], t % kBlockTokens, 1,
                      &keys[static_cast<size_t>(t * head_dim)], &values[static_cast<size_t>(t * head_dim)]);
    }
    std::vector<float> queries(static_cast<size_t>(kAttentionRows * head_dim));
    for (float& value : queries) value = normal(random) / std::sqrt(static_cast<float>(head_dim));

    const auto attend = [&](const Kernels& kernels, int32_t first, int32_t count) {
      AttentionTile tile;
      tile.block_table = table.data();
      tile.kv_head = 1;
      tile.num_rows = count;
      std::vector<float> out(static_cast<size_t>(count * head_dim)), part(out.size()), total(out.size());
      std::vector<float> scratch(static_cast<size_t>(attention_scratch_floats(head_dim)) + 16, kGuard);
      AttentionState parts[kAttentionRows], totals[kAttentionRows];
      for (int32_t i = 0; i < count; ++i) {
        tile.queries[i] = &queries[static_cast<size_t>((first + i) * head_dim)];
        tile.num_keys[i] = num_keys - (kAttentionRows - 1 - (first + i)) * 5;
        parts[i].values = &part[static_cast<size_t>(i * head_dim)];
        totals[i].values = &total[static_cast<size_t>(i * head_dim)];
      }
      for (int32_t split = 0; split * kSplitTokens < num_keys; ++split) {
        kernels.attend_split(layer, tile, split, parts, scratch.data());
        for (int32_t i = 0; i < count; ++i) kernels.combine_splits(&totals[i], parts[i], head_dim);
      }
      for (int32_t i = 0; i < count; ++i) {
        kernels.finish_attention(totals[i], head_dim, &out[static_cast<size_t>(i * head_dim)]);
      }
      for (size_t i = scratch.size() - 16; i < scratch.size(); ++i) CHECK_EQ(scratch[i], kGuard);
      return out;
    };

    const std::vector<float> first = attend(kernels_for(select_isa()), 0, kAttentionRows);
    for (const Isa isa : usable_isas()) {
      const Kernels& kernels = kernels_for(isa);
      const std::vector<float> out = attend(kernels, 0, kAttentionRows);
      CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0);
      for (int32_t row = 0; row < kAttentionRows; ++row) {
        const std::vector<float> alone = attend(kernels, row, 1);
        CHECK(std::memcmp(&first[static_cast<size_t>(row * head_dim)], alone.data(), alone.size() * sizeof(float)) ==
              0);
      }
      for (const int32_t count : {5, 20}) {
        const std::vector<float> some = attend(kernels, 3, count);
        CHECK(std::memcmp(&first[static_cast<size_t>(3 * head_dim)], some.data(), some.size() * sizeof(float)) == 0);
      }
    }
    for (int32_t row = 0; row < kAttentionRows; ++row) {
      const int32_t count = num_keys - (kAttentionRows - 1 - row) * 5;
      std::vector<double> weights;
      double top = -1e300, total = 0;
      for (int32_t t = 0; t < count; ++t) {
        double score = 0;
        for (int32_t d = 0; d < head_dim; ++d) {
          score += double{queries[static_cast<size_t>(row * head_dim + d)]} *
                   double{f16_to_f32(f32_to_f16(keys[static_cast<size_t>(t * head_dim + d)]))};
        }
        weights.push_back(score);
        top = std::max(top, score);
      }
      for (double& weight : weights) total += weight = std::exp(weight - top);
      for (int32_t d = 0; d < head_dim; ++d) {
        double exact = 0;
        for (int32_t t = 0; t < count; ++t) {
          exact += weights[static_cast<size_t>(t)] / total *
                   double{f16_to_f32(f32_to_f16(values[static_cast<size_t>(t * head_dim + d)]))};
        }
        CHECK(std::fabs(exact - double{first[static_cast<size_t>(row * head_dim + d)]}) < 2e-6);
      }
    }
  }
}

TEST(exponentials_are_within_two_units_in_the_last_place) {
  std::vector<float> x;
  for (float value = -87.0f; value < 88.0f; value += 0.00731f) x.push_back(value);
  std::vector<float> e(x.size()), first, sums(x.size() / kExpRun + 1);
  for (const Isa isa : usable_isas()) {
    kernels_for(isa).exp_runs(x.data(), static_cast<int64_t>(x.size()), 0.0f, 1.0f, e.data(), sums.data());
    if (first.empty()) first = e;
    CHECK(std::memcmp(first.data(), e.data(), e.size() * sizeof(float)) == 0);
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(double{x[i]});
    CHECK(std::fabs(double{e[i]} - exact) < exact * 2.5e-7);
  }
}

TEST(values_that_are_not_finite_are_noticed) {
  for (const Isa isa : usable_isas()) {
    for (const size_t size : {1u, 15u, 16u, 17u, 100u}) {
      std::vector<float> x(size, 1.0f);
      bool finite = false;
      x[size / 2] = 3.0f;
      CHECK_EQ(kernels_for(isa).max_value(x.data(), static_cast<int64_t>(size), &finite), 3.0f);
      CHECK(finite);
      for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
        x[size - 1] = bad;
        kernels_for(isa).max_value(x.data(), static_cast<int64_t>(size), &finite);
        CHECK(!finite);
      }
    }
  }
}
