// A tiny model with random weights, and jobs for it: what tests of the token loop run.
#pragma once

#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/engine.h"
#include "gguf/file.h"

namespace tw::test {

constexpr int32_t kVocab = 96;
constexpr int32_t kStop = 0;
constexpr int32_t kLayers = 2;
constexpr int32_t kHidden = 64;
constexpr int32_t kFfn = 128;
constexpr int32_t kHeads = 4;
constexpr int32_t kKvHeads = 2;
constexpr int32_t kHeadDim = kHidden / kHeads;
constexpr int32_t kContext = 256;
constexpr int64_t kBlockBytes = int64_t{kBlockTokens} * kLayers * kKvHeads * kHeadDim * 4;

// A GGUF file of a `llama` model with random Q4_0 matrices.
class TinyModel {
 public:
  TinyModel() : random_(1) {
    text_key("general.architecture", "llama");
    text_key("general.name", "tiny");
    number_key("llama.block_count", kLayers);
    number_key("llama.context_length", kContext);
    number_key("llama.embedding_length", kHidden);
    number_key("llama.feed_forward_length", kFfn);
    number_key("llama.attention.head_count", kHeads);
    number_key("llama.attention.head_count_kv", kKvHeads);
    matrix("token_embd.weight", kVocab, kHidden);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      norm(block + "attn_norm.weight");
      matrix(block + "attn_q.weight", kHeads * kHeadDim, kHidden);
      matrix(block + "attn_k.weight", kKvHeads * kHeadDim, kHidden);
      matrix(block + "attn_v.weight", kKvHeads * kHeadDim, kHidden);
      matrix(block + "attn_output.weight", kHidden, kHeads * kHeadDim);
      norm(block + "ffn_norm.weight");
      matrix(block + "ffn_gate.weight", kFfn, kHidden);
      matrix(block + "ffn_up.weight", kFfn, kHidden);
      matrix(block + "ffn_down.weight", kHidden, kFfn);
    }
    norm("output_norm.weight");
    bytes_ = "GGUF";
    append<uint32_t>(&bytes_, 3);
    append<uint64_t>(&bytes_, num_tensors_);
    append<uint64_t>(&bytes_, num_keys_);
    bytes_ += keys_ + tensors_;
    bytes_.resize((bytes_.size() + 31) / 32 * 32);
    bytes_ += data_;
  }

  gguf::File file() const {
    return gguf::File::from_bytes("tiny.gguf", reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size());
  }

 private:
  enum : uint32_t { kTypeU32 = 4, kTypeString = 8, kF32 = 0, kQ4_0 = 2 };

  template <class T>
  static void append(std::string* out, T value) {
    char raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);
    out->append(raw, sizeof value);
  }
  static void text(std::string* out, const std::string& value) {
    append<uint64_t>(out, value.size());
    *out += value;
  }
  void text_key(const std::string& key, const std::string& value) {
    text(&keys_, key);
    append<uint32_t>(&keys_, kTypeString);
    text(&keys_, value);
    ++num_keys_;
  }
  void number_key(const std::string& key, int32_t value) {
    text(&keys_, key);
    append<uint32_t>(&keys_, kTypeU32);
    append<int32_t>(&keys_, value);
    ++num_keys_;
  }
  void tensor(const std::string& name, const std::vector<int64_t>& dims, uint32_t type) {
    text(&tensors_, name);
    append<uint32_t>(&tensors_, static_cast<uint32_t>(dims.size()));
    for (const int64_t dim : dims) append<int64_t>(&tensors_, dim);
    append<uint32_t>(&tensors_, type);
    append<uint64_t>(&tensors_, data_.size());
    ++num_tensors_;
  }
  void norm(const std::string& name) {
    tensor(name, {kHidden}, kF32);
    for (int32_t i = 0; i < kHidden; ++i) append<float>(&data_, 1.0f);
  }
  // Blocks of 32 values: a scale of 2^-4 in FP16, then a nibble a value.
  void matrix(const std::string& name, int64_t rows, int64_t cols) {
    tensor(name, {cols, rows}, kQ4_0);
    for (int64_t block = 0; block < rows * cols / 32; ++block) {
      append<uint16_t>(&data_, 0x2C00);
      for (int i = 0; i < 16; ++i) append<uint8_t>(&data_, static_cast<uint8_t>(random_()));
    }
    data_.resize((data_.size() + 31) / 32 * 32);
  }

  std::mt19937 random_;
  std::string keys_, tensors_, data_, bytes_;
  uint64_t num_keys_ = 0, num_tensors_ = 0;
};

inline gguf::File tiny_file() {
  static const TinyModel model;
  return model.file();
}

// Token i of the model is one printable character, and kStop nothing.
inline std::vector<std::string> vocabulary() {
  std::vector<std::string> words(kVocab);
  for (int32_t id = 1; id < kVocab; ++id) words[static_cast<size_t>(id)] = static_cast<char>(' ' + id - 1);
  return words;
}

inline JobSpec random_spec(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](uint32_t bound) { return static_cast<int32_t>(random() % bound); };
  JobSpec spec;
  spec.job_id = "job-" + std::to_string(seed);
  spec.model = "tiny";
  if (below(2) == 0) spec.prompt_ids.assign(static_cast<size_t>(16 + below(32)), 7);  // a beginning many share
  for (int32_t left = 1 + below(40); left > 0; --left) spec.prompt_ids.push_back(1 + below(kVocab - 1));
  spec.max_tokens = 1 + below(40);
  spec.sampling.temperature = below(2) == 0 ? 0.0f : 1.0f;
  spec.sampling.seed = seed;
  spec.sampling.num_logprobs = below(3) - 1;
  spec.sampling.repetition_penalty = below(3) == 0 ? 1.2f : 1.0f;
  if (below(3) == 0) spec.stops = {"e", "AB"};
  return spec;
}

// A language of `length` words of four letters: after each token, those that are `step` apart from the one before,
// modulo four. A mask takes `delay` to make; number `fails_at` cannot be made.
class SlowGrammar final : public Grammar {
 public:
  explicit SlowGrammar(int32_t length, std::chrono::microseconds delay = {}, int32_t fails_at = -1)
      : place_(length, delay, fails_at) {}

  std::unique_ptr<Constraint> start() const override { return std::make_unique<Place>(place_); }

 private:
  class Place final : public Constraint {
   public:
    Place(int32_t length, std::chrono::microseconds delay, int32_t fails_at)
        : length_(length), delay_(delay), fails_at_(fails_at) {}
    Next next(std::vector<uint32_t>* mask) override {
      std::this_thread::sleep_for(delay_);
      if (num_tokens_ == fails_at_) throw Error(ErrorCode::kInvalidRequest, "too much");
      if (num_tokens_ == length_) return Next::kComplete;
      mask->assign((kVocab + 31) / 32, 0);
      for (int32_t id = 1 + (last_ + 1) % 4; id < kVocab; id += 4) {
        (*mask)[static_cast<size_t>(id / 32)] |= uint32_t{1} << (id % 32);
      }
      return Next::kTokens;
    }
    void accept(int32_t token) override {
      if ((token - 1) % 4 != (last_ + 1) % 4) throw Error(ErrorCode::kInternal, "outside the mask");
      last_ = token;
      ++num_tokens_;
    }

   private:
    int32_t length_;
    std::chrono::microseconds delay_;
    int32_t fails_at_;
    int32_t last_ = 0;
    int32_t num_tokens_ = 0;
  };

  const Place place_;
};

inline JobSpec constrained_spec(uint32_t seed, int32_t length, std::chrono::microseconds delay = {}) {
  JobSpec spec = random_spec(seed);
  spec.stops.clear();
  spec.max_tokens = 30;
  spec.grammar = std::make_shared<SlowGrammar>(length, delay);
  return spec;
}

// Waits for the end of what runs; then nothing may be held any more.
inline void check_settled(Engine* engine) {
  for (int tries = 0; engine->stats().active_jobs != 0 && tries < 10000; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK_EQ(engine->audit(), std::string());
  const EngineStats stats = engine->stats();
  CHECK_EQ(stats.active_jobs, 0);
  CHECK_EQ(stats.queued_jobs, 0);
  CHECK_EQ(stats.used_blocks, 0);
}

}  // namespace tw::test
