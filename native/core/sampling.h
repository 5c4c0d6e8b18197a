// What sampling needs to know of a job, and what it gives back (SPEC W-20, W-21).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace tw {

struct SamplingParams {
  float temperature = 1.0f;         // 0 is greedy
  float top_p = 1.0f;               // 1 is off
  int32_t top_k = 0;                // 0 is off
  float min_p = 0.0f;               // 0 is off
  float repetition_penalty = 1.0f;  // 1 is off
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  std::vector<std::pair<int32_t, float>> logit_bias;  // ascending ids, inside the vocabulary
  int32_t num_logprobs = -1;                          // alternatives to report; -1 for no log-probabilities
  uint64_t seed = 0;

  bool has_penalties() const {
    return repetition_penalty != 1.0f || frequency_penalty != 0.0f || presence_penalty != 0.0f;
  }
};

// A token that a job generated, and how often.
struct TokenCount {
  int32_t id = 0;
  int32_t count = 0;
};

// One row to sample.
struct SampleJob {
  const SamplingParams* params = nullptr;
  const std::vector<TokenCount>* generated = nullptr;  // distinct generated tokens; read only if has_penalties()
  uint64_t token_index = 0;                            // the draw's counter: index of the token to be drawn
  // Tokens that may be drawn: bit i % 32 of word i / 32 for token i; at least one. Null: all. A device whose backend
  // says supports_masks() reads it.
  const uint32_t* mask = nullptr;
};

struct TokenScore {
  int32_t id = 0;
  float logprob = 0;
};

struct SampleResult {
  int32_t id = 0;
  float logprob = 0;            // of the unmodified distribution; set if log-probabilities were asked for
  std::vector<TokenScore> top;  // most probable first, ties to the lower id
  bool finite = true;           // false if a logit was NaN or infinite: the row is unusable
};

}  // namespace tw
