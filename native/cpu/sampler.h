// Draws a token from one row of logits (SPEC W-21).
#pragma once

#include <cstdint>
#include <vector>

#include "core/sampling.h"
#include "cpu/kernels.h"

namespace tw::cpu {

// Memory that one thread reuses between rows.
struct SamplerScratch {
  std::vector<float> weights;
  std::vector<float> run_sums;
  std::vector<int32_t> order;
  std::vector<int32_t> allowed;
};

// Order: tokens outside the mask are left out, penalties and bias on the raw logits, temperature, top-k, softmax, top-p
// (keeping the token that crosses it), min-p, draw. Ties go to the lower id. Log-probabilities are those of the whole
// vocabulary. `logits` [vocab_size] is overwritten.
SampleResult sample_row(const Kernels& kernels, float* logits, int32_t vocab_size, const SampleJob& job,
                        SamplerScratch* scratch);

}  // namespace tw::cpu
