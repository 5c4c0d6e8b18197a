// What one engine step computes. The scheduler makes a plan, the backend runs it.
#pragma once

#include <cstdint>
#include <vector>

namespace tw {

// Tokens a KV block holds. Prefix blocks are shared whole, so it is also the grain of the prefix cache.
constexpr int32_t kBlockTokens = 16;

// Consecutive rows of a step that are consecutive tokens of one sequence.
struct SequenceSlice {
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t position = 0;                  // of the first row, from 0
  const int32_t* block_table = nullptr;  // block of token t is block_table[t / kBlockTokens]
};

struct StepPlan {
  std::vector<int32_t> token_ids;     // [rows]; -1 - i: what draw i of the step before gave (Backend::runs_ahead)
  std::vector<SequenceSlice> slices;  // cover all rows in order
  std::vector<int32_t> logit_rows;    // rows whose logits are wanted, ascending

  int32_t num_rows() const { return static_cast<int32_t>(token_ids.size()); }
  void clear() {
    token_ids.clear();
    slices.clear();
    logit_rows.clear();
  }
};

}  // namespace tw
