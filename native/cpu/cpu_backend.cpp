#include "cpu/cpu_backend.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "core/aligned_buffer.h"
#include "core/arena.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"
#include "cpu/sampler.h"

namespace tw::cpu {
namespace {

int usable_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// Rows that one item of a row-wise operation takes; fewer rows than this are not worth waking other threads for.
constexpr int64_t kRowGrain = 8;

// Owns the memory of Activations for up to `max_rows` rows.
struct ActivationBuffer {
  Activations view;
  AlignedBuffer values, codes, scales, code_sums, sums;

  void allocate(int64_t max_rows, int64_t num_cols) {
    const auto count = static_cast<size_t>(max_rows * num_cols);
    const size_t blocks = count / static_cast<size_t>(kBlock);
    values = AlignedBuffer(count * sizeof(float), "activations");
    codes = AlignedBuffer(count * sizeof(int16_t), "activations");
    scales = AlignedBuffer(blocks * sizeof(float), "activations");
    code_sums = AlignedBuffer(2 * blocks * sizeof(int32_t), "activations");
    sums = AlignedBuffer(blocks * sizeof(float), "activations");
    view = {num_cols,           values.as<float>(),      codes.as<int16_t>(),
            scales.as<float>(), code_sums.as<int32_t>(), sums.as<float>()};
  }
  size_t num_bytes() const { return values.size() + codes.size() + scales.size() + code_sums.size() + sums.size(); }
};

// What a thread needs while it computes an item.
struct ThreadScratch {
  AlignedBuffer matmul;
  AlignedBuffer attention;
  SamplerScratch sampler;
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(int num_threads, int nice)
      : pool_(num_threads > 0 ? num_threads : usable_processors(), nice), kernels_(kernels_for(select_isa())) {}

  MatrixHandle add_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias) override {
    return keep(pack_matrix(parts, bias, &weights_));
  }
  MatrixHandle add_gate_up(const MatrixSource& gate, const MatrixSource& up) override {
    return keep(pack_gate_up(gate, up, &weights_));
  }
  VectorHandle add_vector(const std::vector<float>& values) override {
    vectors_.push_back(values);
    return {static_cast<int32_t>(vectors_.size() - 1)};
  }

  void prepare(const ModelShape& shape, const StepLimits& limits) override;
  void allocate_kv(int32_t num_blocks) override;
  void begin_step(const StepPlan& plan) override;
  void embed(MatrixHandle table) override;
  void project_qkv(VectorHandle gain, MatrixHandle qkv) override;
  void rope_append(int32_t layer) override;
  void attend(int32_t layer, MatrixHandle reader) override;
  void project_add(Activation input, MatrixHandle matrix) override;
  void feed_forward_up(VectorHandle gain, MatrixHandle gate_up) override;
  void project_logits(VectorHandle gain, MatrixHandle head) override;
  void draw(const std::vector<SampleJob>& jobs) override;
  void take_draws(std::vector<SampleResult>* results) override { *results = std::move(drawn_); }
  bool supports_masks() const override { return true; }
  void read_logits(int32_t index, float* out) override;
  void abandon_step() override {}
  DeviceInfo device_info() const override { return {"cpu", "", 0, ""}; }
  MemoryUse memory_use() const override;
  int64_t free_bytes() const override;
  std::string check_residency() const override;
  void inject(Fault fault) override;

 private:
  // One tile of queries of one slice and kv head.
  struct AttentionItem {
    int32_t slice;
    int32_t kv_head;
    int32_t first;     // of the slice's (row, head of the group) pairs, row-major
    int32_t num_rows;  // such pairs
  };

  MatrixHandle keep(PackedMatrix matrix) {
    matrices_.push_back(std::move(matrix));
    return {static_cast<int32_t>(matrices_.size() - 1)};
  }
  const PackedMatrix& matrix(MatrixHandle handle) const { return matrices_[static_cast<size_t>(handle.index)]; }
  const float* vector(VectorHandle handle) const { return vectors_[static_cast<size_t>(handle.index)].data(); }

  // Calls body(begin, end) over row ranges, on several threads if there are enough rows.
  template <class Body>
  void for_rows(int64_t num_rows, const Body& body) {
    if (num_rows <= kRowGrain) {
      body(int64_t{0}, num_rows);
      return;
    }
    pool_.for_each((num_rows + kRowGrain - 1) / kRowGrain,
                   [&](int64_t item, int) { body(item * kRowGrain, std::min(num_rows, (item + 1) * kRowGrain)); });
  }

  void normalize(const float* x, VectorHandle gain, const PackedMatrix& next, int64_t num_rows);
  void run_matmul(const MatmulTask& task, int64_t num_rows);
  MatmulTask task(MatrixHandle handle, const Activations& input, float* out, int64_t out_stride,
                  Epilogue epilogue) const {
    const PackedMatrix& weights = matrix(handle);
    return {&weights, weights.bias.empty() ? nullptr : weights.bias.data(), input, out, out_stride, epilogue, {}};
  }
  AttentionTile make_tile(const AttentionItem& item, float** outputs);
  KvLayer kv_layer(int32_t layer);

  ThreadPool pool_;
  const Kernels& kernels_;
  Arena weights_{"weights"};
  std::vector<PackedMatrix> matrices_;
  std::vector<std::vector<float>> vectors_;
  std::vector<SampleResult> drawn_;  // not yet taken
  std::vector<ThreadScratch> scratch_;
  std::atomic<bool> foreign_memory_{false};

  ModelShape shape_;
  StepLimits limits_;
  int64_t qkv_size_ = 0;
  AlignedBuffer kv_;
  int64_t kv_layer_values_ = 0;  // of one block in one layer

  const StepPlan* plan_ = nullptr;
  std::vector<int32_t> slice_of_row_;
  AlignedBuffer hidden_;                   // [rows, hidden_size]
  ActivationBuffer normed_;                // [rows, hidden_size]
  AlignedBuffer qkv_;                      // [rows, qkv_size]
  ActivationBuffer attention_;             // [rows, num_heads * head_dim]
  ActivationBuffer feed_forward_;          // [rows, ffn_size]
  bool feed_forward_needs_float_ = false;  // by any layer's matrix
  bool feed_forward_quantized_ = false;    // by the product that made it
  AlignedBuffer picked_;                   // [logit rows, hidden_size]
  AlignedBuffer logits_;                   // [logit rows, vocab_size]
  std::vector<AttentionItem> items_;
  std::vector<float> partials_;  // split-parallel attention: [items, splits, rows of a tile, head_dim]
  std::vector<AttentionState> partial_states_;
};

void CpuBackend::prepare(const ModelShape& shape, const StepLimits& limits) {
  shape_ = shape;
  limits_ = limits;
  const int64_t rows = limits.max_rows;
  const int64_t attention_size = int64_t{shape.num_heads} * shape.head_dim;
  qkv_size_ = attention_size + int64_t{2} * shape.num_kv_heads * shape.head_dim;
  if (shape.head_dim % 16 != 0 || shape.hidden_size % kBlock != 0 || attention_size % kBlock != 0 ||
      shape.ffn_size % kBlock != 0) {
    throw Error(ErrorCode::kUnsupportedModel,
                "the CPU backend needs a head size divisible by 16 and layer widths divisible by 32");
  }
  const auto floats = [](int64_t count) { return static_cast<size_t>(count) * sizeof(float); };
  hidden_ = AlignedBuffer(floats(rows * shape.hidden_size), "activations");
  normed_.allocate(rows, shape.hidden_size);
  qkv_ = AlignedBuffer(floats(rows * qkv_size_), "activations");
  attention_.allocate(rows, attention_size);
  feed_forward_.allocate(rows, shape.ffn_size);
  picked_ = AlignedBuffer(floats(int64_t{limits.max_logit_rows} * shape.hidden_size), "activations");
  logits_ = AlignedBuffer(floats(int64_t{limits.max_logit_rows} * shape.vocab_size), "logits");
  slice_of_row_.resize(static_cast<size_t>(rows));
  feed_forward_needs_float_ = std::any_of(matrices_.begin(), matrices_.end(), [&](const PackedMatrix& matrix) {
    return matrix.num_cols == shape.ffn_size && matrix.needs_float;
  });

  kv_layer_values_ = int64_t{2} * shape.num_kv_heads * shape.head_dim * kBlockTokens;

  scratch_.resize(static_cast<size_t>(pool_.size()));
  for (ThreadScratch& scratch : scratch_) {
    scratch.matmul = AlignedBuffer(static_cast<size_t>(kMatmulScratchBytes), "scratch");
    // Scores, then the running and the split's values of each row of a tile.
    scratch.attention = AlignedBuffer(
        floats(attention_scratch_floats(shape.head_dim) + int64_t{2} * kAttentionRows * shape.head_dim), "scratch");
  }
}

void CpuBackend::allocate_kv(int32_t num_blocks) {
  kv_ = AlignedBuffer(static_cast<size_t>(kv_layer_values_ * shape_.num_layers * num_blocks) * sizeof(uint16_t),
                      "the KV pool");
}

void CpuBackend::begin_step(const StepPlan& plan) {
  plan_ = &plan;
  for (size_t slice = 0; slice < plan.slices.size(); ++slice) {
    for (int32_t row = 0; row < plan.slices[slice].num_rows; ++row) {
      slice_of_row_[static_cast<size_t>(plan.slices[slice].first_row + row)] = static_cast<int32_t>(slice);
    }
  }
}

void CpuBackend::embed(MatrixHandle table) {
  const PackedMatrix& source = matrix(table);
  for_rows(plan_->num_rows(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t id = plan_->token_ids[static_cast<size_t>(row)];
      const MatrixPart& part = source.part_of_row(id);
      kernels_.dequantize_row(part, id - part.first_column, source.num_cols,
                              hidden_.as<float>() + row * shape_.hidden_size);
    }
  });
}

void CpuBackend::normalize(const float* x, VectorHandle gain, const PackedMatrix& next, int64_t num_rows) {
  const NormOutput output = !next.needs_quantized ? NormOutput::kValues
                            : next.needs_float    ? NormOutput::kBoth
                                                  : NormOutput::kCodes;
  for_rows(num_rows, [&](int64_t begin, int64_t end) {
    kernels_.rms_norm(x, shape_.hidden_size, vector(gain), shape_.rms_eps, normed_.view, begin, end, output);
  });
}

// One row is split finely over tile pairs, since the threads share its bytes. Many rows are split over the threads too:
// each keeps its rows from one operation to the next, in its own caches, and reads all weights.
void CpuBackend::run_matmul(const MatmulTask& task, int64_t num_rows) {
  const int64_t num_pairs = task.matrix->num_pairs;
  const int64_t threads = pool_.size();
  const int64_t grain = task.epilogue == Epilogue::kSiluMulQuantize ? 2 : 1;
  const int64_t pairs_per_item =
      num_rows == 1 ? std::clamp<int64_t>(num_pairs / (threads * 8 * grain), 1, 8 / grain) * grain : grain;
  const int64_t pair_items = (num_pairs + pairs_per_item - 1) / pairs_per_item;
  const int64_t row_items = std::clamp<int64_t>(num_rows / 64, 1, threads);
  const int64_t rows_per_item = (num_rows + row_items - 1) / row_items;
  pool_.for_each(pair_items * row_items, [&](int64_t item, int thread) {
    const int64_t pair = item % pair_items * pairs_per_item;
    const int64_t row = item / pair_items * rows_per_item;
    kernels_.matmul(task, pair, std::min(pair + pairs_per_item, num_pairs), row,
                    std::min(row + rows_per_item, num_rows), scratch_[static_cast<size_t>(thread)].matmul.data());
  });
}

void CpuBackend::project_qkv(VectorHandle gain, MatrixHandle qkv) {
  normalize(hidden_.as<float>(), gain, matrix(qkv), plan_->num_rows());
  run_matmul(task(qkv, normed_.view, qkv_.as<float>(), qkv_size_, Epilogue::kStore), plan_->num_rows());
}

// A block's layers lie side by side: a few tokens touch little memory, and a block is one piece to copy.
KvLayer CpuBackend::kv_layer(int32_t layer) {
  return {kv_.as<uint16_t>() + layer * kv_layer_values_, kv_layer_values_ * shape_.num_layers, shape_.num_kv_heads,
          shape_.head_dim};
}

void CpuBackend::rope_append(int32_t layer) {
  const KvLayer kv = kv_layer(layer);
  const int32_t half = shape_.rope_dims / 2;
  const float query_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  const bool interleaved = shape_.rope == RopeKind::kInterleaved;
  for_rows(plan_->num_rows(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const SequenceSlice& slice = plan_->slices[static_cast<size_t>(slice_of_row_[static_cast<size_t>(row)])];
      const int32_t position = slice.position + static_cast<int32_t>(row) - slice.first_row;
      const float* cos = shape_.rope_cos.data() + int64_t{position} * half;
      const float* sin = shape_.rope_sin.data() + int64_t{position} * half;
      float* heads = qkv_.as<float>() + row * qkv_size_;
      kernels_.rope_heads(heads, shape_.num_heads, shape_.head_dim, shape_.rope_dims, interleaved, cos, sin,
                          query_scale);
      float* keys = heads + int64_t{shape_.num_heads} * shape_.head_dim;
      const float* values = keys + int64_t{shape_.num_kv_heads} * shape_.head_dim;
      kernels_.rope_heads(keys, shape_.num_kv_heads, shape_.head_dim, shape_.rope_dims, interleaved, cos, sin, 1.0f);
      for (int32_t head = 0; head < shape_.num_kv_heads; ++head) {
        const int64_t offset = int64_t{head} * shape_.head_dim;
        kernels_.store_kv(kv, slice.block_table[position / kBlockTokens], position % kBlockTokens, head, keys + offset,
                          values + offset);
      }
    }
  });
}

AttentionTile CpuBackend::make_tile(const AttentionItem& item, float** outputs) {
  const SequenceSlice& slice = plan_->slices[static_cast<size_t>(item.slice)];
  const int32_t group = shape_.num_heads / shape_.num_kv_heads;
  AttentionTile tile;
  tile.block_table = slice.block_table;
  tile.kv_head = item.kv_head;
  tile.num_rows = item.num_rows;
  for (int32_t i = 0; i < tile.num_rows; ++i) {
    const int32_t row = (item.first + i) / group;
    const int64_t head = int64_t{item.kv_head} * group + (item.first + i) % group;
    const int64_t step_row = slice.first_row + row;
    tile.queries[i] = qkv_.as<float>() + step_row * qkv_size_ + head * shape_.head_dim;
    tile.num_keys[i] = slice.position + row + 1;
    outputs[i] = attention_.view.values + step_row * attention_.view.num_cols + head * shape_.head_dim;
  }
  return tile;
}

// Few tiles over long contexts are also split over keys; either way each row's splits are combined in order, so the
// result is the same.
void CpuBackend::attend(int32_t layer, MatrixHandle) {
  const KvLayer kv = kv_layer(layer);
  const int32_t group = shape_.num_heads / shape_.num_kv_heads;
  const int64_t head_dim = shape_.head_dim;
  items_.clear();
  // Large tiles widen keys and values less often; smaller ones leave enough items for all threads.
  const int64_t num_queries = plan_->num_rows() * group * shape_.num_kv_heads;
  const auto most_rows =
      static_cast<int32_t>(std::clamp<int64_t>(num_queries / (8 * pool_.size()), kAttentionRows / 2, kAttentionRows));
  int32_t most_splits = 1;
  int32_t tile_rows = 1;
  for (size_t s = 0; s < plan_->slices.size(); ++s) {
    const SequenceSlice& slice = plan_->slices[s];
    const int32_t last_key = slice.position + slice.num_rows;
    most_splits = std::max(most_splits, (last_key + kSplitTokens - 1) / kSplitTokens);
    for (int32_t first = 0; first < slice.num_rows * group; first += most_rows) {
      const int32_t rows = std::min(most_rows, slice.num_rows * group - first);
      tile_rows = std::max(tile_rows, rows);
      for (int32_t kv_head = 0; kv_head < shape_.num_kv_heads; ++kv_head) {
        items_.push_back({static_cast<int32_t>(s), kv_head, first, rows});
      }
    }
  }
  const auto num_items = static_cast<int64_t>(items_.size());
  const auto splits_of = [](const AttentionTile& tile) {
    return (tile.num_keys[tile.num_rows - 1] + kSplitTokens - 1) / kSplitTokens;
  };

  if (num_items >= 4 * pool_.size() || most_splits == 1) {
    pool_.for_each(num_items, [&](int64_t index, int thread) {
      float* outputs[kAttentionRows];
      const AttentionTile tile = make_tile(items_[static_cast<size_t>(index)], outputs);
      float* scores = scratch_[static_cast<size_t>(thread)].attention.as<float>();
      float* values = scores + attention_scratch_floats(shape_.head_dim);
      AttentionState totals[kAttentionRows];
      AttentionState parts[kAttentionRows];
      for (int32_t i = 0; i < tile.num_rows; ++i) {
        totals[i].values = values + int64_t{2} * i * head_dim;
        parts[i].values = values + (int64_t{2} * i + 1) * head_dim;
      }
      kernels_.attend_split(kv, tile, 0, totals, scores);
      for (int32_t split = 1; split < splits_of(tile); ++split) {
        kernels_.attend_split(kv, tile, split, parts, scores);
        for (int32_t i = 0; i < tile.num_rows; ++i) kernels_.combine_splits(&totals[i], parts[i], shape_.head_dim);
      }
      for (int32_t i = 0; i < tile.num_rows; ++i) {
        kernels_.finish_attention(totals[i], shape_.head_dim, outputs[i]);
      }
    });
    return;
  }

  const auto num_states = static_cast<size_t>(num_items * most_splits * tile_rows);
  partials_.resize(num_states * static_cast<size_t>(head_dim));
  partial_states_.resize(num_states);
  for (size_t i = 0; i < num_states; ++i)
    partial_states_[i].values = partials_.data() + i * static_cast<size_t>(head_dim);
  pool_.for_each(num_items * most_splits, [&](int64_t index, int thread) {
    float* outputs[kAttentionRows];
    const AttentionTile tile = make_tile(items_[static_cast<size_t>(index / most_splits)], outputs);
    const auto split = static_cast<int32_t>(index % most_splits);
    if (split >= splits_of(tile)) return;
    kernels_.attend_split(kv, tile, split, partial_states_.data() + index * tile_rows,
                          scratch_[static_cast<size_t>(thread)].attention.as<float>());
  });
  pool_.for_each(num_items, [&](int64_t index, int thread) {
    float* outputs[kAttentionRows];
    const AttentionTile tile = make_tile(items_[static_cast<size_t>(index)], outputs);
    float* values =
        scratch_[static_cast<size_t>(thread)].attention.as<float>() + attention_scratch_floats(shape_.head_dim);
    for (int32_t i = 0; i < tile.num_rows; ++i) {
      AttentionState total;
      total.values = values;
      for (int32_t split = 0; split < splits_of(tile); ++split) {
        kernels_.combine_splits(&total,
                                partial_states_[static_cast<size_t>((index * most_splits + split) * tile_rows + i)],
                                shape_.head_dim);
      }
      kernels_.finish_attention(total, shape_.head_dim, outputs[i]);
    }
  });
}

void CpuBackend::project_add(Activation input, MatrixHandle handle) {
  const bool attention = input == Activation::kAttention;
  const Activations& in = attention ? attention_.view : feed_forward_.view;
  if (matrix(handle).needs_quantized && (attention || !feed_forward_quantized_)) {
    for_rows(plan_->num_rows(), [&](int64_t begin, int64_t end) { kernels_.quantize_rows(in, begin, end); });
  }
  run_matmul(task(handle, in, hidden_.as<float>(), shape_.hidden_size, Epilogue::kAdd), plan_->num_rows());
}

void CpuBackend::feed_forward_up(VectorHandle gain, MatrixHandle gate_up) {
  normalize(hidden_.as<float>(), gain, matrix(gate_up), plan_->num_rows());
  feed_forward_quantized_ = matrix(gate_up).needs_quantized && !feed_forward_needs_float_;
  MatmulTask product = task(gate_up, normed_.view, feed_forward_.view.values, shape_.ffn_size,
                            feed_forward_quantized_ ? Epilogue::kSiluMulQuantize : Epilogue::kSiluMul);
  product.quantized_out = feed_forward_.view;
  run_matmul(product, plan_->num_rows());
}

void CpuBackend::project_logits(VectorHandle gain, MatrixHandle head) {
  const auto num_rows = static_cast<int64_t>(plan_->logit_rows.size());
  const int64_t hidden_size = shape_.hidden_size;
  for (int64_t i = 0; i < num_rows; ++i) {
    std::memcpy(picked_.as<float>() + i * hidden_size,
                hidden_.as<float>() + plan_->logit_rows[static_cast<size_t>(i)] * hidden_size,
                static_cast<size_t>(hidden_size) * sizeof(float));
  }
  normalize(picked_.as<float>(), gain, matrix(head), num_rows);
  run_matmul(task(head, normed_.view, logits_.as<float>(), shape_.vocab_size, Epilogue::kStore), num_rows);
}

void CpuBackend::draw(const std::vector<SampleJob>& jobs) {
  drawn_.resize(jobs.size());
  pool_.for_each(static_cast<int64_t>(jobs.size()), [&](int64_t row, int thread) {
    drawn_[static_cast<size_t>(row)] =
        sample_row(kernels_, logits_.as<float>() + row * shape_.vocab_size, shape_.vocab_size,
                   jobs[static_cast<size_t>(row)], &scratch_[static_cast<size_t>(thread)].sampler);
  });
}

void CpuBackend::read_logits(int32_t index, float* out) {
  std::memcpy(out, logits_.as<float>() + int64_t{index} * shape_.vocab_size,
              static_cast<size_t>(shape_.vocab_size) * sizeof(float));
}

MemoryUse CpuBackend::memory_use() const {
  MemoryUse use;
  for (const PackedMatrix& matrix : matrices_) use.weight_bytes += matrix.num_bytes();
  for (const auto& values : vectors_) use.weight_bytes += static_cast<int64_t>(values.size() * sizeof(float));
  use.kv_bytes = static_cast<int64_t>(kv_.size());
  use.workspace_bytes = static_cast<int64_t>(hidden_.size() + normed_.num_bytes() + qkv_.size() +
                                             attention_.num_bytes() + feed_forward_.num_bytes() + picked_.size() +
                                             logits_.size() + partials_.capacity() * sizeof(float));
  for (const ThreadScratch& scratch : scratch_) {
    use.workspace_bytes += static_cast<int64_t>(scratch.matmul.size() + scratch.attention.size());
  }
  return use;
}

int64_t CpuBackend::free_bytes() const {
  const MemoryUse use = memory_use();
  const int64_t machine = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  return std::max<int64_t>(0, machine - use.weight_bytes - use.kv_bytes - use.workspace_bytes);
}

// All memory is the CPU's own, so only an injected fault is a violation.
std::string CpuBackend::check_residency() const {
  return foreign_memory_ ? "weights are reported in foreign memory by an injected fault" : "";
}

void CpuBackend::inject(Fault fault) {
  switch (fault) {
    case Fault::kOutOfMemory: throw Error(ErrorCode::kVramOom, "the step has no memory: an injected fault");
    case Fault::kDeviceError: throw Error(ErrorCode::kCudaError, "the device failed: an injected fault");
    case Fault::kHostMemory: foreign_memory_ = true;
  }
}

}  // namespace

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Vnni) return avx512::kernels();
  if (isa == Isa::kAvx2) return avx2::kernels();
#endif
  (void)isa;
  return portable::kernels();
}

std::unique_ptr<Backend> make_cpu_backend(int num_threads, int nice) {
  return std::make_unique<CpuBackend>(num_threads, nice);
}

}  // namespace tw::cpu
