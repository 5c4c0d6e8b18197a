// Paged attention for consecutive rows of a sequence on Hopper (sm_90a), of heads of 64 and 128: the tiles and sums of
// attention.cuh, by wgmma. A block owns 128 queries of one kv head, the heads that share it times as many rows as fit,
// and walks over the splits of their keys. Four producing warps copy keys and values of the next splits into a ring of
// slots. Two consuming warp groups have 64 queries each, as fragments in registers; the scores' registers become the
// weights' fragments. The groups take turns with the tensor cores: one computes weights and joins a split while the
// other one's instructions run. Reads 4 · head_dim bytes for each key, kv head and 128 queries.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/hopper.cuh"

namespace tw::cuda {

constexpr int kTallQueries = 128;

template <int kDim>
struct TallPrefill {
  static constexpr int kProducerWarps = 4;
  static constexpr int kProducers = kProducerWarps * 32;
  static constexpr int kConsumers = 256;
  static constexpr int kThreads = kProducers + kConsumers;
  // Registers of a thread: queries, joined values, a split's values and weights. Together no more than what a block is
  // launched with.
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
  // Instructions of a group's turn that may still run when the other one's begins, at least one.
  static constexpr int kHandOver = 3;

  // Keys or values of a split: 64 dimensions beside each other, [head_dim / 64][128 keys][8 chunks of 16 bytes], the
  // chunks at their places for swizzled_operand(). Slots hold keys, values, keys, values.
  static constexpr int kColumnBytes = kSplitKeys * 128;
  static constexpr int kKeyBytes = kDim / 64 * kColumnBytes;
  static constexpr int kSlots = 4;
  static constexpr int kRingBytes = kSlots * kKeyBytes;
  static constexpr int kBytes = 1024 + kRingBytes + 16 * kSlots;

  __device__ __forceinline__ static uint32_t slot_offset(uint32_t slot) { return slot * kKeyBytes; }
};

// What a block works on.
struct PrefillTile {
  int kv_head, first_head, num_heads;
  int first_row, num_rows;
  int first_position;
  const int32_t* table;

  __device__ __forceinline__ explicit PrefillTile(const AttentionTask& task) {
    const HeadGroup group = head_group(task.num_heads, task.num_kv_heads);
    const int group_size = task.num_heads / task.num_kv_heads;
    kv_head = static_cast<int>(blockIdx.x) / group.tiles;
    first_head = kv_head * group_size + static_cast<int>(blockIdx.x) % group.tiles * group.per_tile;
    num_heads = min(group.per_tile, (kv_head + 1) * group_size - first_head);
    // The last rows see the most keys, so their blocks begin first.
    const int2 rows = task.row_tiles[gridDim.y - 1 - blockIdx.y];
    first_row = rows.x;
    num_rows = rows.y;
    first_position = task.step.positions[rows.x];
    table = task.step.tables + task.step.table_offsets[rows.x];
  }
  __device__ __forceinline__ int num_keys() const { return first_position + num_rows; }
  __device__ __forceinline__ int num_splits() const { return (num_keys() + kSplitKeys - 1) / kSplitKeys; }
  // Queries beside each other are heads of one row, then rows. Those past the last row see what it sees.
  __device__ __forceinline__ int keys_seen(int query) const {
    return first_position + min(query / num_heads, num_rows - 1) + 1;
  }
};

// The producers' warps: each copies two of the eight blocks of 16 tokens of a split's keys, then of its values. A slot
// is announced when its bytes are there, which a warp awaits after it has asked for the next slot's if that is free.
template <int kDim>
__device__ __forceinline__ void produce_heads(const AttentionTask& task, const PrefillTile& tile, uint32_t ring,
                                              uint32_t barriers) {
  using Shape = TallPrefill<kDim>;
  constexpr int kChunks = kDim / 8;
  constexpr int kRowsAtOnce = 32 / kChunks;
  constexpr int kBlocks = kSplitKeys / 16 / Shape::kProducerWarps;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int row = lane / kChunks;
  const int chunk = lane % kChunks;
  const int first_key = warp * kBlocks * 16;  // of a split
  const uint32_t to = ring + static_cast<uint32_t>(chunk / 8 * Shape::kColumnBytes + (first_key + row) * 128 +
                                                   ((chunk ^ row) & 7) * 16);
  const __half* const head = task.cache + head_offset(task, tile.kv_head) + row * kDim + chunk * 8;
  const int num_keys = tile.num_keys();
  const int num_slots = 2 * tile.num_splits();
  RingPlace<Shape::kSlots> place;
  uint32_t announced = 0;  // the barrier of the slot on its way
  const auto announce = [&] {
    shared_stores_done();
    __syncwarp();
    if (lane == 0) barrier_arrive(announced);
  };
  for (int i = 0; i < num_slots; ++i) {
    const uint32_t full = barriers + place.slot * 16;
    // A fresh barrier counts as past the phase before its first.
    if (!__all_sync(~0u, barrier_over(full + 8, place.parity ^ 1))) {
      if (announced != 0) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        announce();
        announced = 0;
      }
      barrier_wait(full + 8, place.parity ^ 1);
    }
    const int begin = i / 2 * kSplitKeys + first_key;
    const __half* const from_block_0 = head + (i % 2 == 0 ? 0 : values_offset(task));
    const uint32_t slot = to + Shape::slot_offset(place.slot);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int left = num_keys - begin - b * 16 - row;
      const int32_t block = begin + b * 16 < num_keys ? tile.table[begin / 16 + b] : 0;
      const __half* const from = from_block_0 + block * task.block_stride;
#pragma unroll
      for (int r = 0; r < 16; r += kRowsAtOnce) {
        const bool exists = r < left;
        copy_async16_to((slot ^ static_cast<uint32_t>((r & 7) * 16)) + static_cast<uint32_t>((b * 16 + r) * 128),
                        exists ? from + r * kDim : head, exists);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (announced != 0) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      announce();
    }
    announced = full;
    place.advance();
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  announce();
}

// A warp group's turns with the tensor cores.
class Turns {
 public:
  // The first turn is group 0's; each has `turns` of them.
  __device__ __forceinline__ Turns(int group, int turns) : group_(group), left_(turns) {
    if (group == 1) named_arrive(kFirst, 256);
  }
  __device__ __forceinline__ void take() { named_sync(kFirst + group_, 256); }
  // Group 0 does not wait for a turn after its last.
  __device__ __forceinline__ void pass() {
    --left_;
    if (group_ == 0 || left_ > 0) named_arrive(kFirst + 1 - group_, 256);
  }

 private:
  static constexpr int kFirst = 1;  // named barrier
  const int group_;
  int left_;
};

// Fragments of a warp's 16 queries.
template <int kDim>
__device__ __forceinline__ void load_queries(uint32_t (&out)[kDim / 16][4], const AttentionTask& task,
                                             const PrefillTile& tile, const int (&queries)[2], int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = queries[i] / tile.num_heads;
    const bool exists = row < tile.num_rows;
    const __half* from = task.queries + static_cast<int64_t>(tile.first_row + (exists ? row : 0)) * task.query_stride +
                         static_cast<int64_t>(tile.first_head + queries[i] % tile.num_heads) * kDim + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(from + d * 8);
      out[d / 2][d % 2 * 2 + i] = exists ? pair : 0;
    }
  }
}

// value / sum, rounded to nearest, for a sum of at least 1 whose rounded inverse is `inverse`: two corrections of a
// quotient that is off by less than two units in the last place. Signed zeros and infinities stay what they are.
__device__ __forceinline__ float quotient(float value, float sum, float inverse) {
  const float rough = __fmul_rn(value, inverse);
  const float close = __fmaf_rn(__fmaf_rn(-rough, sum, value), inverse, rough);
  const float exact = __fmaf_rn(__fmaf_rn(-close, sum, value), inverse, close);
  return fabsf(rough) == INFINITY ? rough : copysignf(exact, rough);
}

// The two queries of a thread: what is joined so far of their values, two neighbours of each group of 8.
template <int kDim>
struct JoinedSplits {
  float out[kDim / 8][4];
  float largest[2] = {-FLT_MAX, -FLT_MAX};
  float sums[2] = {};

  // The first split's values stay as they are: times 1, minus 0.
  __device__ __forceinline__ JoinedSplits() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] = -0.0f;
    }
  }
  __device__ __forceinline__ void add(int i, const float (&part)[kDim / 8][4], float sum, float top) {
    const Joint joint = join(&largest[i], top);
    sums[i] = joined(joint, sums[i], sum);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      out[n][2 * i] = joined(joint, out[n][2 * i], part[n][2 * i]);
      out[n][2 * i + 1] = joined(joint, out[n][2 * i + 1], part[n][2 * i + 1]);
    }
  }
  // Writes query i, whose values in `row` begin at `column`, a multiple of 64.
  __device__ __forceinline__ void write(const AttentionTask& task, int i, int64_t row, int column, int lane) const {
    const float inverse = __frcp_rn(sums[i]);
#pragma unroll
    for (int block = 0; block < kDim / 64; ++block) {
      uint32_t pairs[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float* const values = out[block * 8 + n];
        pairs[n] = pack_half2(quotient(values[2 * i], sums[i], inverse), quotient(values[2 * i + 1], sums[i], inverse));
      }
      const int first = column + block * 64 + (lane & 3) * 2;
      __half* const to = task.out + pair_offset(task.tiled_out, row, first, task.out_stride);
      if (task.tiled_out) {
        // A chunk holds every eighth pair, so all that a thread has belongs to two (activations.h).
        *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[2], pairs[4], pairs[6]);
        __half* const next = task.out + pair_offset(true, row, first + 8, task.out_stride);
        *reinterpret_cast<uint4*>(next) = make_uint4(pairs[1], pairs[3], pairs[5], pairs[7]);
      } else {
#pragma unroll
        for (int n = 0; n < 8; ++n) *reinterpret_cast<uint32_t*>(to + n * 8) = pairs[n];
      }
    }
  }
};

template <int kDim>
__device__ __forceinline__ void attend_tile(const AttentionTask& task, const PrefillTile& tile, uint32_t ring,
                                            uint32_t barriers) {
  using Shape = TallPrefill<kDim>;
  const int thread = static_cast<int>(threadIdx.x) - Shape::kProducers;
  const int lane = thread & 31;
  const int group = thread >> 7;
  const int warp_query = thread >> 5 << 4;
  const int queries[2] = {warp_query + (lane >> 2), warp_query + (lane >> 2) + 8};
  uint32_t query[kDim / 16][4];
  load_queries<kDim>(query, task, tile, queries, lane);
  const int seen[2] = {tile.keys_seen(queries[0]), tile.keys_seen(queries[1])};
  const int warp_sees_least = tile.keys_seen(warp_query);
  // A group without queries sees nothing.
  const int group_seen = group * 64 / tile.num_heads < tile.num_rows ? tile.keys_seen(group * 64 + 63) : 0;
  Turns turns(group, 2 * tile.num_splits());
  RingPlace<Shape::kSlots> place;
  const auto leave_slot = [&] {
    if (lane == 0) barrier_arrive(barriers + place.slot * 16 + 8);
    place.advance();
  };
  JoinedSplits<kDim> joint;
  int begin = 0;
  for (; begin < group_seen; begin += kSplitKeys) {
    const uint32_t keys = ring + Shape::slot_offset(place.slot);
    float score[kKeySteps * 2][4];
    barrier_wait(barriers + place.slot * 16, place.parity);
    turns.take();
    wgmma_begin();
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      if (d == kDim / 16 - Shape::kHandOver) wgmma_commit();
      wgmma(score, query[d], swizzled_operand(keys, d / 4 * Shape::kColumnBytes + d % 4 * 32), d > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    turns.pass();
    wgmma_finish(score);
    leave_slot();

    const auto sees = [&](int n, int e) { return begin + n * 8 + (lane & 3) * 2 + (e & 1) < seen[e / 2]; };
    // Most splits are seen as a whole by all queries of the warp.
    const bool whole = begin + kSplitKeys <= warp_sees_least;
    if (!whole) {
#pragma unroll
      for (int n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!sees(n, e)) score[n][e] = -INFINITY;
        }
      }
    }
    float tops[4] = {-FLT_MAX, -FLT_MAX, -FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) tops[e] = fmaxf(tops[e], score[n][e]);
    }
    float top[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(tops[2 * i], tops[2 * i + 1]);
      top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2));
    }
    uint32_t weights[kKeySteps][4];
#pragma unroll
    for (int n = 0; n < kKeySteps * 2; ++n) {
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = exp2_of(__fsub_rn(score[n][e], top[e / 2]));
      weights[n / 2][n % 2 * 2] = pack_half2(w[0], w[1]);
      weights[n / 2][n % 2 * 2 + 1] = pack_half2(w[2], w[3]);
    }
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) keep_here(weights[t]);
    float sum[4] = {};
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) mma(sum, weights[t], kOnes, kOnes);

    const uint32_t values = ring + Shape::slot_offset(place.slot);
    float part[kDim / 8][4];
    barrier_wait(barriers + place.slot * 16, place.parity);
    turns.take();
    wgmma_begin();
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) {
      if (t == kKeySteps - Shape::kHandOver) wgmma_commit();
      wgmma_transposed(part, weights[t], swizzled_columns(values, Shape::kColumnBytes, t * 16 * 128), t > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    turns.pass();
    wgmma_finish(part);
    leave_slot();
    if (whole) {
      joint.add(0, part, sum[0], top[0]);
      joint.add(1, part, sum[2], top[1]);
    } else {
      if (begin < seen[0]) joint.add(0, part, sum[0], top[0]);
      if (begin < seen[1]) joint.add(1, part, sum[2], top[1]);
    }
  }
  for (; begin < tile.num_keys(); begin += kSplitKeys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      barrier_wait(barriers + place.slot * 16, place.parity);
      turns.take();
      turns.pass();
      leave_slot();
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = queries[i] / tile.num_heads;
    if (row >= tile.num_rows) continue;
    joint.write(task, i, tile.first_row + row, (tile.first_head + queries[i] % tile.num_heads) * kDim, lane);
  }
}

template <int kDim>
__global__ void __launch_bounds__(TallPrefill<kDim>::kThreads, 1)
    tall_prefill_kernel(const __grid_constant__ AttentionTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  using Shape = TallPrefill<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  uint8_t* const ring = unaligned + ((1024 - (shared_address(unaligned) & 1023)) & 1023);
  const uint32_t barriers = shared_address(ring + Shape::kRingBytes);
  if (thread == 0) {
    for (uint32_t slot = 0; slot < Shape::kSlots; ++slot) {
      barrier_init(barriers + slot * 16, Shape::kProducerWarps);
      barrier_init(barriers + slot * 16 + 8, Shape::kConsumers / 32);
    }
    barrier_init_done();
  }
  const PrefillTile tile(task);
  __syncthreads();
  release_successor();
  await_predecessor();
  if (thread < Shape::kProducers) {
    set_registers_down<Shape::kProducerRegisters>();
    produce_heads<kDim>(task, tile, shared_address(ring), barriers);
  } else {
    set_registers_up<Shape::kConsumerRegisters>();
    attend_tile<kDim>(task, tile, shared_address(ring), barriers);
  }
#endif
}

template <int kDim>
void launch_tall_prefill(const AttentionTask& task) {
  using Shape = TallPrefill<kDim>;
  const HeadGroup group = head_group(task.num_heads, task.num_kv_heads);
  allow_shared(tall_prefill_kernel<kDim>, Shape::kBytes);
  launch(tall_prefill_kernel<kDim>,
         dim3(static_cast<unsigned>(task.num_kv_heads * group.tiles), static_cast<unsigned>(task.num_row_tiles)),
         dim3(Shape::kThreads), Shape::kBytes, task.stream, task);
}

}  // namespace tw::cuda
