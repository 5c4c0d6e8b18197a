#include "cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/philox.h"

namespace tw::cpu {
namespace {

// Σ e^((x - max) · scale); keeps the terms in scratch->weights if `keep`.
double exp_sum(const Kernels& kernels, const float* x, int32_t n, float max, float scale, bool keep,
               SamplerScratch* scratch) {
  scratch->run_sums.resize(static_cast<size_t>((n + kExpRun - 1) / kExpRun));
  if (keep) scratch->weights.resize(static_cast<size_t>(n));
  kernels.exp_runs(x, n, max, scale, keep ? scratch->weights.data() : nullptr, scratch->run_sums.data());
  return std::accumulate(scratch->run_sums.begin(), scratch->run_sums.end(), 0.0);
}

// Puts the ids of the `count` largest logits in front of `order`, in order.
void order_largest(const float* logits, size_t count, std::vector<int32_t>* order) {
  const auto before = [logits](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  const auto middle = order->begin() + static_cast<std::ptrdiff_t>(count);
  if (middle != order->end()) std::nth_element(order->begin(), middle, order->end(), before);
  std::sort(order->begin(), middle, before);
}

void fill_ids(int32_t vocab_size, std::vector<int32_t>* ids) {
  ids->resize(static_cast<size_t>(vocab_size));
  std::iota(ids->begin(), ids->end(), 0);
}

// Fills ids with those whose logit is at least `floor`, ascending.
void collect_above(const float* logits, int32_t vocab_size, float floor, std::vector<int32_t>* ids) {
  ids->clear();
  for (int32_t id = 0; id < vocab_size; ++id) {
    if (logits[id] >= floor) ids->push_back(id);
  }
}

void apply_penalties(const SamplingParams& params, const std::vector<TokenCount>& generated, float* logits) {
  for (const TokenCount& token : generated) {
    float value = logits[token.id];
    value = value > 0.0f ? value / params.repetition_penalty : value * params.repetition_penalty;
    value -= params.frequency_penalty * static_cast<float>(token.count);
    value -= params.presence_penalty;
    logits[token.id] = value;
  }
}

// Moves the logits of the tokens in the mask together, in order, and their ids to `allowed`. What is left is sampled as
// if it were the whole vocabulary, so no token outside the mask has any part in it. Returns how many they are.
int32_t keep_allowed(const uint32_t* mask, int32_t vocab_size, float* logits, std::vector<int32_t>* allowed) {
  allowed->clear();
  for (int32_t first = 0; first < vocab_size; first += 32) {
    const uint32_t word = mask[first / 32];
    if (word == 0) continue;
    const int32_t end = std::min(first + 32, vocab_size);
    for (int32_t id = first; id < end; ++id) {
      if ((word >> (id - first) & 1) == 0) continue;
      logits[allowed->size()] = logits[id];
      allowed->push_back(id);
    }
  }
  return static_cast<int32_t>(allowed->size());
}

int32_t first_largest(const float* logits, int32_t vocab_size, float max) {
  for (int32_t id = 0; id < vocab_size; ++id) {
    if (logits[id] == max) return id;
  }
  return 0;
}

// The ids that top-k, top-p and min-p leave, most probable first, in scratch->order; their weights e^(scaled - max) in
// scratch->weights at the same places.
void filter(const Kernels& kernels, const SamplingParams& params, const float* logits, int32_t vocab_size, float max,
            SamplerScratch* scratch) {
  const float scale = 1.0f / params.temperature;
  std::vector<int32_t>& order = scratch->order;
  const bool use_top_k = params.top_k > 0 && params.top_k < vocab_size;
  double target = 0;  // what the kept weights must reach for top-p
  if (params.top_p < 1.0f && !use_top_k) {
    target = double{params.top_p} * exp_sum(kernels, logits, vocab_size, max, scale, false, scratch);
  }

  // Only tokens near the top can be kept: sort those, and look further down only if they do not reach the target.
  float depth = 8.0f;
  for (;;) {
    bool complete = true;
    if (use_top_k) {
      fill_ids(vocab_size, &order);
      order_largest(logits, static_cast<size_t>(params.top_k), &order);
      order.resize(static_cast<size_t>(params.top_k));
    } else if (params.top_p < 1.0f) {
      collect_above(logits, vocab_size, max - depth * params.temperature, &order);
      complete = order.size() == static_cast<size_t>(vocab_size);
      order_largest(logits, order.size(), &order);
    } else {
      // Only min-p: its bound on the logit is known, up to rounding, which the exact test below settles.
      collect_above(logits, vocab_size, max + params.temperature * (std::log(params.min_p) - 1.0f), &order);
      order_largest(logits, order.size(), &order);
    }
    std::vector<float>& weights = scratch->weights;
    weights.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) weights[i] = logits[order[i]];
    scratch->run_sums.resize((order.size() + kExpRun - 1) / kExpRun);
    kernels.exp_runs(weights.data(), static_cast<int64_t>(weights.size()), max, scale, weights.data(),
                     scratch->run_sums.data());
    if (params.top_p < 1.0f) {
      if (use_top_k) target = double{params.top_p} * std::accumulate(weights.begin(), weights.end(), 0.0);
      double reached = 0;
      size_t kept = 0;
      while (kept < weights.size() && (kept == 0 || reached < target)) reached += double{weights[kept++]};
      if (reached < target && !complete) {
        depth *= 2;
        continue;
      }
      order.resize(kept);
      weights.resize(kept);
    }
    if (params.min_p > 0.0f) {
      size_t kept = 1;
      while (kept < weights.size() && weights[kept] >= params.min_p * weights[0]) ++kept;
      order.resize(kept);
      weights.resize(kept);
    }
    return;
  }
}

int32_t draw(const Kernels& kernels, const SamplingParams& params, const float* logits, int32_t vocab_size, float max,
             uint64_t token_index, SamplerScratch* scratch) {
  const double u = uniform_draw(params.seed, token_index);
  const bool filtered = (params.top_k > 0 && params.top_k < vocab_size) || params.top_p < 1.0f || params.min_p > 0.0f;
  if (filtered) {
    filter(kernels, params, logits, vocab_size, max, scratch);
    const std::vector<float>& weights = scratch->weights;
    const double target = u * std::accumulate(weights.begin(), weights.end(), 0.0);
    double reached = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      reached += double{weights[i]};
      if (reached > target) return scratch->order[i];
    }
    return scratch->order[weights.size() - 1];
  }
  const double target = u * exp_sum(kernels, logits, vocab_size, max, 1.0f / params.temperature, true, scratch);
  const std::vector<float>& sums = scratch->run_sums;
  double reached = 0;
  size_t run = 0;
  while (run + 1 < sums.size() && reached + double{sums[run]} <= target) reached += double{sums[run++]};
  int32_t last = 0;
  for (auto id = static_cast<int32_t>(run * kExpRun); id < vocab_size; ++id) {
    const float weight = scratch->weights[static_cast<size_t>(id)];
    if (weight > 0.0f) last = id;
    reached += double{weight};
    if (reached > target) return id;
  }
  return last;
}

}  // namespace

SampleResult sample_row(const Kernels& kernels, float* logits, int32_t vocab_size, const SampleJob& job,
                        SamplerScratch* scratch) {
  const SamplingParams& params = *job.params;
  SampleResult result;
  float max = kernels.max_value(logits, vocab_size, &result.finite);
  if (!result.finite) return result;

  double log_sum = 0;
  const float raw_max = max;
  std::vector<float> raw;
  if (params.num_logprobs >= 0) {
    log_sum = std::log(exp_sum(kernels, logits, vocab_size, max, 1.0f, false, scratch));
    if (params.num_logprobs > 0) {
      fill_ids(vocab_size, &scratch->order);
      order_largest(logits, static_cast<size_t>(std::min(params.num_logprobs, vocab_size)), &scratch->order);
      for (int32_t i = 0; i < std::min(params.num_logprobs, vocab_size); ++i) {
        const int32_t id = scratch->order[static_cast<size_t>(i)];
        result.top.push_back({id, static_cast<float>(double{logits[id] - raw_max} - log_sum)});
      }
    }
    raw.assign(logits, logits + vocab_size);
  }

  const bool changed = params.has_penalties() || !params.logit_bias.empty() || job.mask != nullptr;
  if (params.has_penalties()) apply_penalties(params, *job.generated, logits);
  for (const auto& [id, bias] : params.logit_bias) logits[id] += bias;
  const int32_t count =
      job.mask == nullptr ? vocab_size : keep_allowed(job.mask, vocab_size, logits, &scratch->allowed);
  if (changed) max = kernels.max_value(logits, count, &result.finite);
  if (!result.finite) return result;

  result.id = params.temperature == 0.0f ? first_largest(logits, count, max)
                                         : draw(kernels, params, logits, count, max, job.token_index, scratch);
  if (job.mask != nullptr) result.id = scratch->allowed[static_cast<size_t>(result.id)];
  if (params.num_logprobs >= 0) {
    result.logprob = static_cast<float>(double{raw[static_cast<size_t>(result.id)] - raw_max} - log_sum);
  }
  return result;
}

}  // namespace tw::cpu
