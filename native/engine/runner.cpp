#include "engine/runner.h"

#include <algorithm>
#include <set>
#include <string>

#include "core/error.h"
#include "engine/backend_factory.h"
#include "engine/sizing.h"

namespace tw {

Runner::Runner(const gguf::File& file, const EngineOptions& options)
    : backend_(std::make_unique<ProfilingBackend>(make_backend(options.device, options.num_threads))),
      model_(load_model(file, backend_.get(), options.max_context_tokens, [](int) {})),
      max_rows_(options.max_batch_tokens > 0 ? options.max_batch_tokens : 256) {
  StepLimits limits;
  limits.max_rows = max_rows_;
  limits.max_logit_rows = max_rows_;
  backend_->prepare(model_->shape(), limits);
  const int64_t wanted_tokens = std::max(model_->shape().context_length, 32768);
  const int32_t num_kv_blocks = choose_kv_blocks(model_->shape(), options.kv_cache_bytes, wanted_tokens, *backend_);
  backend_->allocate_kv(num_kv_blocks);
  pool_ = std::make_unique<KvPool>(num_kv_blocks, false);
}

void Runner::append(int32_t sequence, const int32_t* ids, int32_t count) {
  State& state = states_[sequence];
  const int32_t total = state.num_tokens + count;
  if (total > model_->shape().context_length) {
    throw Error(ErrorCode::kContextLengthExceeded,
                "the context holds " + std::to_string(model_->shape().context_length) + " tokens");
  }
  while (static_cast<int32_t>(state.block_table.size()) * kBlockTokens < total) {
    if (!pool_->can_allocate(1)) throw Error(ErrorCode::kKvCapacity, "the KV pool is full");
    state.block_table.push_back(pool_->allocate());
  }
  for (int32_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= model_->shape().vocab_size) {
      throw Error(ErrorCode::kInvalidRequest, "token id " + std::to_string(ids[i]) + " is outside the vocabulary");
    }
  }
  plan_.slices.push_back({plan_.num_rows(), count, state.num_tokens, state.block_table.data()});
  plan_.token_ids.insert(plan_.token_ids.end(), ids, ids + count);
  state.num_tokens = total;
}

void Runner::run(std::vector<float>* logits) {
  model_->forward(backend_.get(), plan_);
  const auto vocab = static_cast<size_t>(model_->shape().vocab_size);
  const size_t before = logits->size();
  logits->resize(before + plan_.logit_rows.size() * vocab);
  for (size_t i = 0; i < plan_.logit_rows.size(); ++i) {
    backend_->read_logits(static_cast<int32_t>(i), logits->data() + before + i * vocab);
  }
}

std::vector<float> Runner::forward(int32_t sequence, const std::vector<int32_t>& ids, bool all_logits) {
  std::vector<float> logits;
  const auto total = static_cast<int32_t>(ids.size());
  for (int32_t begin = 0; begin < total; begin += max_rows_) {
    const int32_t count = std::min(max_rows_, total - begin);
    plan_.clear();
    append(sequence, ids.data() + begin, count);
    for (int32_t row = 0; row < count; ++row) {
      if (all_logits || begin + row == total - 1) plan_.logit_rows.push_back(row);
    }
    run(&logits);
  }
  return logits;
}

std::vector<float> Runner::forward_batch(const std::vector<int32_t>& sequences, const std::vector<int32_t>& ids) {
  if (sequences.size() != ids.size() || sequences.size() > static_cast<size_t>(max_rows_)) {
    throw Error(ErrorCode::kInvalidRequest,
                "one token for each of at most " + std::to_string(max_rows_) + " sequences");
  }
  if (std::set<int32_t>(sequences.begin(), sequences.end()).size() != sequences.size()) {
    throw Error(ErrorCode::kInvalidRequest, "a sequence is named twice");
  }
  plan_.clear();
  for (size_t i = 0; i < ids.size(); ++i) {
    append(sequences[i], &ids[i], 1);
    plan_.logit_rows.push_back(static_cast<int32_t>(i));
  }
  std::vector<float> logits;
  run(&logits);
  return logits;
}

void Runner::reset() {
  for (auto& [name, state] : states_) {
    for (const int32_t block : state.block_table) pool_->release(block);
  }
  states_.clear();
}

}  // namespace tw
