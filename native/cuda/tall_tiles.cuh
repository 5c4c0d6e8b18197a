// How the tiles of a product of matmul_tall.cuh are dealt out to blocks: whole, or by pieces of the inputs (matmul.h).
//
// Of pieces, each block has consecutive ones. Where it begins or ends within a tile, it leaves sums in device memory:
// that of the tile's first pieces, and each later piece by itself. Whoever of a tile's blocks ends last adds them in
// order. The group's blocks have the same pieces for each tile of tokens at the same time, so that weights come from
// memory once.
#pragma once

#include <algorithm>

#include "cuda/activations.h"
#include "cuda/hopper.cuh"
#include "cuda/matmul.h"

namespace tw::cuda {

// Two warp groups, each with 64 rows of kTokens tokens.
template <int kTokensOf>
struct TallShape {
  static constexpr int kTiles = 8;  // of 16 rows
  static constexpr int kTokens = kTokensOf;
  static constexpr int kGroups = kTokens / 8;
  static constexpr int kInputBytes = kTokens * 128;  // of a step
  static constexpr int kTokenBlocks = (kTokens + kTokenBlock - 1) / kTokenBlock;
  // Outputs on their way out, a warp group's [tokens][kSumRow].
  static constexpr int kExchangeTokens = kTokens < 64 ? kTokens : 64;
  static constexpr int kExchangeBytes = 2 * kExchangeTokens * kSumRow * 4;
  // A tile's sums of some pieces in device memory: [kGroups][kConsumers] of four.
  static constexpr int64_t kSlotFloats = int64_t{kTiles} * 16 * kTokens;
};

constexpr int kConsumers = 256;

struct TallTask {
  MatmulTask product;
  int32_t token_tiles;
  int32_t row_tiles;     // of a cluster's rows
  int32_t group_blocks;  // blocks that share the pieces of all rows for the same tokens, or 0: tiles are whole
  int32_t slots;         // of a block, for sums of pieces
  int32_t cluster_size;
  int32_t step_rows, step_tokens;  // from a cluster's tile to its next: as many tiles as there are clusters
  // The pieces' first steps, and the last one's end. Here, since what is read from shared memory does not count as the
  // same for all threads, and neither does then what a loop changes as often as it says.
  int32_t begins[kMostPieces + 1];
};

// Which sums a cluster computes next: pieces first_piece … end_piece - 1 of a tile of outputs. What is the same for the
// whole kernel stays in its parameters, since the loop over the inputs has no registers to spare.
class Segments {
 public:
  __device__ __forceinline__ Segments(const TallTask& tall, int cluster) : tall_(tall) {
    rows_ = cluster / tall.token_tiles;
    tokens_ = cluster - rows_ * tall.token_tiles;
    if (!split()) return;
    const int member = rows_;
    const int units = tall.row_tiles * pieces();
    const int first = first_unit(member, units, tall.group_blocks);
    left_ = first_unit(member + 1, units, tall.group_blocks) - first;
    rows_ = first / pieces();
    first_piece_ = first - rows_ * pieces();
  }
  __device__ __forceinline__ bool done() const { return split() ? left_ <= 0 : rows_ >= tall_.row_tiles; }
  __device__ __forceinline__ int rows() const { return rows_; }
  __device__ __forceinline__ int tokens() const { return tokens_; }
  __device__ __forceinline__ int first_piece() const { return first_piece_; }
  __device__ __forceinline__ int end_piece() const { return split() ? min(pieces(), first_piece_ + left_) : pieces(); }
  __device__ __forceinline__ bool whole() const { return first_piece_ == 0 && end_piece() == pieces(); }
  __device__ __forceinline__ void advance() {
    if (split()) {
      left_ -= end_piece() - first_piece_;
      first_piece_ = 0;
      ++rows_;
      return;
    }
    rows_ += tall_.step_rows;
    tokens_ += tall_.step_tokens;
    if (tokens_ < tall_.token_tiles) return;
    tokens_ -= tall_.token_tiles;
    ++rows_;
  }

  // The units (row tile, piece) of group member `member`, and whose a unit is.
  __device__ __forceinline__ static int first_unit(int member, int units, int members) {
    return member * units / members;
  }
  __device__ __forceinline__ static int owner(int unit, int units, int members) {
    return ((unit + 1) * members - 1) / units;
  }

 private:
  __device__ __forceinline__ bool split() const { return tall_.group_blocks > 0; }
  __device__ __forceinline__ int pieces() const { return tall_.product.part.num_splits; }

  const TallTask& tall_;
  int rows_, tokens_;
  int first_piece_ = 0;
  int left_ = 0;  // pieces of a block that shares them
};

// Named barriers of a block; 1 and 2 belong to a warp group each.
constexpr int kConsumersMeet = 3;

// Sums of pieces in device memory.
template <class Shape>
struct PieceSums {
  using Sums = float[Shape::kGroups][4];

  __device__ __forceinline__ static float4* slot(const TallTask& tall, int block, int slot) {
    return reinterpret_cast<float4*>(tall.product.scratch.sums +
                                     (int64_t{block} * tall.slots + slot) * Shape::kSlotFloats);
  }
  __device__ __forceinline__ static void store(float4* slot, int thread, const Sums& sums) {
#pragma unroll
    for (int g = 0; g < Shape::kGroups; ++g) {
      __stcg(slot + g * kConsumers + thread, make_float4(sums[g][0], sums[g][1], sums[g][2], sums[g][3]));
    }
  }
  __device__ __forceinline__ static void load(const float4* slot, int thread, Sums& sums) {
#pragma unroll
    for (int g = 0; g < Shape::kGroups; ++g) {
      const float4 four = __ldcg(slot + g * kConsumers + thread);
      sums[g][0] = four.x;
      sums[g][1] = four.y;
      sums[g][2] = four.z;
      sums[g][3] = four.w;
    }
  }
  __device__ __forceinline__ static void add(Sums& sums, const Sums& piece) {
#pragma unroll
    for (int g = 0; g < Shape::kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[g][e] = __fadd_rn(sums[g][e], piece[g][e]);
    }
  }

  // Announces a tile's pieces that are in place; the consumers of the block whose pieces complete it get all sums.
  __device__ __forceinline__ static bool complete(const TallTask& tall, const Segments& at, int thread, bool* last,
                                                  Sums& sums) {
    const int pieces = tall.product.part.num_splits;
    int32_t* const arrivals = tall.product.scratch.arrivals + at.rows() * tall.token_tiles + at.tokens();
    __threadfence();
    named_sync(kConsumersMeet, kConsumers);
    if (thread == 0) {
      const int own = at.end_piece() - at.first_piece();
      *last = atomicAdd(arrivals, own) + own == pieces;
      if (*last) *arrivals = 0;
    }
    named_sync(kConsumersMeet, kConsumers);
    if (!*last) return false;
    __threadfence();
    const int units = tall.row_tiles * pieces;
    const auto block_of = [&](int member) { return member * tall.token_tiles + at.tokens(); };
    const int first = at.rows() * pieces;
    int member = Segments::owner(first, units, tall.group_blocks);
    load(slot(tall, block_of(member), tall.slots - 1), thread, sums);
    for (int unit = Segments::first_unit(member + 1, units, tall.group_blocks); unit < first + pieces; ++unit) {
      member = Segments::owner(unit, units, tall.group_blocks);
      float piece[Shape::kGroups][4];
      load(slot(tall, block_of(member), unit - Segments::first_unit(member, units, tall.group_blocks)), thread, piece);
      add(sums, piece);
    }
    return true;
  }
};

// How the tiles of a product are dealt out.
enum class Deal { kTiles, kPairs, kPieces };

// Blocks of a group, sums that a block may have to leave, and whether the scratch memory holds them.
template <class Shape>
struct PieceDeal {
  int group_blocks;
  int slots;
  bool fits;

  static PieceDeal of(const MatmulTask& task, int token_tiles, int row_tiles, int processors) {
    const int pieces = task.part.num_splits;
    const int units = row_tiles * pieces;
    const int members = std::max(1, std::min(units, processors / token_tiles));
    const int slots = std::min(pieces - 1, (units + members - 1) / members) + 1;
    const int64_t floats = int64_t{members} * token_tiles * slots * Shape::kSlotFloats;
    const bool fits = token_tiles <= processors && task.scratch.num_floats >= floats &&
                      task.scratch.num_arrivals >= int64_t{row_tiles} * token_tiles;
    return {members, slots, fits};
  }
};

}  // namespace tw::cuda
