// Draws a token from each row of logits, on the device (SPEC W-21); only the draws travel to the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "core/sampling.h"
#include "cuda/memory.h"

namespace tw::cuda {

constexpr int kMostLogprobs = 20;

// What the device writes for a row, in pinned host memory.
struct DeviceSample {
  int32_t id;
  int32_t finite;
  float logprob;
  int32_t num_top;
  int32_t top_ids[kMostLogprobs];
  float top_logprobs[kMostLogprobs];
};

class Sampler {
 public:
  Sampler() = default;
  Sampler(MemoryTracker* tracker, int32_t max_rows, int32_t vocab_size);

  // `logits` [jobs, stride] is overwritten. Waits for the stream.
  void sample(float* logits, int64_t stride, const std::vector<SampleJob>& jobs, std::vector<SampleResult>* results,
              const Stream& stream);

 private:
  int32_t vocab_size_ = 0;
  MemoryTracker* tracker_ = nullptr;
  PinnedBuffer results_;     // [max_rows] DeviceSample
  DeviceBuffer partials_;    // [max_rows, chunks] of the greedy search
  DeviceBuffer candidates_;  // [max_rows, vocab_size] keys
  PinnedBuffer staging_;     // jobs and their lists
  DeviceBuffer jobs_;
};

}  // namespace tw::cuda
