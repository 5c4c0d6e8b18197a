// Matrix products for many tokens on Hopper (sm_90a): wgmma with the inputs in shared memory. Producers' warps fill a
// ring of stages, 64 inputs each: the copy engine brings the tokens' inputs as they lie in memory (activations.h), and
// FP16 weights as stored, which consumers load as fragments; other weights are unpacked, a tile of 16 rows a warp, into
// the layout of the inputs. Two consuming warp groups have 64 outputs each, of their own rows or tokens. A block stays
// and takes one tile of outputs after another, so the next one's first stages fill while outputs are written. Blocks
// may form clusters of consecutive rows and the same tokens: each copies a part of the inputs to all.
//
// The sums are those of the kernel for few tokens: 16 inputs an instruction in order of k within a piece, the pieces
// added in order.
//
// Bytes from L2 of a stage of 128 × 128: 64 inputs of 128 rows as stored, and 16 KiB of inputs / blocks of the cluster.
#pragma once

#include <algorithm>

#include "cuda/hopper.cuh"
#include "cuda/matmul_narrow.cuh"
#include "cuda/matmul_wide.cuh"
#include "cuda/output_rows.cuh"

namespace tw::cuda {

// kRowGroups · kTokenGroups = 2 warp groups, each with 64 outputs of kGroupTokens tokens.
template <int kRowGroupsOf, int kTokenGroupsOf, int kGroupTokensOf>
struct TallShape {
  static constexpr int kRowGroups = kRowGroupsOf;
  static constexpr int kTokenGroups = kTokenGroupsOf;
  static constexpr int kGroupTokens = kGroupTokensOf;
  static constexpr int kTiles = kRowGroups * 4;  // of 16 rows
  static constexpr int kTokens = kTokenGroups * kGroupTokens;
  static constexpr int kGroups = kGroupTokens / 8;
  static constexpr int kInputBytes = kTokens * 128;  // of a stage
  // Outputs on their way out, a warp group's [tokens][kSumRow].
  static constexpr int kExchangeTokens = 64;
  static constexpr int kSumRow = 64 + 4;
  static constexpr int kExchangeBytes = 2 * kExchangeTokens * kSumRow * 4;
};

// How a block with weights of a format is made up.
template <class Format, class Shape>
struct TallBlock {
  // Fragments as stored are copied as they are; a consumer takes them into registers. Others are unpacked.
  static constexpr bool kCopied = Format::kFragments && Format::kPasses == 1;
  static constexpr int kProducerWarps = kCopied ? 4 : Shape::kTiles;
  static constexpr int kOwnTiles = Shape::kTiles / kProducerWarps;
  static constexpr int kThreads = kProducerWarps * 32 + 256;
  // Registers of a thread: the sums of a piece and of all pieces; what unpacking needs. Together no more than what a
  // block is launched with.
  static constexpr int kConsumerRegisters = kCopied ? 232 : kProducerWarps == 8 ? 168 : 184;
  static constexpr int kProducerRegisters = kCopied ? 40 : kProducerWarps == 8 ? 88 : 136;

  static constexpr int kWeightBytes = Format::kPasses * Shape::kTiles * 2048;  // of a stage: [pass][rows][128]
  static constexpr int kStageBytes = kWeightBytes + Shape::kInputBytes;
  // A producer's ring of stored weights, in steps of a tile.
  static constexpr int kFittingItems = 7168 / tw::cuda::kStageBytes<Format>;
  static constexpr int kItems = kFittingItems < 2 ? 2 : kFittingItems < 6 ? kFittingItems : 6;
  static constexpr int kItemBytes = kCopied ? 0 : kProducerWarps * kItems * tw::cuda::kStageBytes<Format>;
  static constexpr int kFitting = (230000 - 1024 - Shape::kExchangeBytes - kItemBytes) / (kStageBytes + 16);
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  static constexpr int kBytes = 1024 + kStages * (kStageBytes + 16) + Shape::kExchangeBytes + kItemBytes;
};

// Which outputs a cluster computes next: pairs of (rows of the cluster, tokens), tokens first.
class TileCursor {
 public:
  __device__ __forceinline__ TileCursor(int token_tiles, int num_tiles, int first, int stride)
      : token_tiles_(token_tiles), num_tiles_(num_tiles), stride_(stride), at_(first) {
    split();
  }
  __device__ __forceinline__ bool done() const { return at_ >= num_tiles_; }
  __device__ __forceinline__ int rows() const { return rows_; }
  __device__ __forceinline__ int tokens() const { return tokens_; }
  __device__ __forceinline__ void advance() {
    at_ += stride_;
    split();
  }

 private:
  __device__ __forceinline__ void split() {
    rows_ = at_ / token_tiles_;
    tokens_ = at_ - rows_ * token_tiles_;
  }
  const int token_tiles_;
  const int num_tiles_;
  const int stride_;
  int at_;
  int rows_, tokens_;
};

struct TallTask {
  MatmulTask product;
  int32_t token_tiles;
  int32_t num_tiles;  // token_tiles · rows of clusters
};

// The barriers of stage `slot`: full, then empty.
__device__ __forceinline__ uint32_t full_barrier(uint32_t barriers, uint32_t slot) { return barriers + slot * 16; }
__device__ __forceinline__ uint32_t empty_barrier(uint32_t barriers, uint32_t slot) { return barriers + slot * 16 + 8; }

// A lane's four fragments of a step of a tile, as formats.cuh stores them.
__device__ __forceinline__ void load_fragments(uint32_t (&a)[4][4], uint32_t address) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[j][0]), "=r"(a[j][1]), "=r"(a[j][2]), "=r"(a[j][3])
                 : "r"(address + static_cast<uint32_t>(j * 512))
                 : "memory");
  }
}

// The four fragments of a step of a tile into shared memory at `tile`.
__device__ __forceinline__ void store_fragments(uint32_t tile, const uint32_t (&a)[4][4], int lane) {
  const int row = (lane & 7) + (lane >> 3 & 1) * 8;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int chunk = (2 * j + (lane >> 4)) ^ (lane & 7);
    store_matrices(tile + static_cast<uint32_t>(row * 128 + chunk * 16), a[j]);
  }
}

// Where a block stands in its cluster and the cluster in the grid.
struct TallPlace {
  int first_cluster;
  int num_clusters;
  uint32_t rank;
  uint32_t cluster_size;

  __device__ __forceinline__ TileCursor tiles(const TallTask& tall) const {
    return {tall.token_tiles, tall.num_tiles, first_cluster, num_clusters};
  }
  // The first tile of 16 rows of the block's outputs.
  template <class Shape>
  __device__ __forceinline__ int first_tile(const TileCursor& at) const {
    return (at.rows() * static_cast<int>(cluster_size) + static_cast<int>(rank)) * Shape::kTiles;
  }
};

// One of the copies that fill a stage, asked for by one thread: the same every step, a step further on. An own copy per
// warp, since the copies of a warp's lanes are issued one after another.
template <class Format, class Shape>
class StageCopy {
 public:
  using Block = TallBlock<Format, Shape>;
  static constexpr int kInputs = Shape::kTokens / kTokenBlock;
  // Copy `index` of the inputs: the block's share of 64 tokens, for all blocks of the cluster.
  __device__ __forceinline__ StageCopy(const MatmulTask& task, const TallPlace& place, int index)
      : index_(index), stride_(task.input_stride / 64 * kWideBlockBytes), last_((task.num_tokens - 1) / kTokenBlock) {
    bytes_ = static_cast<uint32_t>(kWideBlockBytes) / place.cluster_size;
    blocks_ = static_cast<uint16_t>((1u << place.cluster_size) - 1);
    first_ = static_cast<const uint8_t*>(task.input) + place.rank * bytes_;
    to_ = static_cast<uint32_t>(Block::kWeightBytes + index * kWideBlockBytes) + place.rank * bytes_;
  }
  // Past the last token any inputs will do.
  __device__ __forceinline__ void open(const TileCursor& at) {
    from_ = first_ + min(at.tokens() * kInputs + index_, last_) * stride_;
  }
  __device__ __forceinline__ void ask(uint32_t stage, uint32_t full) {
    if (blocks_ == 1) {
      copy_bulk(stage + to_, from_, static_cast<int>(bytes_), full);
    } else {
      copy_bulk_to(blocks_, stage + to_, from_, bytes_, full);
    }
    from_ += kWideBlockBytes;
  }

 private:
  const int index_;
  const int64_t stride_;
  const int last_;
  uint32_t bytes_, to_;
  uint16_t blocks_;
  const uint8_t* first_;
  const uint8_t* from_ = nullptr;
};

// The producers' warps for formats that are copied as stored: each asks for some of a stage's tiles, and of the inputs.
template <class Format, class Shape>
__device__ __forceinline__ void produce_copies(const TallTask& tall, uint32_t ring, uint32_t barriers,
                                               const TallPlace& where) {
  using Block = TallBlock<Format, Shape>;
  const PackedPart& part = tall.product.part;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  StageCopy<Format, Shape> inputs(tall.product, where, warp);
  RingPlace<Block::kStages> place;
  bool awaited = false;
  for (TileCursor at = where.tiles(tall); !at.done(); at.advance()) {
    const uint8_t* weights[Block::kOwnTiles];
#pragma unroll
    for (int t = 0; t < Block::kOwnTiles; ++t) {
      const int tile = where.first_tile<Shape>(at) + t * Block::kProducerWarps + warp;
      weights[t] = part.tiles + min(tile, part.num_tiles - 1) * part.tile_stride;
    }
    inputs.open(at);
    for (int step = 0; step < part.num_steps; ++step) {
      const uint32_t full = full_barrier(barriers, place.slot);
      const uint32_t stage = ring + place.slot * static_cast<uint32_t>(Block::kStageBytes);
      // A fresh barrier counts as past the phase before its first.
      barrier_wait(empty_barrier(barriers, place.slot), place.parity ^ 1);
      if (lane == 0) {
        if (warp == 0) barrier_expect(full, Block::kStageBytes);
#pragma unroll
        for (int t = 0; t < Block::kOwnTiles; ++t) {
          copy_bulk(stage + static_cast<uint32_t>((t * Block::kProducerWarps + warp) * 2048), weights[t], 2048, full);
          weights[t] += 2048;
        }
        if (!awaited) await_predecessor();
        awaited = true;
        if (warp < StageCopy<Format, Shape>::kInputs) inputs.ask(stage, full);
      }
      __syncwarp();
      place.advance();
    }
  }
}

// A producer's ring of stored weights: an item is a step of its tile.
template <class Format, class Shape>
class ItemRing {
 public:
  using Block = TallBlock<Format, Shape>;
  __device__ __forceinline__ ItemRing(const TallTask& tall, const TallPlace& where, uint8_t* ring, int warp, int lane)
      : part_(tall.product.part), where_(where), at_(where.tiles(tall)), ring_(ring), warp_(warp), lane_(lane) {
    open();
    for (int i = 0; i < Block::kItems; ++i) fetch();
  }
  // The oldest item, which the warp waits for.
  __device__ __forceinline__ typename Format::Raw take() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Block::kItems - 1) : "memory");
    __syncwarp();
    const auto raw = load_staged<Format>(ring_ + taken_ * kStageBytes<Format>, lane_);
    taken_ = taken_ + 1 == Block::kItems ? 0 : taken_ + 1;
    return raw;
  }
  // Asks for one item more, in the place of the oldest one taken, whose bytes are in registers.
  __device__ __forceinline__ void fetch() {
    __syncwarp();
    if (!at_.done()) {
      uint8_t* const to = ring_ + fetched_ * kStageBytes<Format>;
      const uint8_t* from = tile_ + step_ * static_cast<uint32_t>(Format::kStepBytes);
#pragma unroll
      for (int piece = 0; piece < Format::kStepBytes / 16; piece += 32) {
        if (piece + lane_ < Format::kStepBytes / 16) {
          copy_async16(to + (piece + lane_) * 16, from + (piece + lane_) * 16, true);
        }
      }
      if constexpr (Format::kSuperBytes > 0) {
        const uint8_t* super = tile_ + static_cast<uint32_t>(part_.num_steps) * Format::kStepBytes +
                               (step_ >> 2) * static_cast<uint32_t>(Format::kSuperBytes);
        if (lane_ < Format::kSuperBytes / 16) {
          copy_async16(to + Format::kStepBytes + lane_ * 16, super + lane_ * 16, true);
        }
      }
      if (++step_ == static_cast<uint32_t>(part_.num_steps)) {
        step_ = 0;
        at_.advance();
        open();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    fetched_ = fetched_ + 1 == Block::kItems ? 0 : fetched_ + 1;
  }

 private:
  __device__ __forceinline__ void open() {
    if (at_.done()) return;
    tile_ = part_.tiles + min(where_.first_tile<Shape>(at_) + warp_, part_.num_tiles - 1) * part_.tile_stride;
  }

  const PackedPart& part_;
  const TallPlace& where_;
  TileCursor at_;
  uint8_t* const ring_;
  const int warp_;
  const int lane_;
  const uint8_t* tile_ = nullptr;
  uint32_t step_ = 0;
  int fetched_ = 0, taken_ = 0;
};

// The producers' warps for formats that are unpacked.
template <class Format, class Shape>
__device__ __forceinline__ void produce_unpacked(const TallTask& tall, uint32_t ring, uint32_t barriers, uint8_t* items,
                                                 const TallPlace& where) {
  using Block = TallBlock<Format, Shape>;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  ItemRing<Format, Shape> stored(tall, where, items + warp * Block::kItems * kStageBytes<Format>, warp, lane);
  await_predecessor();
  StageCopy<Format, Shape> inputs(tall.product, where, warp);
  RingPlace<Block::kStages> place;
  typename Format::Raw raw = stored.take();
  for (TileCursor at = where.tiles(tall); !at.done(); at.advance()) {
    inputs.open(at);
    for (int step = 0; step < tall.product.part.num_steps; ++step) {
      const uint32_t full = full_barrier(barriers, place.slot);
      const uint32_t stage = ring + place.slot * static_cast<uint32_t>(Block::kStageBytes);
      // A fresh barrier counts as past the phase before its first.
      barrier_wait(empty_barrier(barriers, place.slot), place.parity ^ 1);
      if (warp < StageCopy<Format, Shape>::kInputs && lane == 0) {
        if (warp == 0) barrier_expect(full, Shape::kInputBytes);
        inputs.ask(stage, full);
      }
      __syncwarp();
      const typename Format::Raw now = raw;
      stored.fetch();
      raw = stored.take();
#pragma unroll
      for (int pass = 0; pass < Format::kPasses; ++pass) {
        uint32_t a[4][4];
        Format::unpack(now, lane, pass, a);
        store_fragments(stage + static_cast<uint32_t>((pass * Shape::kTiles + warp) * 2048), a, lane);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(full);
      place.advance();
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

template <class Format, class Shape>
__device__ __forceinline__ void consume(const TallTask& tall, uint32_t ring, uint32_t barriers, float* exchange,
                                        const int* begins, const TallPlace& where) {
  using Block = TallBlock<Format, Shape>;
  constexpr int kGroups = Shape::kGroups;
  const MatmulTask& task = tall.product;
  const PackedPart& part = task.part;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5 & 3;
  const int warp_group = (static_cast<int>(threadIdx.x) - Block::kProducerWarps * 32) >> 7;
  const int row_group = Shape::kRowGroups == 1 ? 0 : warp_group;
  const int token_group = Shape::kTokenGroups == 1 ? 0 : warp_group;
  const uint32_t weights = ring + static_cast<uint32_t>(row_group * 4 * 2048);
  const uint32_t inputs = ring + static_cast<uint32_t>(Block::kWeightBytes + token_group * Shape::kGroupTokens * 128);
  // Lane r of a warp tells block r of the cluster that the warp is done with a stage.
  const uint32_t remote = remote_address(barriers + 8, static_cast<uint32_t>(lane) < where.cluster_size ? lane : 0);
  const auto release = [&](uint32_t slot) {
    if (static_cast<uint32_t>(lane) < where.cluster_size) barrier_arrive_remote(remote + slot * 16);
  };
  float* const own_exchange = exchange + warp_group * Shape::kExchangeTokens * Shape::kSumRow;

  RingPlace<Block::kStages> place;
  const auto stage_bytes = [&] { return place.slot * static_cast<uint32_t>(Block::kStageBytes); };
  // Sums the next `num_steps` steps; while a step's instructions run, the one before is given back.
  const auto sum_piece = [&](float (&acc)[kGroups][4], int num_steps) {
    uint32_t before = 0;
    if constexpr (Block::kCopied) {
      uint32_t a[2][4][4];
      const auto load = [&](uint32_t (&into)[4][4]) {
        barrier_wait(full_barrier(barriers, place.slot), place.parity);
        load_fragments(into, weights + stage_bytes() + static_cast<uint32_t>(warp * 2048 + lane * 16));
      };
      load(a[0]);
      for (int first = 0; first < num_steps; first += 2) {
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          const int step = first + d;
          if (step >= num_steps) break;
          const uint64_t b = swizzled_operand(inputs + stage_bytes());
          wgmma_begin();
#pragma unroll
          for (int j = 0; j < 4; ++j) wgmma(acc, a[d][j], b + static_cast<uint64_t>(j * 2), j > 0 ? 1 : step);
          wgmma_commit();
          const uint32_t slot = place.slot;
          place.advance();
          if (step > 0) {
            wgmma_wait<1>();
            release(before);
          }
          before = slot;
          if (step + 1 < num_steps) load(a[1 - d]);
        }
      }
    } else {
      for (int step = 0; step < num_steps; ++step) {
        barrier_wait(full_barrier(barriers, place.slot), place.parity);
        // The producers' stores; a fence of theirs would wait for the weights on their way, too.
        shared_stores_done();
        const uint64_t a = swizzled_operand(weights + stage_bytes());
        const uint64_t b = swizzled_operand(inputs + stage_bytes());
        wgmma_begin();
#pragma unroll
        for (int pass = 0; pass < Format::kPasses; ++pass) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            wgmma(acc, a + static_cast<uint64_t>(pass * Shape::kTiles * 128 + j * 2), b + static_cast<uint64_t>(j * 2),
                  pass + j > 0 ? 1 : step);
          }
        }
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          release(before);
        }
        before = place.slot;
        place.advance();
      }
    }
    wgmma_finish(acc);
    release(before);
  };

  for (TileCursor at = where.tiles(tall); !at.done(); at.advance()) {
    float acc[kGroups][4];
    float sum[kGroups][4] = {};
    for (int piece = 0; piece < part.num_splits; ++piece) {
      sum_piece(acc, begins[piece + 1] - begins[piece]);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[g][e] = __fadd_rn(sum[g][e], acc[g][e]);
      }
    }

    const int first_tile = where.first_tile<Shape>(at) + row_group * 4;
    if (first_tile >= part.num_tiles) continue;
    const int64_t first_token = static_cast<int64_t>(at.tokens()) * Shape::kTokens + token_group * Shape::kGroupTokens;
    OutputRows<2> rows;
    rows.load(task, first_tile, lane, 32);
    const bool paired = task.epilogue == Epilogue::kGateUp;
    float token_factors[Shape::kGroupTokens / 32];  // of token 32 i + lane
#pragma unroll
    for (int i = 0; i < Shape::kGroupTokens / 32; ++i)
      token_factors[i] = token_factor(task, first_token + i * 32 + lane);
#pragma unroll
    for (int chunk = 0; chunk < Shape::kGroupTokens / Shape::kExchangeTokens; ++chunk) {
      const int64_t token = first_token + chunk * Shape::kExchangeTokens;
      if (token >= task.num_tokens) break;
      named_sync(1 + warp_group, 128);  // the last chunk's values are read
#pragma unroll
      for (int g = 0; g < Shape::kExchangeTokens / 8; ++g) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int to = g * 8 + (lane & 3) * 2 + (e & 1);
          own_exchange[to * Shape::kSumRow + warp * 16 + (lane >> 2) + (e >= 2 ? 8 : 0)] =
              sum[chunk * (Shape::kExchangeTokens / 8) + g][e];
        }
      }
      named_sync(1 + warp_group, 128);
      constexpr int kAtOnce = 8;
#pragma unroll
      for (int batch = 0; batch < Shape::kExchangeTokens / 32; ++batch) {
        const int first = batch * 32 + warp;
        const float of_lanes = token_factors[chunk * (Shape::kExchangeTokens / 32) + batch];
        float values[kAtOnce][2], factors[kAtOnce];
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          factors[t] = __shfl_sync(~0u, of_lanes, warp + t * 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            values[t][i] = own_exchange[(first + t * 4) * Shape::kSumRow + OutputRows<2>::sum_row(paired, i, lane, 32)];
          }
        }
        rows.finish(task, token + first, 4, factors, values);
      }
    }
  }
}

template <class Format, class Shape>
__global__ void __launch_bounds__(TallBlock<Format, Shape>::kThreads, 1)
    tall_kernel(const __grid_constant__ TallTask tall) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  using Block = TallBlock<Format, Shape>;
  const PackedPart& part = tall.product.part;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t ring = (shared_address(unaligned) + 1023) & ~1023u;
  constexpr uint32_t kRingBytes = static_cast<uint32_t>(Block::kStages * Block::kStageBytes);
  uint8_t* const exchange = unaligned + (ring - shared_address(unaligned)) + kRingBytes;
  [[maybe_unused]] uint8_t* const items = exchange + Shape::kExchangeBytes;
  const uint32_t barriers = ring + kRingBytes + Shape::kExchangeBytes + Block::kItemBytes;
  TallPlace where{};
  where.rank = cluster_rank();
  where.cluster_size = cluster_blocks();
  where.first_cluster = static_cast<int>(blockIdx.x / where.cluster_size);
  where.num_clusters = static_cast<int>(gridDim.x / where.cluster_size);
  __shared__ int begins[kMostPieces + 1];
  if (thread <= part.num_splits) begins[thread] = thread * part.num_steps / part.num_splits;
  if (thread == 0) {
    for (uint32_t slot = 0; slot < Block::kStages; ++slot) {
      barrier_init(full_barrier(barriers, slot), Block::kCopied ? 1 : 1 + Block::kProducerWarps);
      barrier_init(empty_barrier(barriers, slot), static_cast<int>(8 * where.cluster_size));
    }
    barrier_init_done();
  }
  cluster_sync();
  release_successor();
  if (thread < Block::kProducerWarps * 32) {
    set_registers_down<Block::kProducerRegisters>();
    if constexpr (Block::kCopied) {
      produce_copies<Format, Shape>(tall, ring, barriers, where);
    } else {
      produce_unpacked<Format, Shape>(tall, ring, barriers, items, where);
    }
  } else {
    set_registers_up<Block::kConsumerRegisters>();
    await_predecessor();
    consume<Format, Shape>(tall, ring, barriers, reinterpret_cast<float*>(exchange), begins, where);
  }
  __syncwarp();
  cluster_sync();  // no block ends while another may still reach into its memory
#endif
}

using TallShape128 = TallShape<2, 1, 128>;
using TallShape64 = TallShape<1, 2, 64>;

template <class Format, class Shape>
void launch_tall(const MatmulTask& task, int cluster_size) {
  using Block = TallBlock<Format, Shape>;
  TallTask tall{task, 0, 0};
  const int row_tiles = Shape::kTiles * cluster_size;
  tall.token_tiles = (task.num_tokens + Shape::kTokens - 1) / Shape::kTokens;
  tall.num_tiles = tall.token_tiles * ((task.part.num_tiles + row_tiles - 1) / row_tiles);
  const int clusters = std::min(tall.num_tiles, device_attribute(cudaDevAttrMultiProcessorCount) / cluster_size);
  const auto kernel = tall_kernel<Format, Shape>;
  allow_shared(kernel, Block::kBytes);
  launch_clusters(kernel, cluster_size, dim3(static_cast<unsigned>(clusters * cluster_size)), dim3(Block::kThreads),
                  Block::kBytes, task.stream, tall);
}

}  // namespace tw::cuda
