// Matrix products for many tokens and few outputs on Hopper (sm_90a): wgmma with the weights in registers, and the
// tokens' inputs in shared memory, where one thread a warp group keeps some blocks (activations.h) on their way. Each
// warp unpacks the weights of its own tile, which go from L2 to registers some steps ahead.
//
// A block has 64 outputs of 64 tokens. Its four warp groups share the pieces of the inputs in turn, and after each
// round of four the block adds them in order: the sums of the kernel for few tokens, 16 inputs an instruction in order
// of k within a piece, the pieces added in order.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/matmul_wide.cuh"
#include "cuda/output_rows.cuh"

namespace tw::cuda {

struct FlatBlock {
  static constexpr int kPieces = 4;  // warp groups, each with a piece of the inputs
  static constexpr int kTiles = 4;
  static constexpr int kTokens = 64;
  static constexpr int kGroups = kTokens / 8;
  static constexpr int kThreads = kPieces * 128;
  static constexpr int kStages = 3;
  static constexpr int kRingBytes = kPieces * kStages * kWideBlockBytes;
  // A round's sums on their way between threads, [piece][token][kSumRow].
  static constexpr int kExchangeBytes = kPieces * kTokens * kSumRow * 4;
  static constexpr int kSharedBytes = 1024 + kRingBytes + kExchangeBytes + kPieces * kStages * 16;
};

// Walks over the steps of every fourth piece of the inputs. `begins` has the pieces' first steps and then twice the end
// of the last.
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
    piece_ += FlatBlock::kPieces;
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

// Keeps the stages of a warp group filled; used by one thread, its leader.
class StageFeeder {
 public:
  __device__ __forceinline__ StageFeeder(const MatmulTask& task, const PieceCursor& cursor, uint32_t ring,
                                         uint32_t barriers)
      : cursor_(cursor),
        blocks_(static_cast<const uint8_t*>(task.input) + blockIdx.x * (task.input_stride / 64) * kWideBlockBytes),
        ring_(ring),
        barriers_(barriers) {}

  __device__ __forceinline__ void feed() {
    if (cursor_.done()) return;
    const uint32_t full = barriers_ + place_.slot * 16;
    // A fresh barrier counts as past the phase before its first.
    barrier_wait(full + 8, place_.parity ^ 1);
    barrier_expect(full, kWideBlockBytes);
    copy_bulk(ring_ + place_.slot * kWideBlockBytes, blocks_ + static_cast<int64_t>(cursor_.step()) * kWideBlockBytes,
              kWideBlockBytes, full);
    cursor_.advance();
    place_.advance();
  }

 private:
  PieceCursor cursor_;
  const uint8_t* const blocks_;
  const uint32_t ring_;
  const uint32_t barriers_;
  RingPlace<FlatBlock::kStages> place_;
};

template <class Format>
__global__ void __launch_bounds__(FlatBlock::kThreads, 1) flat_kernel(const __grid_constant__ MatmulTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  using Shape = FlatBlock;
  constexpr int kGroups = Shape::kGroups;
  // Steps whose weights are on their way; even where fragments of two steps alternate.
  constexpr int kAhead = Format::kFragments && sizeof(typename Format::Raw) <= 64 ? 3 : 2;
  const PackedPart& part = task.part;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const uint32_t ring = (shared_address(unaligned) + 1023) & ~1023u;
  auto* const exchange = reinterpret_cast<float*>(unaligned + (ring - shared_address(unaligned)) + Shape::kRingBytes);
  const uint32_t barriers = ring + Shape::kRingBytes + Shape::kExchangeBytes;  // full and empty of each stage
  __shared__ int begins[kMostPieces + 1];
  if (thread <= part.num_splits) begins[thread] = thread * part.num_steps / part.num_splits;
  if (thread == 0) {
    for (int i = 0; i < Shape::kPieces * Shape::kStages; ++i) {
      barrier_init(barriers + static_cast<uint32_t>(i) * 16, 1);
      barrier_init(barriers + static_cast<uint32_t>(i) * 16 + 8, 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  release_successor(task.beside);

  const int group = thread >> 7;
  const int tile = static_cast<int>(blockIdx.y) * Shape::kTiles + (thread >> 5 & 3);
  const bool active = tile < part.num_tiles;
  const uint8_t* bytes = part.tiles + (active ? tile : 0) * part.tile_stride;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * (kGroups * 8);
  PieceCursor ahead(begins, group, part.num_splits), at = ahead;
  const PieceCursor first = ahead;
  typename Format::Raw raw[kAhead];
  const auto fetch = [&](typename Format::Raw& into) {
    if (ahead.done()) return;
    into = load_step<Format>(part, bytes, ahead.step(), lane);
    ahead.advance();
  };
#pragma unroll
  for (int d = 0; d < kAhead; ++d) fetch(raw[d]);
  await_predecessor(task.beside);
  const bool leads = thread % 128 == 0;
  const uint32_t own_barriers = barriers + static_cast<uint32_t>(group * Shape::kStages) * 16;
  const uint32_t own_ring = ring + static_cast<uint32_t>(group * Shape::kStages) * kWideBlockBytes;
  StageFeeder feeder(task, first, own_ring, own_barriers);
  for (int i = 0; leads && i < Shape::kStages; ++i) feeder.feed();
  __syncwarp();

  float acc[kGroups][4];
  float own[1][8] = {};  // the sums of 8 outputs of one token
  int finished = 0;      // rounds of pieces
  const bool paired = task.epilogue == Epilogue::kGateUp;
  const int own_token = thread >> 3;
  const auto put_sums = [&](const float (&from)[kGroups][4], float* to, int first_row) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = g * 8 + (lane & 3) * 2 + (e & 1);
        to[token * kSumRow + first_row + (lane >> 2) + (e >= 2 ? 8 : 0)] = from[g][e];
      }
    }
  };
  const auto finish_round = [&](bool has_piece) {
    if (has_piece) put_sums(acc, exchange + group * kGroups * 8 * kSumRow, (thread >> 5 & 3) * 16);
    __syncthreads();
    const int pieces = min(Shape::kPieces, part.num_splits - finished * Shape::kPieces);
    for (int p = 0; p < pieces; ++p) {
      const float* from = exchange + (p * kGroups * 8 + own_token) * kSumRow;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float value = from[OutputRows<8>::sum_row(paired, i, thread & 7, 8)];
        own[0][i] = __fadd_rn(own[0][i], value);
      }
    }
    __syncthreads();
    ++finished;
  };

  RingPlace<Shape::kStages> place;
  bool begun = false;
  int fresh = 1;
  // While a step's instructions run, the next one is prepared: its fragments are unpacked, its inputs awaited, later
  // ones requested. Formats whose fragments are the loaded registers need no unpacking, but keep these until the step
  // is done.
  constexpr bool kUnpacks = !Format::kFragments;
  uint32_t fragments[kUnpacks ? 2 : 1][Format::kPasses][4][4];
  const auto unpack = [&](uint32_t (&into)[Format::kPasses][4][4], const typename Format::Raw& from) {
#pragma unroll
    for (int pass = 0; pass < Format::kPasses; ++pass) unpack_step<Format>(from, lane, pass, into[pass]);
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
      const uint64_t operand = swizzled_operand(own_ring + place.slot * kWideBlockBytes);
      wgmma_begin();
#pragma unroll
      for (int pass = 0; pass < Format::kPasses; ++pass) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma(acc, a[pass][j], operand + static_cast<uint64_t>(j * 2), pass + j > 0 ? 1 : 1 - fresh);
        }
      }
      wgmma_commit();

      // The stage that the step before has left, which a thread alone may wait for.
      if (leads && begun) feeder.feed();
      begun = true;
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
      finish_round(true);
    }
  }

  const int first_tile = static_cast<int>(blockIdx.y) * Shape::kTiles;
  if (finished * Shape::kPieces < part.num_splits) finish_round(false);
  OutputRows<8> rows;
  rows.load(task, first_tile, thread & 7, 8);
  const float factor[1] = {token_factor(task, first_token + own_token)};
  rows.finish(task, first_token + own_token, 1, factor, own);
  end_after_predecessor(task.beside);
#endif
}

template <class Format>
void launch_flat(const MatmulTask& task) {
  const dim3 grid(static_cast<unsigned>((task.num_tokens + FlatBlock::kTokens - 1) / FlatBlock::kTokens),
                  static_cast<unsigned>((task.part.num_tiles + FlatBlock::kTiles - 1) / FlatBlock::kTiles));
  allow_shared(flat_kernel<Format>, FlatBlock::kSharedBytes);
  launch(flat_kernel<Format>, grid, dim3(FlatBlock::kThreads), FlatBlock::kSharedBytes, task.stream, task);
}

}  // namespace tw::cuda
