// Matrix products of more than a few tokens on Hopper (sm_90a): wgmma with the weights in registers and the inputs in
// shared memory. Producers' warps fill a ring of stages by the copy engine: the weights as stored, and the tokens'
// inputs as they lie in memory (activations.h). Two consuming warp groups have 64 rows each; their warps unpack the
// fragments of a step while the instructions of the step before run. A block stays and takes one tile of outputs after
// another, so the next one's first stages fill while outputs are written.
//
// Whole tiles may go to clusters of two blocks, of consecutive rows and the same tokens: each copies half of the inputs
// to both. tall_tiles.cuh says which tiles, or pieces of tiles, a block has.
//
// The sums are those of the kernel for few tokens: 16 inputs an instruction in order of k within a piece, the pieces
// added in order.
//
// Bytes from L2 of a step of 128 rows × 128 tokens: 64 inputs of 128 rows as stored, and 16 KiB of inputs / blocks of
// the cluster. Shared memory moves these in and out, and the inputs once more: with FP16 weights 80 KiB of 64 that fit
// into the time of the instructions, with 4-bit ones 58.
#pragma once

#include <type_traits>

#include "cuda/hopper.cuh"
#include "cuda/matmul_narrow.cuh"
#include "cuda/matmul_wide.cuh"
#include "cuda/output_rows.cuh"
#include "cuda/tall_tiles.cuh"

namespace tw::cuda {

// The lanes that tell that a warp has read a stage: one, since all of them have when their instructions are issued, and
// 32 arrivals take their time (BF16 5 %). But racecheck takes an arrival for that lane's own reads alone, whatever
// synchronises the warp before.
constexpr int kTellingLanes = kForRacecheck ? 32 : 1;

// How a block with weights of a format is made up.
template <class Format, class Shape>
struct TallBlock {
  static constexpr int kProducerWarps = 4;
  static constexpr int kThreads = kProducerWarps * 32 + kConsumers;
  // Registers of a thread: the sums of a piece and of all pieces, two steps' fragments. Together no more than what a
  // block is launched with.
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  // Whether a step's stored weights leave shared memory while the instructions before are issued, not after. Fragments
  // have no place until then.
  static constexpr bool kFetchesEarly = !Format::kFragments;

  // Whether the last run of a tile stands apart, so that the others need not ask whether one follows: 3 to 10 % of a
  // product where unpacking takes the longest. The others are faster with the shorter code (benchmarks/NOTES.md).
  static constexpr bool kLastApart = !Format::kFragments && !std::is_same_v<Format, Q8_0Format>;

  // Small steps come in twos, since each copy costs the time of its request.
  static constexpr int kSteps = Format::kStepBytes < 2048 ? 2 : 1;
  // A tile's part of a stage: steps, then the supers that they may need.
  static constexpr int kTileBytes = kSteps * Format::kStepBytes + kSteps * Format::kSuperBytes;
  static constexpr int kWeightBytes = (Shape::kTiles * kTileBytes + 1023) / 1024 * 1024;
  static constexpr int kStageBytes = kWeightBytes + kSteps * Shape::kInputBytes;
  static constexpr int kFitting = (232000 - 1024 - Shape::kExchangeBytes) / (kStageBytes + 16);
  static constexpr int kStages = kFitting < 12 ? kFitting : 12;
  static constexpr int kBytes = 1024 + kStages * (kStageBytes + 16) + Shape::kExchangeBytes;
};

// A place in the ring: where the stage is, and its barriers: full, then empty.
template <class Block>
struct StageCursor {
  uint32_t barrier;
  uint32_t parity = 0;
  uint32_t offset = 0;

  __device__ __forceinline__ explicit StageCursor(uint32_t barriers) : barrier(barriers) {}
  __device__ __forceinline__ void advance() {
    offset += static_cast<uint32_t>(Block::kStageBytes);
    barrier += 16;
    if (offset < static_cast<uint32_t>(Block::kStages * Block::kStageBytes)) return;
    offset = 0;
    barrier -= Block::kStages * 16;
    parity ^= 1;
  }
};

// Where a block stands in its cluster and the cluster in the grid.
struct TallPlace {
  int cluster;
  uint32_t rank;
  uint32_t cluster_size;

  __device__ __forceinline__ Segments segments(const TallTask& tall) const { return {tall, cluster}; }
  // The first tile of 16 rows of the block's outputs.
  template <class Shape>
  __device__ __forceinline__ int first_tile(const Segments& at) const {
    return (at.rows() * static_cast<int>(cluster_size) + static_cast<int>(rank)) * Shape::kTiles;
  }
};

// The producers' warps: each asks for some of a stage's copies. An own thread per copy, since the copies of a warp's
// lanes are issued one after another.
template <class Format, class Shape>
__device__ __forceinline__ void produce(const TallTask& tall, uint32_t ring, uint32_t barriers,
                                        const TallPlace& where) {
  using Block = TallBlock<Format, Shape>;
  const MatmulTask& task = tall.product;
  const PackedPart& part = task.part;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >> 5, 0);  // known to be the same for all lanes
  const bool asks = elect_one();
  // Of a block of 64 tokens, or as many of it as the shape has.
  constexpr int kBlockBytes = Shape::kInputBytes / Shape::kTokenBlocks;
  const uint32_t share = static_cast<uint32_t>(kBlockBytes) / where.cluster_size;
  const auto blocks = static_cast<uint16_t>((1u << where.cluster_size) - 1);
  const int64_t stride = task.input_stride / 64 * kWideBlockBytes;
  const int last_block = (task.num_tokens - 1) / kTokenBlock;
  // The warp's own copies of inputs: blocks of 64 tokens of a step or the one after.
  constexpr int kInputCopies =
      (Shape::kTokenBlocks * Block::kSteps + Block::kProducerWarps - 1) / Block::kProducerWarps;
  constexpr int kTileCopies = Shape::kTiles / Block::kProducerWarps;
  const int block = warp % Shape::kTokenBlocks;
  const int ahead = warp / Shape::kTokenBlocks;
  static_assert(kInputCopies == 1, "a warp copies one block of inputs at most");
  const uint32_t inputs_to = Block::kWeightBytes +
                             static_cast<uint32_t>(ahead * Shape::kInputBytes + block * kBlockBytes) +
                             where.rank * share;
  const uint32_t weights_to = static_cast<uint32_t>(warp * Block::kTileBytes);
  StageCursor<Block> place(barriers);
  bool awaited = false;
  for (Segments at = where.segments(tall); !at.done(); at.advance()) {
    const int begin = tall.begins[at.first_piece()];
    const int end = tall.begins[at.end_piece()];
    const uint8_t* weights[kTileCopies];
#pragma unroll
    for (int t = 0; t < kTileCopies; ++t) {
      const int tile = where.first_tile<Shape>(at) + t * Block::kProducerWarps + warp;
      weights[t] = part.tiles + min(tile, part.num_tiles - 1) * part.tile_stride + begin * Format::kStepBytes;
    }
    // From the weights of a step to its super.
    int to_super = (part.num_steps - begin) * Format::kStepBytes + begin / 4 * Format::kSuperBytes;
    // Past the last token any inputs will do.
    const int first_block = at.tokens() * Shape::kTokens / kTokenBlock + block;
    const int within = at.tokens() * Shape::kTokens % kTokenBlock * 128;
    const uint8_t* inputs = static_cast<const uint8_t*>(task.input) + min(first_block, last_block) * stride +
                            int64_t{begin + ahead} * kWideBlockBytes + within + where.rank * share;
    for (int step = begin; step < end; step += Block::kSteps) {
      const int steps = min(Block::kSteps, end - step);
      const uint32_t full = place.barrier;
      const uint32_t stage = ring + place.offset;
      const int supers = Format::kSuperBytes == 0 ? 0 : (step + steps - 1) / 4 - step / 4 + 1;
      // A fresh barrier counts as past the phase before its first.
      barrier_wait(full + 8, place.parity ^ 1);
      if (asks) {
        if (warp == 0) {
          barrier_expect(full, Shape::kTiles * (steps * Format::kStepBytes + supers * Format::kSuperBytes) +
                                   steps * Shape::kInputBytes);
        }
#pragma unroll
        for (int t = 0; t < kTileCopies; ++t) {
          const uint32_t to = stage + weights_to + static_cast<uint32_t>(t * Block::kProducerWarps * Block::kTileBytes);
          copy_bulk(to, weights[t], steps * Format::kStepBytes, full);
          if constexpr (Format::kSuperBytes > 0) {
            copy_bulk(to + Block::kSteps * Format::kStepBytes, weights[t] + to_super, supers * Format::kSuperBytes,
                      full);
          }
          weights[t] += Block::kSteps * Format::kStepBytes;
        }
        if constexpr (Format::kSuperBytes > 0) {
          to_super +=
              ((step + Block::kSteps) / 4 - step / 4) * Format::kSuperBytes - Block::kSteps * Format::kStepBytes;
        }
        if (!awaited) await_predecessor(task.beside);
        awaited = true;
        if (warp < Shape::kTokenBlocks * Block::kSteps && ahead < steps) {
          if (blocks == 1) {
            copy_bulk(stage + inputs_to, inputs, static_cast<int>(share), full);
          } else {
            copy_bulk_to(blocks, stage + inputs_to, inputs, share, full);
          }
          inputs += Block::kSteps * kWideBlockBytes;
        }
      }
      __syncwarp();
      place.advance();
    }
  }
}

// One warp group's outputs of a tile, from its sums, by way of shared memory: there the rows of a token lie together.
template <class Shape>
__device__ __forceinline__ void write_outputs(const MatmulTask& task, int first_tile, int64_t first_token,
                                              const float (&sum)[Shape::kGroups][4], float* exchange, int warp_group,
                                              int warp, int lane) {
  constexpr int kTokens = Shape::kExchangeTokens;
  constexpr int kChunks = Shape::kTokens / kTokens;
  // What follows is computed anew for each tile: the loop over the inputs has no registers for it.
  asm volatile("" : "+r"(warp), "+r"(lane));
  const auto put = [&](int chunk) {
    float* const to = exchange + (lane & 3) * 2 * kSumRow + warp * 16 + (lane >> 2);
#pragma unroll
    for (int g = 0; g < kTokens / 8; ++g) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[(g * 8 + (e & 1)) * kSumRow + (e >= 2 ? 8 : 0)] = sum[chunk * (kTokens / 8) + g][e];
      }
    }
  };
  const bool paired = task.epilogue == Epilogue::kGateUp;
  const bool all_rows = (first_tile + 4) * (paired ? 8 : 16) <= task.part.num_rows;
  if (all_rows && OutputFours<kTokens>::possible(task)) {
    OutputFours<kTokens> fours(task, first_tile, first_token, warp, lane);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (first_token + chunk * kTokens >= task.num_tokens) break;
      fours.prepare(task, chunk);
      named_sync(1 + warp_group, 128);  // the last chunk's values are read
      put(chunk);
      named_sync(1 + warp_group, 128);
      fours.finish(task, chunk, exchange);
    }
    return;
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t token = first_token + chunk * kTokens;
    if (token >= task.num_tokens) break;
    named_sync(1 + warp_group, 128);
    put(chunk);
    named_sync(1 + warp_group, 128);
    OutputRows<2> rows;
    rows.load(task, first_tile, lane, 32);
#pragma unroll 1
    for (int own = warp; own < kTokens; own += 4) {
      float values[1][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        values[0][i] = exchange[own * kSumRow + OutputRows<2>::sum_row(paired, i, lane, 32)];
      }
      const float factor[1] = {token_factor(task, token + own)};
      rows.finish(task, token + own, 1, factor, values);
    }
  }
}

// What a warp multiplies next. Its fragments alternate between two places: of a stage's two steps, of a step's two
// passes, or of single steps.
template <class Format, class Shape>
class Fragments {
 public:
  using Block = TallBlock<Format, Shape>;
  static constexpr bool kHalves = Block::kSteps == 2 || Format::kPasses == 2;  // two runs make up a stage

  __device__ __forceinline__ Fragments(const uint8_t* ring, uint32_t barriers, int tile, int lane)
      : weights_(ring + tile * Block::kTileBytes), lane_(lane), place_(barriers) {}

  uint32_t a[2][4][4];

  // Asks for the stored weights that place kNext gets, once their stage is there; `first_step` is the stage's.
  template <int kNext>
  __device__ __forceinline__ void fetch(int first_step) {
    if constexpr (kNext == 0 || !kHalves) barrier_wait(place_.barrier, place_.parity);
    const uint8_t* const tile = weights_ + place_.offset;
    const uint8_t* super = tile + Block::kSteps * Format::kStepBytes;
    constexpr int kStep = Block::kSteps == 2 ? kNext : 0;
    if constexpr (kStep == 1 && Format::kSuperBytes > 0) {
      if (first_step % 4 == 3) super += Format::kSuperBytes;
    }
    raw_ = Format::template load<Space::kShared>(tile + kStep * Format::kStepBytes, super, lane_);
  }
  template <int kNext>
  __device__ __forceinline__ void unpack() {
    unpack_step<Format>(raw_, lane_, Format::kPasses == 2 ? kNext : 0, a[kNext]);
  }
  // The inputs that belong to the fragments in place kHere, the newest.
  template <int kHere>
  __device__ __forceinline__ uint32_t inputs() const {
    return place_.offset + static_cast<uint32_t>(Block::kSteps == 2 ? kHere * Shape::kInputBytes : 0);
  }
  __device__ __forceinline__ uint32_t barrier() const { return place_.barrier; }
  __device__ __forceinline__ void advance() { place_.advance(); }

 private:
  const uint8_t* const weights_;
  const int lane_;
  StageCursor<Block> place_;
  typename Format::Raw raw_;
};

template <class Format, class Shape>
__device__ __forceinline__ void consume(const TallTask& tall, const uint8_t* ring, uint32_t barriers, float* exchange,
                                        bool* last, const TallPlace& where) {
  using Block = TallBlock<Format, Shape>;
  using Sums = PieceSums<Shape>;
  constexpr bool kHalves = Fragments<Format, Shape>::kHalves;
  const MatmulTask& task = tall.product;
  const PackedPart& part = task.part;
  const int thread = static_cast<int>(threadIdx.x) - Block::kProducerWarps * 32;
  const int lane = thread & 31;
  const int warp = thread >> 5 & 3;
  const int warp_group = thread >> 7;
  const uint32_t inputs = shared_address(ring) + static_cast<uint32_t>(Block::kWeightBytes);
  // Lane r of a warp tells block r of the cluster that the warp is done with a stage.
  const bool tells = static_cast<uint32_t>(lane) < where.cluster_size;
  const uint32_t remote = remote_address(barriers, tells ? lane : 0) - barriers + 8;
  const auto give_back = [&](uint32_t barrier) {
    if constexpr (kTellingLanes == 1) {
      if (tells) barrier_arrive_remote(remote + barrier);
    } else {
      for (uint32_t block = 0; block < where.cluster_size; ++block) {
        barrier_arrive_remote(remote_address(barrier + 8, static_cast<int>(block)));
      }
    }
  };
  float* const own_exchange = exchange + warp_group * Shape::kExchangeTokens * kSumRow;

  Fragments<Format, Shape> fragments(ring, barriers, warp_group * 4 + warp, lane);
  for (Segments at = where.segments(tall); !at.done(); at.advance()) {
    float sum[Shape::kGroups][4] = {};
    int step = tall.begins[at.first_piece()];  // of the stage
    [[maybe_unused]] int left = (tall.begins[at.end_piece()] - step) * Format::kPasses;
    bool odd = false;   // which place is next
    uint32_t held = 0;  // the barrier of the stage that the last instructions read, if they were the last to do so
    fragments.template fetch<0>(step);
    fragments.template unpack<0>();
    for (int piece = at.first_piece(); piece < at.end_piece(); ++piece) {
      float acc[Shape::kGroups][4];
      // One run: the instructions of a step or of a pass. `more` says whether another follows, in this piece or the
      // next.
      const auto run_one = [&](auto place, int run, bool more) {
        constexpr int kPlace = decltype(place)::value;
        const uint32_t b = inputs + fragments.template inputs<kPlace>();
        const uint32_t own = fragments.barrier();
        if constexpr (kPlace == 1 || !kHalves) {
          fragments.advance();
          step += Block::kSteps;
        }
        if (Block::kFetchesEarly && more) fragments.template fetch<1 - kPlace>(step);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma(acc, fragments.a[kPlace][j], swizzled_operand(b, j * 32), j > 0 ? 1 : run);
        }
        wgmma_commit();
        // The instructions before these are over, so the place of their fragments is free; the next ones are unpacked
        // while these run.
        wgmma_wait<1>();
        if constexpr (kPlace == 0 || !kHalves) {
          if (held != 0) give_back(held);
        }
        if constexpr (kPlace == 1 || !kHalves) held = own;
        if (more) {
          if constexpr (!Block::kFetchesEarly) fragments.template fetch<1 - kPlace>(step);
          fragments.template unpack<1 - kPlace>();
        }
      };
      constexpr std::integral_constant<int, 0> kFirst;
      constexpr std::integral_constant<int, 1> kSecond;
      const auto more = [&] { return Block::kLastApart || --left > 0; };
      const int runs = (tall.begins[piece + 1] - tall.begins[piece]) * Format::kPasses;
      const bool last_apart = Block::kLastApart && piece + 1 == at.end_piece();
      const int in_loop = runs - (last_apart ? 1 : 0);
      int run = 0;
      if (odd && (!Block::kLastApart || in_loop > 0)) {
        run_one(kSecond, 0, more());
        odd = false;
        ++run;
      }
      for (; run + 1 < in_loop; run += 2) {
        run_one(kFirst, run, more());
        run_one(kSecond, 1, more());
      }
      if (run < in_loop) {
        run_one(kFirst, run, more());
        odd = true;
        ++run;
      }
      if (last_apart && odd) {
        run_one(kSecond, run, false);
        odd = false;
      } else if (last_apart) {
        run_one(kFirst, run, false);
        odd = true;
      }
      wgmma_finish(acc);
      if (at.first_piece() == 0) {
        Sums::add(sum, acc);
      } else {
        Sums::store(Sums::slot(tall, static_cast<int>(blockIdx.x), piece - at.first_piece()), thread, acc);
      }
    }
    // The last stage, which may be but half full.
    if (kHalves && odd) {
      held = fragments.barrier();
      fragments.advance();
    }
    if (held != 0) give_back(held);
    bool complete = true;
    if (!at.whole()) {
      if (at.first_piece() == 0) {
        Sums::store(Sums::slot(tall, static_cast<int>(blockIdx.x), tall.slots - 1), thread, sum);
      }
      complete = Sums::complete(tall, at, thread, last, sum);
    }
    const int first_tile = where.first_tile<Shape>(at) + warp_group * 4;
    if (complete && first_tile < part.num_tiles) {
      write_outputs<Shape>(task, first_tile, static_cast<int64_t>(at.tokens()) * Shape::kTokens, sum, own_exchange,
                           warp_group, warp, lane);
    }
  }
}

template <class Format, class Shape>
__global__ void __launch_bounds__(TallBlock<Format, Shape>::kThreads, 1)
    tall_kernel(const __grid_constant__ TallTask tall) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  using Block = TallBlock<Format, Shape>;
  const int thread = static_cast<int>(threadIdx.x);
  uint8_t* const ring = unaligned + ((1024 - (shared_address(unaligned) & 1023)) & 1023);
  constexpr uint32_t kRingBytes = static_cast<uint32_t>(Block::kStages * Block::kStageBytes);
  uint8_t* const exchange = ring + kRingBytes;
  const uint32_t barriers = shared_address(exchange + Shape::kExchangeBytes);
  // Of parameters and the block's index, so that the compiler knows them to be the same for all threads.
  TallPlace where{};
  where.cluster_size = static_cast<uint32_t>(tall.cluster_size);
  where.rank = blockIdx.x % where.cluster_size;
  where.cluster = static_cast<int>(blockIdx.x / where.cluster_size);
  __shared__ bool last;
  if (thread == 0) {
    for (uint32_t slot = 0; slot < Block::kStages; ++slot) {
      barrier_init(barriers + slot * 16, 1);
      barrier_init(barriers + slot * 16 + 8, static_cast<int>(8 * kTellingLanes * where.cluster_size));
    }
    barrier_init_done();
  }
  cluster_sync();
  release_successor(tall.product.beside);
  if (thread < Block::kProducerWarps * 32) {
    set_registers_down<Block::kProducerRegisters>();
    produce<Format, Shape>(tall, shared_address(ring), barriers, where);
  } else {
    set_registers_up<Block::kConsumerRegisters>();
    await_predecessor(tall.product.beside);
    consume<Format, Shape>(tall, ring, barriers, reinterpret_cast<float*>(exchange), &last, where);
  }
  end_after_predecessor(tall.product.beside);
  __syncwarp();
  cluster_sync();  // no block ends while another may still reach into its memory
#endif
}

template <class Format, class Shape>
void launch_tall(const MatmulTask& task, Deal deal) {
  using Block = TallBlock<Format, Shape>;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int cluster_size = deal == Deal::kPairs ? 2 : 1;
  TallTask tall{};
  tall.product = task;
  tall.cluster_size = cluster_size;
  for (int i = 0; i <= task.part.num_splits; ++i) tall.begins[i] = i * task.part.num_steps / task.part.num_splits;
  const int tiles_of_rows = Shape::kTiles * cluster_size;
  tall.token_tiles = (task.num_tokens + Shape::kTokens - 1) / Shape::kTokens;
  tall.row_tiles = (task.part.num_tiles + tiles_of_rows - 1) / tiles_of_rows;
  int clusters = std::min(tall.token_tiles * tall.row_tiles, processors / cluster_size);
  if (deal == Deal::kPieces) {
    const auto pieces = PieceDeal<Shape>::of(task, tall.token_tiles, tall.row_tiles, processors);
    if (pieces.fits) {
      tall.group_blocks = pieces.group_blocks;
      tall.slots = pieces.slots;
      clusters = tall.group_blocks * tall.token_tiles;
    }
  }
  tall.step_rows = clusters / tall.token_tiles;
  tall.step_tokens = clusters % tall.token_tiles;
  const auto kernel = tall_kernel<Format, Shape>;
  allow_shared(kernel, Block::kBytes);
  launch_clusters(kernel, cluster_size, dim3(static_cast<unsigned>(clusters * cluster_size)), dim3(Block::kThreads),
                  Block::kBytes, task.stream, tall);
}

}  // namespace tw::cuda
