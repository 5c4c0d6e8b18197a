// Matrix products for many tokens on Hopper (sm_90a): wgmma with the weights in registers, 64 outputs a warp group, and
// the tokens' inputs in shared memory, where one thread keeps some blocks (activations.h) on their way. Each warp
// unpacks the weights of its own tile, which go from L2 to registers some steps ahead.
//
// tall: two warp groups side by side, 128 outputs × 128 tokens a block; a group sums all pieces of the inputs itself.
// flat: 64 outputs × 64 tokens a block, for too few blocks otherwise; four warp groups share the pieces in turn, and
// after each round of four the block adds them in order. Either way the sums are those of the kernel for few tokens:
// 16 inputs an instruction in order of k within a piece, the pieces added in order.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/matmul_wide.cuh"

namespace tw::cuda {

template <int kRowGroups, int kPieceGroups, int kTokens>
struct HopperShape {
  static constexpr int kRows = kRowGroups;
  static constexpr int kPieces = kPieceGroups;
  static constexpr int kGroups = kTokens / 8;
  static constexpr int kTokenBlocks = kTokens / kTokenBlock;
  static constexpr int kThreads = kRowGroups * kPieceGroups * 128;
  static constexpr int kStages = kPieceGroups == 1 ? 5 : 3;
  // A stage is filled again so many steps after its use: two warp groups need not keep in step.
  static constexpr int kLag = kPieceGroups == 1 ? 2 : 1;
  static constexpr uint32_t kStageBytes = kTokens * 128;
  static constexpr int kRingBytes = kPieceGroups * kStages * kTokens * 128;
  // Sums on their way between threads. tall: [token][kSumRow] where the ring was; flat: a round
  // [piece][token][kSumRow].
  static constexpr int kSumRow = kRowGroups * 64 + 4;
  static constexpr int kExchangeBytes = kPieceGroups == 1 ? 0 : kPieceGroups * kTokens * kSumRow * 4;
  static_assert(kPieceGroups > 1 || kTokens * kSumRow * 4 <= kRingBytes, "the sums fit into the ring");
  static constexpr int kSharedBytes = 1024 + kRingBytes + kExchangeBytes + kPieceGroups * kStages * 16;
};
using TallShape = HopperShape<2, 1, 128>;
using FlatShape = HopperShape<1, 4, 64>;

// Walks over the steps of every kStride-th piece of the inputs. `begins` has the pieces' first steps and then twice the
// end of the last.
constexpr int kMostPieces = 16;
template <int kStride>
class PieceCursor {
 public:
  __device__ __forceinline__ PieceCursor(const int* begins, int piece, int num_pieces)
      : begins_(begins), piece_(piece), num_pieces_(num_pieces) {
    open();
  }
  __device__ __forceinline__ bool done() const { return piece_ >= num_pieces_; }
  __device__ __forceinline__ int step() const { return step_; }
  // Whether the piece ended with the step left behind.
  __device__ __forceinline__ bool advance() {
    if (++step_ < end_) return false;
    piece_ += kStride;
    open();
    return true;
  }

 private:
  __device__ __forceinline__ void open() {
    if (done()) return;
    step_ = begins_[piece_];
    end_ = begins_[piece_ + 1];
  }
  const int* const begins_;
  int piece_;
  const int num_pieces_;
  int step_ = 0, end_ = 0;
};

// A place in a ring of stages and the parity of its barrier's current phase.
template <int kStages>
struct RingPlace {
  uint32_t slot = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot < kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

// Keeps the stages of a piece group filled; used by one thread, its leader.
template <class Shape>
class StageFeeder {
 public:
  __device__ __forceinline__ StageFeeder(const MatmulTask& task, const PieceCursor<Shape::kPieces>& cursor,
                                         uint32_t ring, uint32_t barriers)
      : cursor_(cursor),
        block_stride_(task.input_stride / 64 * kWideBlockBytes),
        blocks_(static_cast<const uint8_t*>(task.input) + blockIdx.x * Shape::kTokenBlocks * block_stride_),
        ring_(ring),
        barriers_(barriers) {}

  __device__ __forceinline__ void feed() {
    if (cursor_.done()) return;
    const uint32_t full = barriers_ + place_.slot * 16;
    // A fresh barrier counts as past the phase before its first.
    barrier_wait(full + 8, place_.parity ^ 1);
    barrier_expect(full, Shape::kStageBytes);
    const uint8_t* from = blocks_ + static_cast<int64_t>(cursor_.step()) * kWideBlockBytes;
#pragma unroll
    for (int b = 0; b < Shape::kTokenBlocks; ++b) {
      copy_bulk(ring_ + place_.slot * Shape::kStageBytes + b * kWideBlockBytes, from + b * block_stride_,
                kWideBlockBytes, full);
    }
    cursor_.advance();
    place_.advance();
  }

 private:
  PieceCursor<Shape::kPieces> cursor_;
  const int64_t block_stride_;
  const uint8_t* const blocks_;
  const uint32_t ring_;
  const uint32_t barriers_;
  RingPlace<Shape::kStages> place_;
};

// One thread's outputs of kCount rows of one token, which begin as sums: rows first, first + stride, … of the block's
// tiles. Of a gate-up pair, row / 16 counts pairs of tiles, and sums[kCount / 2 …] belong to the upper halves.
template <int kCount>
struct OutputRows {
  int rows[kCount];       // of the matrix
  float factors[kCount];  // of the tiles' rows
  float bias[kCount];

  __device__ __forceinline__ static int sum_row(bool paired, int i, int first, int stride) {
    if (!paired) return first + i * stride;
    const int row = first + i % (kCount / 2) * stride;
    return row / 16 * 32 + row % 16 + (i < kCount / 2 ? 0 : 16);
  }

  __device__ __forceinline__ void load(const MatmulTask& task, int first_tile, int first, int stride) {
    const bool paired = task.epilogue == Epilogue::kGateUp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int tile_row = first_tile * 16 + sum_row(paired, i, first, stride);
      factors[i] = tile_row < task.part.num_tiles * 16 ? task.part.row_factors[tile_row] : 0.0f;
      rows[i] = paired ? first_tile * 8 + first + i % (kCount / 2) * stride : tile_row;
      const bool biased = task.bias != nullptr && rows[i] < task.part.num_rows;
      bias[i] = biased ? task.bias[task.part.first_output + rows[i]] : 0.0f;
    }
  }

  // kTokens tokens at once, so that what they add to is on its way together.
  template <int kTokens>
  __device__ __forceinline__ void finish(const MatmulTask& task, int64_t token, int token_step,
                                         float (&sums)[kTokens][kCount]) const {
    float* out = task.out + task.part.first_output;
    float before[kTokens][kCount];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = token + t * token_step;
      const bool exists = at < task.num_tokens;
      const float token_factor = task.token_factors == nullptr || !exists ? 1.0f : task.token_factors[at];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        before[t][i] = task.epilogue == Epilogue::kAdd && exists && rows[i] < task.part.num_rows
                           ? out[at * task.out_stride + rows[i]]
                           : bias[i];
        sums[t][i] = __fmul_rn(__fmul_rn(sums[t][i], factors[i]), token_factor);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = token + t * token_step;
      if (at >= task.num_tokens) break;
      float* row = out + at * task.out_stride;
      if (task.epilogue == Epilogue::kGateUp) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          if (rows[i] < task.part.num_rows) row[rows[i]] = __fmul_rn(silu(sums[t][i]), sums[t][kCount / 2 + i]);
        }
        continue;
      }
      const bool plain = task.epilogue == Epilogue::kStore && task.bias == nullptr;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (rows[i] < task.part.num_rows) row[rows[i]] = plain ? sums[t][i] : __fadd_rn(before[t][i], sums[t][i]);
      }
    }
  }
};

template <class Format, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) hopper_kernel(const __grid_constant__ MatmulTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  constexpr int kGroups = Shape::kGroups;
  // Steps whose weights are on their way; even where fragments of two steps alternate.
  constexpr int kAhead = sizeof(typename Format::Raw) > 64 ? 2 : Format::kFragments ? 3 : Shape::kPieces == 1 ? 4 : 2;
  const PackedPart& part = task.part;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const uint32_t ring = (shared_address(unaligned) + 1023) & ~1023u;
  auto* const exchange = reinterpret_cast<float*>(unaligned + (ring - shared_address(unaligned)) +
                                                  (Shape::kPieces == 1 ? 0 : Shape::kRingBytes));
  const uint32_t barriers = ring + Shape::kRingBytes + Shape::kExchangeBytes;  // full and empty of each stage
  __shared__ int begins[kMostPieces + 1];
  if (thread <= part.num_splits) begins[thread] = thread * part.num_steps / part.num_splits;
  if (thread == 0) {
    for (int i = 0; i < Shape::kPieces * Shape::kStages; ++i) {
      barrier_init(barriers + static_cast<uint32_t>(i) * 16, 1);
      barrier_init(barriers + static_cast<uint32_t>(i) * 16 + 8, Shape::kRows * 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  release_successor();

  const int warp_group = thread >> 7;
  const int group = warp_group % Shape::kPieces;
  const int tile = (static_cast<int>(blockIdx.y) * Shape::kRows + warp_group / Shape::kPieces) * 4 + (thread >> 5 & 3);
  const bool active = tile < part.num_tiles;
  const uint8_t* bytes = part.tiles + (active ? tile : 0) * part.tile_stride;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * (kGroups * 8);
  PieceCursor<Shape::kPieces> ahead(begins, group, part.num_splits), at = ahead;
  const PieceCursor<Shape::kPieces> first = ahead;
  typename Format::Raw raw[kAhead];
  const auto fetch = [&](typename Format::Raw& into) {
    if (ahead.done()) return;
    into = load_step<Format>(part, bytes, ahead.step(), lane);
    ahead.advance();
  };
#pragma unroll
  for (int d = 0; d < kAhead; ++d) fetch(raw[d]);
  await_predecessor();
  const bool leads = thread % (Shape::kPieces == 1 ? Shape::kThreads : 128) == 0;
  const uint32_t own_barriers = barriers + static_cast<uint32_t>(group * Shape::kStages) * 16;
  const uint32_t own_ring = ring + static_cast<uint32_t>(group * Shape::kStages) * Shape::kStageBytes;
  StageFeeder<Shape> feeder(task, first, own_ring, own_barriers);
  for (int i = 0; leads && i < Shape::kStages; ++i) feeder.feed();
  __syncwarp();

  float acc[kGroups][4];
  constexpr int kSumGroups = Shape::kPieces == 1 ? kGroups : 1;
  [[maybe_unused]] float sum[kSumGroups][4] = {};
  [[maybe_unused]] float own[1][8] = {};  // flat: the sums of 8 outputs of one token
  [[maybe_unused]] int finished = 0;      // flat: rounds of pieces
  const bool paired = task.epilogue == Epilogue::kGateUp;
  [[maybe_unused]] const int own_token = thread >> 3;
  const auto put_sums = [&](const float (&from)[kGroups][4], float* to, int first_row) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = g * 8 + (lane & 3) * 2 + (e & 1);
        to[token * Shape::kSumRow + first_row + (lane >> 2) + (e >= 2 ? 8 : 0)] = from[g][e];
      }
    }
  };
  [[maybe_unused]] const auto finish_round = [&](bool has_piece) {
    if (has_piece) put_sums(acc, exchange + group * kGroups * 8 * Shape::kSumRow, (thread >> 5 & 3) * 16);
    __syncthreads();
    const int pieces = min(Shape::kPieces, part.num_splits - finished * Shape::kPieces);
    for (int p = 0; p < pieces; ++p) {
      const float* from = exchange + (p * kGroups * 8 + own_token) * Shape::kSumRow;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float value = from[OutputRows<8>::sum_row(paired, i, thread & 7, 8)];
        own[0][i] = __fadd_rn(own[0][i], value);
      }
    }
    __syncthreads();
    ++finished;
  };

  // Two warp groups take turns: one's instructions run while the other prepares its next.
  constexpr bool kTakesTurns = Shape::kRows == 2;
  if constexpr (kTakesTurns) {
    if (warp_group == 1) named_arrive(1, Shape::kThreads);
  }
  RingPlace<Shape::kStages> place;
  int steps = 0;  // done, up to kLag
  int fresh = 1;
  // While a step's instructions run, the next one is prepared: its fragments are unpacked, its inputs awaited, later
  // ones requested. Formats whose fragments are the loaded registers need no unpacking, but keep these until the step
  // is done.
  constexpr bool kUnpacks = !Format::kFragments;
  uint32_t fragments[kUnpacks ? 2 : 1][Format::kPasses][4][4];
  const auto unpack = [&](uint32_t (&into)[Format::kPasses][4][4], const typename Format::Raw& from) {
#pragma unroll
    for (int pass = 0; pass < Format::kPasses; ++pass) Format::unpack(from, lane, pass, into[pass]);
  };
  if constexpr (kUnpacks) {
    unpack(fragments[0], raw[0]);
    fetch(raw[0]);
  }
  if (!at.done()) barrier_wait(own_barriers, 0);
  while (!at.done()) {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      if (at.done()) break;
      auto& a = fragments[kUnpacks ? d % 2 : 0];
      if constexpr (!kUnpacks) unpack(a, raw[d]);
      const uint32_t full = own_barriers + place.slot * 16;
      const uint64_t operand = swizzled_operand(own_ring + place.slot * Shape::kStageBytes);
      if constexpr (kTakesTurns) named_sync(1 + warp_group, Shape::kThreads);
      wgmma_begin();
#pragma unroll
      for (int pass = 0; pass < Format::kPasses; ++pass) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma(acc, a[pass][j], operand + static_cast<uint64_t>(j * 2), pass + j > 0 ? 1 : 1 - fresh);
        }
      }
      wgmma_commit();
      if constexpr (kTakesTurns) named_arrive(2 - warp_group, Shape::kThreads);

      if (leads) {
        if (steps == Shape::kLag) {
          feeder.feed();
        } else {
          ++steps;
        }
      }
      __syncwarp();
      fresh = at.advance() ? 1 : 0;
      place.advance();
      if constexpr (kUnpacks) {
        unpack(fragments[(d + 1) % 2], raw[(d + 1) % kAhead]);
        fetch(raw[(d + 1) % kAhead]);
      }
      if (!at.done()) barrier_wait(own_barriers + place.slot * 16, place.parity);

      wgmma_finish(acc);
      if (lane == 0) barrier_arrive(full + 8);
      if constexpr (!kUnpacks) fetch(raw[d]);
      if (fresh == 0) continue;
      if constexpr (Shape::kPieces == 1) {
#pragma unroll
        for (int g = 0; g < kSumGroups; ++g) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[g][e] = __fadd_rn(sum[g][e], acc[g][e]);
        }
      } else {
        finish_round(true);
      }
    }
  }
  if constexpr (kTakesTurns) {
    if (warp_group == 0) named_sync(1, Shape::kThreads);
  }

  constexpr int kBlockTiles = Shape::kRows * 4;
  const int first_tile = static_cast<int>(blockIdx.y) * kBlockTiles;
  if constexpr (Shape::kPieces > 1) {
    if (finished * Shape::kPieces < part.num_splits) finish_round(false);
    OutputRows<8> rows;
    rows.load(task, first_tile, thread & 7, 8);
    rows.finish(task, first_token + own_token, 0, own);
  } else {
    OutputRows<4> rows;
    rows.load(task, first_tile, lane, 32);
    __syncthreads();  // no warp needs the ring any more
    put_sums(sum, exchange, (thread >> 5) * 16);
    __syncthreads();
    constexpr int kWarps = Shape::kThreads / 32;
    for (int token = thread >> 5; token < kGroups * 8; token += 4 * kWarps) {
      float sums[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[t][i] = exchange[(token + t * kWarps) * Shape::kSumRow + OutputRows<4>::sum_row(paired, i, lane, 32)];
        }
      }
      rows.finish(task, first_token + token, kWarps, sums);
    }
  }
#endif
}

template <class Format, class Shape>
void launch_hopper(const MatmulTask& task) {
  constexpr int kTiles = Shape::kRows * 4;
  const dim3 grid(static_cast<unsigned>((task.num_tokens + Shape::kGroups * 8 - 1) / (Shape::kGroups * 8)),
                  static_cast<unsigned>((task.part.num_tiles + kTiles - 1) / kTiles));
  allow_shared(hopper_kernel<Format, Shape>, Shape::kSharedBytes);
  launch(hopper_kernel<Format, Shape>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, task.stream, task);
}

template <class Format>
void launch_hopper(const MatmulTask& task) {
  constexpr int64_t kEnoughBlocks = 96;
  const int64_t blocks = ((int64_t{task.num_tokens} + 127) / 128) * ((task.part.num_tiles + 7) / 8);
  const bool tall = task.kernel == Kernel::kAuto ? blocks >= kEnoughBlocks : task.kernel == Kernel::kTall;
  return tall ? launch_hopper<Format, TallShape>(task) : launch_hopper<Format, FlatShape>(task);
}

}  // namespace tw::cuda
