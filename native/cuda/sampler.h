// Draws a token from each row of logits, on the device (SPEC W-21); only the draws travel to the host.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <memory>
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

  // `logits` [jobs, stride] is overwritten. At most two draws may wait to be taken.
  void draw(float* logits, int64_t stride, const std::vector<SampleJob>& jobs, cudaStream_t stream);
  // Waits for the oldest draw that was not taken.
  void take(std::vector<SampleResult>* results);
  // What the last draw gave, for the step after it: [jobs] token ids in device memory.
  const int32_t* drawn() const { return drawn_.as<int32_t>(); }

 private:
  // What a draw shares with the host until it is taken.
  struct Slot {
    explicit Slot(int32_t max_rows) : results(static_cast<size_t>(max_rows) * sizeof(DeviceSample)) {}
    PinnedBuffer results;               // [max_rows] DeviceSample
    PinnedBuffer staging;               // jobs and their lists
    std::vector<int32_t> num_logprobs;  // of each job
    Event done;
  };

  // Copies the jobs and their lists to the device; returns the sum of the lists' lengths.
  size_t upload(const std::vector<SampleJob>& jobs, Slot* slot, cudaStream_t stream);

  int32_t vocab_size_ = 0;
  MemoryTracker* tracker_ = nullptr;
  std::array<std::unique_ptr<Slot>, 2> slots_;
  uint64_t num_draws_ = 0;
  uint64_t num_taken_ = 0;
  DeviceBuffer drawn_;       // [max_rows]
  DeviceBuffer partials_;    // [max_rows, chunks] of the greedy search
  DeviceBuffer candidates_;  // [max_rows, vocab_size] keys
  DeviceBuffer jobs_;
};

}  // namespace tw::cuda
