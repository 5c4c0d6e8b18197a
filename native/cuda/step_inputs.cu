#include "cuda/step_inputs.h"

#include <algorithm>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/launch.h"

namespace tw::cuda {
namespace {

// Puts the tokens in the place of the draws that name them.
__global__ void resolve_draws_kernel(int32_t* token_ids, int32_t count, const int32_t* drawn) {
  release_successor();
  await_predecessor();
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count && token_ids[i] < 0) token_ids[i] = drawn[-1 - token_ids[i]];
}

}  // namespace

StepInputs::StepInputs(MemoryTracker* tracker, const ModelShape& shape, const StepLimits& limits) {
  const int64_t table = (int64_t{shape.context_length} + kBlockTokens - 1) / kBlockTokens;
  const int64_t slices = std::max(limits.max_logit_rows, 1);
  const int64_t rows = std::max(limits.max_rows, limits.max_logit_rows);
  const int64_t ints = 4 * rows + slices * table + 3 * rows + 1;
  host_ = PinnedBuffer(static_cast<size_t>(ints) * sizeof(int32_t));
  device_ = DeviceBuffer(tracker, Purpose::kWorkspace, host_.size());
  TW_CUDA_CHECK(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming));
}

StepInputs::~StepInputs() {
  if (copied_ != nullptr) (void)cudaEventDestroy(copied_);
}

void StepInputs::upload(const StepPlan& plan, int32_t padded_rows, int32_t tile_rows, const int32_t* drawn,
                        cudaStream_t stream) {
  TW_CUDA_CHECK(cudaEventSynchronize(copied_));
  padded_rows_ = padded_rows;
  const auto room = static_cast<int64_t>(host_.size() / sizeof(int32_t));
  auto* const ids = host_.as<int32_t>();
  int32_t* const positions = ids + padded_rows;
  int32_t* const offsets = positions + padded_rows;
  int32_t* const logit_rows = offsets + padded_rows;
  int32_t* const tables = logit_rows + padded_rows;
  std::fill(ids, ids + padded_rows, 0);
  std::fill(positions, positions + padded_rows, -1);
  std::fill(offsets, offsets + padded_rows, 0);
  std::copy(plan.token_ids.begin(), plan.token_ids.end(), ids);
  for (int32_t i = 0; i < padded_rows; ++i) {
    logit_rows[i] = static_cast<size_t>(i) < plan.logit_rows.size() ? plan.logit_rows[static_cast<size_t>(i)] : i;
  }
  int64_t used = 0;
  for (const SequenceSlice& slice : plan.slices) {
    const int32_t blocks = (slice.position + slice.num_rows + kBlockTokens - 1) / kBlockTokens;
    if (tables - ids + used + blocks + 3 * int64_t{padded_rows} + 1 > room)
      throw Error(ErrorCode::kInternal, "a step has too many block tables");
    std::copy(slice.block_table, slice.block_table + blocks, tables + used);
    for (int32_t i = 0; i < slice.num_rows; ++i) {
      positions[slice.first_row + i] = slice.position + i;
      offsets[slice.first_row + i] = static_cast<int32_t>(used);
    }
    used += blocks;
  }
  singles_ = tables - ids + used;
  num_singles_ = num_tiles_ = 0;
  for (const SequenceSlice& slice : plan.slices) {
    for (int32_t i = 0; tile_rows > 0 && slice.num_rows <= kFewRows && i < slice.num_rows; ++i) {
      ids[singles_ + num_singles_++] = slice.first_row + i;
    }
  }
  tiles_ = (singles_ + num_singles_ + 1) / 2 * 2;
  for (const SequenceSlice& slice : plan.slices) {
    for (int32_t i = 0; tile_rows > 0 && slice.num_rows > kFewRows && i < slice.num_rows; i += tile_rows) {
      ids[tiles_ + 2 * num_tiles_] = slice.first_row + i;
      ids[tiles_ + 2 * num_tiles_++ + 1] = std::min(tile_rows, slice.num_rows - i);
    }
  }
  const int64_t count = tiles_ + 2 * int64_t{num_tiles_};
  TW_CUDA_CHECK(cudaMemcpyAsync(device_.as<int32_t>(), ids, static_cast<size_t>(count) * sizeof(int32_t),
                                cudaMemcpyHostToDevice, stream));
  TW_CUDA_CHECK(cudaEventRecord(copied_, stream));
  if (std::any_of(plan.token_ids.begin(), plan.token_ids.end(), [](int32_t id) { return id < 0; })) {
    constexpr int32_t kThreads = 256;
    const auto num_ids = static_cast<int32_t>(plan.token_ids.size());
    launch(resolve_draws_kernel, dim3(static_cast<unsigned>((num_ids + kThreads - 1) / kThreads)), dim3(kThreads), 0,
           stream, device_.as<int32_t>(), num_ids, drawn);
  }
}

StepRows StepInputs::rows(int32_t first_row) const {
  const int32_t* base = device_.as<int32_t>();
  return {base + padded_rows_ + first_row, base + 2 * int64_t{padded_rows_} + first_row,
          base + 4 * int64_t{padded_rows_}};
}

}  // namespace tw::cuda
