// What a step reads of its plan, in device memory at addresses that stay the same from step to step.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace tw::cuda {

// Laid out as [token ids][positions][table offsets][logit rows], `padded rows` each, then the block tables of all
// slices.
class StepInputs {
 public:
  StepInputs() = default;
  StepInputs(MemoryTracker* tracker, const ModelShape& shape, const StepLimits& limits);
  ~StepInputs();
  StepInputs(const StepInputs&) = delete;
  StepInputs& operator=(const StepInputs&) = delete;

  // Copies the plan to the device. Rows beyond the plan's belong to no sequence.
  void upload(const StepPlan& plan, int32_t padded_rows, cudaStream_t stream);

  const int32_t* token_ids() const { return device_.as<int32_t>(); }
  const int32_t* logit_rows() const { return device_.as<int32_t>() + 3 * int64_t{padded_rows_}; }
  // Of the rows from `first_row` on.
  StepRows rows(int32_t first_row) const;

 private:
  int32_t padded_rows_ = 0;
  PinnedBuffer host_;
  DeviceBuffer device_;
  cudaEvent_t copied_ = nullptr;  // the last copy has read host_
};

}  // namespace tw::cuda
