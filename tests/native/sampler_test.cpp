// Sampling (W-21): the order of the steps, the filters' edges, ties, and draws against their distribution.
#include "cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace tw;
using namespace tw::cpu;

struct Sampler {
  SampleResult operator()(std::vector<float> logits, const SamplingParams& params, uint64_t index = 0,
                          const std::vector<TokenCount>& generated = {}, const std::vector<uint32_t>& mask = {}) {
    const SampleJob job = {&params, &generated, index, mask.empty() ? nullptr : mask.data()};
    return sample_row(kernels_for(select_isa()), logits.data(), static_cast<int32_t>(logits.size()), job, &scratch);
  }
  // The ids that come up in many draws.
  std::set<int32_t> support(const std::vector<float>& logits, SamplingParams params) {
    std::set<int32_t> ids;
    for (uint64_t i = 0; i < 3000; ++i) ids.insert((*this)(logits, params, i).id);
    return ids;
  }
  SamplerScratch scratch;
};

std::vector<float> logs(const std::vector<double>& probabilities) {
  std::vector<float> out;
  for (const double p : probabilities) out.push_back(static_cast<float>(std::log(p)));
  return out;
}

using Ids = std::set<int32_t>;

}  // namespace

TEST(greedy_takes_the_largest_and_ties_go_to_the_lower_id) {
  Sampler sample;
  SamplingParams params;
  params.temperature = 0;
  CHECK_EQ(sample({1, 5, 5, 2}, params).id, 1);
  std::vector<float> many(1000, 0.5f);
  CHECK_EQ(sample(many, params).id, 0);
}

TEST(draws_follow_the_distribution) {
  Sampler sample;
  SamplingParams params;
  params.seed = 9;
  const std::vector<double> probabilities = {0.5, 0.3, 0.15, 0.05};
  std::vector<int> counts(4);
  for (uint64_t i = 0; i < 20000; ++i) ++counts[static_cast<size_t>(sample(logs(probabilities), params, i).id)];
  for (size_t id = 0; id < 4; ++id) CHECK(std::fabs(counts[id] / 20000.0 - probabilities[id]) < 0.015);
}

TEST(temperature_sharpens_and_flattens) {
  Sampler sample;
  SamplingParams params;
  params.temperature = 2.0f;
  int zeros = 0;
  for (uint64_t i = 0; i < 20000; ++i) zeros += sample(logs({0.8, 0.2}), params, i).id == 0;
  CHECK(std::fabs(zeros / 20000.0 - 2.0 / 3.0) < 0.015);
}

TEST(top_k_keeps_k) {
  Sampler sample;
  SamplingParams params;
  params.top_k = 2;
  CHECK(sample.support(logs({0.1, 0.4, 0.3, 0.2}), params) == Ids({1, 2}));
  params.top_k = 4;
  CHECK(sample.support(logs({0.1, 0.4, 0.3, 0.2}), params) == Ids({0, 1, 2, 3}));
}

TEST(top_p_keeps_the_token_that_crosses) {
  Sampler sample;
  SamplingParams params;
  params.top_p = 0.6f;
  CHECK(sample.support(logs({0.1, 0.5, 0.3, 0.1}), params) == Ids({1, 2}));
  params.top_p = 0.45f;
  CHECK(sample.support(logs({0.1, 0.5, 0.3, 0.1}), params) == Ids({1}));
}

TEST(top_p_counts_within_what_top_k_left) {
  Sampler sample;
  SamplingParams params;
  params.top_k = 2;  // leaves 0.4 and 0.3: 0.571 and 0.429 of what is left
  params.top_p = 0.56f;
  CHECK(sample.support(logs({0.2, 0.4, 0.3, 0.1}), params) == Ids({1}));
}

TEST(a_flat_distribution_needs_a_deep_top_p) {
  Sampler sample;
  SamplingParams params;
  params.top_p = 0.5f;
  const Ids ids = sample.support(std::vector<float>(1000, 1.0f), params);
  CHECK(*ids.begin() >= 0 && *ids.rbegin() < 501 && ids.size() > 400);
}

// The mass lies below the first depth the filter looks at.
TEST(top_p_finds_mass_in_a_long_tail) {
  Sampler sample;
  std::vector<float> logits(200000, -9.5f);
  logits[5] = 0.0f;
  SamplingParams params;
  params.top_p = 0.99f;
  Ids ids;
  for (uint64_t i = 0; i < 60; ++i) ids.insert(sample(logits, params, i).id);
  CHECK(ids.size() > 20);
}

TEST(min_p_is_relative_to_the_most_probable) {
  Sampler sample;
  SamplingParams params;
  params.min_p = 0.5f;
  CHECK(sample.support(logs({0.45, 0.25, 0.2, 0.1}), params) == Ids({0, 1}));
}

TEST(penalties_act_once_a_distinct_token_and_before_temperature) {
  Sampler sample;
  SamplingParams params;
  params.temperature = 0;
  params.repetition_penalty = 2.0f;
  CHECK_EQ(sample({4, 3, -1}, params, 0, {{0, 7}}).id, 1);
  CHECK_EQ(sample({-1, -1.5f, -9}, params, 0, {{0, 1}}).id, 1);
  params.repetition_penalty = 1.0f;
  params.frequency_penalty = 0.5f;
  CHECK_EQ(sample({4, 3.2f}, params, 0, {{0, 1}}).id, 0);
  CHECK_EQ(sample({4, 3.2f}, params, 0, {{0, 2}}).id, 1);
  params.frequency_penalty = 0;
  params.presence_penalty = 1.0f;
  CHECK_EQ(sample({4, 3.2f}, params, 0, {{0, 9}}).id, 1);
}

TEST(bias_is_added_to_raw_logits) {
  Sampler sample;
  SamplingParams params;
  params.temperature = 0;
  params.logit_bias = {{2, 100.0f}};
  CHECK_EQ(sample({5, 1, -20}, params).id, 2);
}

TEST(log_probabilities_are_of_the_unmodified_distribution) {
  Sampler sample;
  SamplingParams params;
  params.temperature = 0;
  params.num_logprobs = 2;
  params.logit_bias = {{3, 50.0f}};
  const SampleResult result = sample(logs({0.1, 0.5, 0.3, 0.1}), params);
  CHECK_EQ(result.id, 3);
  CHECK(std::fabs(double{result.logprob} - std::log(0.1)) < 1e-5);
  CHECK_EQ(result.top.size(), size_t{2});
  CHECK_EQ(result.top[0].id, 1);
  CHECK_EQ(result.top[1].id, 2);
  CHECK(std::fabs(double{result.top[0].logprob} - std::log(0.5)) < 1e-5);
}

TEST(a_draw_depends_on_seed_index_and_logits_only) {
  Sampler sample;
  SamplingParams params;
  params.seed = 5;
  const std::vector<float> logits(300, 0.0f);
  std::vector<int32_t> alone;
  for (uint64_t i = 0; i < 50; ++i) alone.push_back(Sampler()(logits, params, i).id);
  for (uint64_t i = 50; i-- > 0;) CHECK_EQ(sample(logits, params, i).id, alone[i]);
  params.seed = 6;
  int same = 0;
  for (uint64_t i = 0; i < 50; ++i) same += sample(logits, params, i).id == alone[i];
  CHECK(same < 10);
}

TEST(logits_that_are_not_finite_give_no_token) {
  Sampler sample;
  SamplingParams params;
  CHECK(!sample({1, std::nanf(""), 2}, params).finite);
  params.logit_bias = {{0, HUGE_VALF}};
  CHECK(!sample({1, 2}, params).finite);
}

TEST(no_token_outside_the_mask_is_ever_drawn) {
  Sampler sample;
  std::vector<float> logits(100, 0.0f);
  for (int32_t id = 0; id < 100; ++id) logits[static_cast<size_t>(id)] = static_cast<float>(id % 7) - 3.0f;
  logits[2] = 80.0f;  // by far the largest, and not allowed
  const std::vector<uint32_t> mask = {1u << 5 | 1u << 31, 0, 1u << 1, 1u << 3};
  const Ids allowed = {5, 31, 65, 99};
  SamplingParams params;
  params.logit_bias = {{3, 100.0f}, {65, 1.0f}};
  for (const int32_t top_k : {0, 1, 3, 50}) {
    for (const float top_p : {1.0f, 0.9999999f, 0.5f}) {
      for (const float min_p : {0.0f, 0.1f}) {
        params.top_k = top_k;
        params.top_p = top_p;
        params.min_p = min_p;
        for (uint64_t i = 0; i < 300; ++i) CHECK(allowed.count(sample(logits, params, i, {}, mask).id) == 1);
      }
    }
  }
  params.temperature = 0;
  CHECK_EQ(sample(logits, params, 0, {}, mask).id, 5);
}

TEST(a_mask_leaves_the_distribution_of_what_it_allows) {
  Sampler sample;
  SamplingParams params;
  const std::vector<uint32_t> mask = {0b1011};
  std::map<int32_t, int> counts;
  constexpr int kDraws = 20000;
  for (uint64_t i = 0; i < kDraws; ++i) ++counts[sample(logs({0.1, 0.2, 0.3, 0.4}), params, i, {}, mask).id];
  CHECK_EQ(counts[2], 0);
  CHECK(std::abs(counts[0] / double{kDraws} - 0.1 / 0.7) < 0.015);
  CHECK(std::abs(counts[1] / double{kDraws} - 0.2 / 0.7) < 0.015);
  CHECK(std::abs(counts[3] / double{kDraws} - 0.4 / 0.7) < 0.015);
}

TEST(a_mask_that_allows_all_changes_nothing) {
  Sampler sample;
  std::vector<float> logits;
  for (int32_t id = 0; id < 70; ++id) logits.push_back(std::sin(static_cast<float>(id) * 1.7f) * 3.0f);
  const std::vector<uint32_t> all = {~0u, ~0u, ~0u};
  SamplingParams params;
  for (const float top_p : {1.0f, 0.8f}) {
    params.top_p = top_p;
    for (uint64_t i = 0; i < 500; ++i) CHECK_EQ(sample(logits, params, i, {}, all).id, sample(logits, params, i).id);
  }
}

TEST(logprobs_and_penalties_know_the_whole_vocabulary) {
  Sampler sample;
  SamplingParams params;
  params.temperature = 0;
  params.num_logprobs = 2;
  params.presence_penalty = 2.0f;
  const std::vector<float> logits = logs({0.5, 0.25, 0.125, 0.125});
  const std::vector<uint32_t> mask = {0b1110};
  const SampleResult result = sample(logits, params, 1, {{1, 1}}, mask);
  CHECK_EQ(result.id, 2);
  CHECK(std::abs(result.logprob - std::log(0.125f)) < 1e-4f);
  CHECK_EQ(result.top[0].id, 0);
  CHECK(std::abs(result.top[0].logprob - std::log(0.5f)) < 1e-4f);
}
