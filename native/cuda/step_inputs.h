// What a step reads of its plan, in device memory at addresses that stay the same from step to step.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace tw::cuda {

// Slices of up to so many rows are attended row by row, with their keys' splits side by side.
constexpr int32_t kFewRows = 4;

// Laid out as [token ids][positions][table offsets][logit rows], `padded rows` each, then the block tables of all
// slices, then, where slices differ in rows, the rows that stand alone and the tiles of the others.
class StepInputs {
 public:
  StepInputs() = default;
  StepInputs(MemoryTracker* tracker, const ModelShape& shape, const StepLimits& limits);
  ~StepInputs();
  StepInputs(const StepInputs&) = delete;
  StepInputs& operator=(const StepInputs&) = delete;

  // Copies the plan to the device. Rows beyond the plan's belong to no sequence. With `tile_rows` > 0, slices of more
  // than kFewRows rows are cut into tiles of at most so many; the rows of the others are single. `drawn` has what the
  // step before drew, for tokens that are named as its draws.
  void upload(const StepPlan& plan, int32_t padded_rows, int32_t tile_rows, const int32_t* drawn, cudaStream_t stream);

  const int32_t* token_ids() const { return device_.as<int32_t>(); }
  const int32_t* logit_rows() const { return device_.as<int32_t>() + 3 * int64_t{padded_rows_}; }
  // Of the rows from `first_row` on.
  StepRows rows(int32_t first_row) const;
  const int32_t* single_rows() const { return device_.as<int32_t>() + singles_; }
  int32_t num_single_rows() const { return num_singles_; }
  const int2* row_tiles() const { return reinterpret_cast<const int2*>(device_.as<int32_t>() + tiles_); }
  int32_t num_row_tiles() const { return num_tiles_; }

 private:
  int32_t padded_rows_ = 0;
  int64_t singles_ = 0;  // places in the buffer
  int64_t tiles_ = 0;
  int32_t num_singles_ = 0;
  int32_t num_tiles_ = 0;
  PinnedBuffer host_;
  DeviceBuffer device_;
  cudaEvent_t copied_ = nullptr;  // the last copy has read host_
};

}  // namespace tw::cuda
