// Which of Hopper's kernels for many tokens a product takes. They differ in time alone.
#pragma once

#include <iterator>
#include <utility>

#include "cuda/matmul_flat.cuh"
#include "cuda/matmul_tall.cuh"

namespace tw::cuda {

// What a kernel's parts take on an H200, in nanoseconds: a step of 64 inputs, a tile's end, a launch, and what blocks
// that share a tile need to meet, at all and for a MiB of sums that they leave each other.
struct KernelTimes {
  int64_t step, end, launch, meeting, mib_of_sums;
};

// A product's time whose blocks have `rows` × `tokens` outputs.
inline int64_t time_of_tiles(const MatmulTask& task, int processors, int rows, int tokens, const KernelTimes& times) {
  const int64_t tiles =
      ((int64_t{task.num_tokens} + tokens - 1) / tokens) * ((int64_t{task.part.num_tiles} * 16 + rows - 1) / rows);
  return (tiles + processors - 1) / processors * (task.part.num_steps * times.step + times.end) + times.launch;
}

template <class Shape>
int64_t time_of_pieces(const MatmulTask& task, int processors, const KernelTimes& times) {
  const int token_tiles = (task.num_tokens + Shape::kTokens - 1) / Shape::kTokens;
  const int row_tiles = (task.part.num_tiles + Shape::kTiles - 1) / Shape::kTiles;
  const auto deal = PieceDeal<Shape>::of(task, token_tiles, row_tiles, processors);
  if (!deal.fits) return INT64_MAX;
  const int64_t units = (row_tiles * task.part.num_splits + deal.group_blocks - 1) / deal.group_blocks;
  const int64_t sums = int64_t{token_tiles} * Shape::kTokens * row_tiles * Shape::kTiles * 16 * task.part.num_splits;
  return units * task.part.num_steps * times.step / task.part.num_splits + times.end + times.launch + times.meeting +
         sums * static_cast<int64_t>(sizeof(float)) * times.mib_of_sums / (1 << 20);
}

inline Kernel choose_kernel(const MatmulTask& task) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  constexpr KernelTimes kOfFlat{255, 5000, 0, 0, 0};
  constexpr KernelTimes kOf32{298, 1500, 2000, 10000, 0};
  constexpr KernelTimes kOf64{314, 2500, 3000, 5000, 260};
  constexpr KernelTimes kOf128{330, 4000, 3000, 0, 0};
  // Where many blocks meet, two sharing the inputs are faster.
  const Kernel whole128 = task.num_tokens >= 1024 ? Kernel::kTall128Pairs : Kernel::kTall128;
  const std::pair<int64_t, Kernel> times[] = {
      {time_of_tiles(task, processors, 128, 128, kOf128), whole128},
      {time_of_tiles(task, processors, 128, 64, kOf64), Kernel::kTall64},
      {time_of_tiles(task, processors, 128, 32, kOf32), Kernel::kTall32},
      {time_of_tiles(task, processors, 64, 64, kOfFlat), Kernel::kFlat},
      {time_of_pieces<TallShape<64>>(task, processors, kOf64), Kernel::kTall64Pieces},
      {time_of_pieces<TallShape<32>>(task, processors, kOf32), Kernel::kTall32Pieces}};
  return std::min_element(std::begin(times), std::end(times))->second;
}

template <class Format>
void launch_hopper(const MatmulTask& task) {
  switch (task.kernel == Kernel::kAuto ? choose_kernel(task) : task.kernel) {
    case Kernel::kTall32: return launch_tall<Format, TallShape<32>>(task, Deal::kTiles);
    case Kernel::kTall64: return launch_tall<Format, TallShape<64>>(task, Deal::kTiles);
    case Kernel::kTall128: return launch_tall<Format, TallShape<128>>(task, Deal::kTiles);
    case Kernel::kTall32Pieces: return launch_tall<Format, TallShape<32>>(task, Deal::kPieces);
    case Kernel::kTall64Pieces: return launch_tall<Format, TallShape<64>>(task, Deal::kPieces);
    case Kernel::kTall128Pairs: return launch_tall<Format, TallShape<128>>(task, Deal::kPairs);
    default: return launch_flat<Format>(task);
  }
}

}  // namespace tw::cuda
