// Attention for many single rows: a block of four warps owns a row, up to 16 query heads of one kv head and up to kSpan
// splits, and walks over these in order. The joined results stay in registers. A block holds one split's keys and
// values and copies the next ones as soon as nobody reads them any more; it is small enough that several share a
// processor, so copies run under others' arithmetic.
#pragma once

#include "cuda/attention_rows.cuh"

namespace tw::cuda {

// Splits that a block walks over; a row of more takes several blocks. A multiple of 4.
constexpr int kSpan = 8;
// Blocks that shall fit on a processor with 228 KiB of shared memory; the compiler keeps their registers few enough.
template <int kDim>
constexpr int kWalkBlocks = kDim > 64 ? 3 : 5;
// Rows walk once their blocks are at least this many times the processors.
constexpr int kWalkFrom = 3;
// Heads whose queries a thread requests together.
constexpr int kQueryBatch = 4;

// FP16 values in shared memory: the weights, and before them the queries; then keys and values of a split.
template <int kDim>
constexpr size_t kWalkBytes = (kTileQueries * kWeightRow + 2 * kSplitKeys * kHeadRow<kDim>)*sizeof(__half);

// A thread's share of a split's keys or values: 16 bytes of every kPassKeys-th key. Few instructions a copy: a block's
// first copies are on the way the sooner.
template <int kDim>
struct CopyShare {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kPassKeys = kDim > 64 ? 8 : kSplitThreads / kChunks;
  static constexpr int kThreads = kPassKeys * kChunks;  // with heads of 96, a warp has none
  int key, dim;                                         // of the first
  bool works;

  __device__ __forceinline__ explicit CopyShare(unsigned thread)
      : key(static_cast<int>(thread / kChunks)),
        dim(static_cast<int>(thread % kChunks) * 8),
        works(kThreads == kSplitThreads || thread < kThreads) {}

  // Starts the copies to `to` from `from`, the places of the first 16 bytes there and in block 0. Lane first_lane + b
  // holds the id of the split's block b of 16 tokens. Of a block that the row reaches, places from num_keys on become
  // zeros; the place `own` is left out.
  __device__ __forceinline__ void start(__half* to, const __half* from, uint32_t block_bytes, int32_t ids,
                                        int first_lane, int num_keys, int own) const {
    const auto* const first = reinterpret_cast<const char*>(from);
    const int end = num_keys - key;
    const int left_out = own - key;
    const char* block = first;
#pragma unroll
    for (int pass = 0; pass < kSplitKeys / kPassKeys; ++pass) {
      const int at = pass * kPassKeys;
      if (at / 16 * 16 >= num_keys) break;
      if (at % 16 == 0) {
        const int id = __shfl_sync(~0u, ids, first_lane + at / 16 + (kPassKeys > 16 ? key / 16 : 0));
        block = first + static_cast<uint64_t>(static_cast<uint32_t>(id)) * block_bytes;
      }
      if (works && at != left_out) {
        copy_async16(to + at * kHeadRow<kDim>, block + at % 16 * kDim * sizeof(__half), at < end);
      }
    }
  }
};

// The values that a thread makes of a row's heads: one dimension of every kPassHeads-th.
template <int kDim>
struct HeadThread {
  static constexpr int kPassHeads = kSplitThreads / kDim;
  int head, d;
  Rotation rotation;
  float cos, sin;

  __device__ __forceinline__ HeadThread(const AttentionTask& task, int position)
      : head(static_cast<int>(threadIdx.x / kDim)),
        d(static_cast<int>(threadIdx.x % kDim)),
        rotation(rotation_of(task, d)),
        cos(1),
        sin(0) {
    if (rotation.angle < 0) return;
    const int64_t angle = static_cast<int64_t>(position) * (task.rope_dims / 2) + rotation.angle;
    cos = __ldg(task.rope_cos + angle);
    sin = __ldg(task.rope_sin + angle);
  }
  __device__ __forceinline__ bool works() const { return head < kPassHeads; }
  __device__ __forceinline__ float rotated(float x, float y) const { return rotate(rotation, d, x, y, cos, sin); }
};

// Leaves the block's queries as rows; the tile's other rows are zeros already.
template <int kDim>
__device__ __forceinline__ void stage_queries(__half* rows, const HeadThread<kDim>& own, const float* heads,
                                              int num_heads) {
  if (!own.works()) return;
  constexpr int kPassHeads = HeadThread<kDim>::kPassHeads;
#pragma unroll 1
  for (int first = own.head; first < num_heads; first += kQueryBatch * kPassHeads) {
    float x[kQueryBatch] = {}, y[kQueryBatch] = {};
#pragma unroll
    for (int b = 0; b < kQueryBatch; ++b) {
      const int head = first + b * kPassHeads;
      if (head >= num_heads) continue;
      x[b] = heads[head * kDim + own.rotation.first];
      y[b] = heads[head * kDim + own.rotation.second];
    }
#pragma unroll
    for (int b = 0; b < kQueryBatch; ++b) {
      const int head = first + b * kPassHeads;
      if (head < num_heads) rows[head * kHeadRow<kDim> + own.d] = scaled_query(own.rotated(x[b], y[b]), kDim);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kSplitThreads, kWalkBlocks<kDim>)
    walk_kernel(const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(16) __half shared[];
  __shared__ float warp_largest[kWarps][kTileQueries];
  constexpr int kRow = kHeadRow<kDim>;
  constexpr int kSplitBlocks = kSplitKeys / 16;
  constexpr int kLaneSplits = 32 / kSplitBlocks;               // whose block ids the lanes of a warp hold
  constexpr int kPieces = kDim / 16;                           // of the values' dimensions
  constexpr int kOwnPieces = (kPieces + kWarps - 1) / kWarps;  // of a warp
  static_assert(kSpan % kLaneSplits == 0, "block ids are loaded for so many splits");
  static_assert(kRow <= kWeightRow, "queries fit where the weights will be");
  __half* const weights = shared;
  __half* const keys = shared + kTileQueries * kWeightRow;
  __half* const values = keys + kSplitKeys * kRow;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  release_successor();
  const DecodeBlock block = this_block(task);
  const int first_split = static_cast<int>(blockIdx.y) * kSpan;
  if (first_split >= block.num_splits) {
    await_predecessor();
    if (block.position < 0 && first_split == 0) store_zeros<kDim>(task, block);
    return;
  }
  const int end_split = min(first_split + kSpan, block.num_splits);
  const bool appends = task.append && end_split == block.num_splits;

  // Whatever the copies wait for is requested at once.
  const int end_block = min(end_split * kSplitBlocks, (block.num_keys + 15) / 16);
  const auto block_id = [&](int i) { return i < end_block ? block.table[i] : 0; };
  int32_t ids = block_id(first_split * kSplitBlocks + lane);
  int32_t next_ids = block_id((first_split + kLaneSplits) * kSplitBlocks + lane);
  const HeadThread<kDim> own(task, block.position);
  constexpr int kQueryChunks = kTileQueries * kRow / 8;
#pragma unroll
  for (int first = 0; first < kQueryChunks; first += kSplitThreads) {
    const int i = first + thread;
    if (i >= block.num_heads * (kRow / 8) && i < kQueryChunks) reinterpret_cast<uint4*>(shared)[i] = {};
  }
  const CopyShare<kDim> share(threadIdx.x);
  const int first_place = share.key * kRow + share.dim;
  const __half* const cached_keys = task.cache + head_offset(task, block.kv_head) + share.key % 16 * kDim + share.dim;
  const __half* const cached_values = cached_keys + values_offset(task);
  const auto block_bytes = static_cast<uint32_t>(task.block_stride * static_cast<int64_t>(sizeof(__half)));
  const auto stage = [&](__half* to, const __half* from, int split) {
    const int begin = split * kSplitKeys;
    share.start(to + first_place, from, block_bytes, ids, (split - first_split) % kLaneSplits * kSplitBlocks,
                block.num_keys - begin, appends ? block.position - begin : -kSplitKeys);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (!task.append) await_predecessor();
  stage(keys, cached_keys, first_split);
  stage(values, cached_values, first_split);
  const uint32_t own_block = appends ? static_cast<uint32_t>(block.table[block.position / 16]) : 0;
  if (task.append) await_predecessor();

  // The row's own key and value go to the cache, and to shared memory when their split does. They are requested before
  // the queries and used after them.
  const float* const heads = task.qkv + block.row * task.qkv_stride;
  const bool holds_own = appends && thread < kDim;
  float own_x = 0, own_y = 0, own_v = 0;
  if (holds_own) {
    const float* const key = heads + static_cast<int64_t>(task.num_heads + block.kv_head) * kDim;
    own_x = key[own.rotation.first];
    own_y = key[own.rotation.second];
    own_v = key[static_cast<int64_t>(task.num_kv_heads) * kDim + own.d];
  }
  stage_queries<kDim>(shared, own, heads + static_cast<int64_t>(block.first_head) * kDim, block.num_heads);
  const __half own_key = __float2half_rn(own.rotated(own_x, own_y));
  const __half own_value = __float2half_rn(own_v);
  const auto place_own = [&](__half* to, __half value, int split) {
    if (holds_own && split + 1 == end_split) to[(block.position - split * kSplitKeys) * kRow + own.d] = value;
  };
  place_own(keys, own_key, first_split);
  place_own(values, own_value, first_split);
  if (holds_own) {
    const int64_t place = static_cast<int64_t>(own_block) * task.block_stride + head_offset(task, block.kv_head) +
                          block.position % 16 * kDim + own.d;
    task.cache[place] = own_key;
    task.cache[place + values_offset(task)] = own_value;
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();

  const Queries<kDim, true> queries(shared, lane);
  const Partials<kDim> partials = device_partials<kDim>(task, block);
  const bool joins = block.num_splits <= kSpan;  // here; else in device memory
  const int r = lane >> 2;
  float result[kOwnPieces][2][4] = {};
  float largest[2] = {}, sum[2] = {};
  for (int split = first_split;; ++split) {
    const int begin = split * kSplitKeys;
    const bool ends = split + 1 == end_split;
    Scores score = {};
    // What exists as a whole is computed without a question between, so that its loads run ahead.
    const __half* const warp_keys = keys + warp * kWarpKeys * kRow;
    static_assert(kWarpKeys == 32, "two times 16");
    if (begin + warp * kWarpKeys + 16 < block.num_keys) {
      queries.score(score[0], score[1], warp_keys, lane);
      queries.score(score[2], score[3], warp_keys + 16 * kRow, lane);
    } else if (begin + warp * kWarpKeys < block.num_keys) {
      queries.score(score[0], score[1], warp_keys, lane);
    }
    const int first_key = begin + warp * kWarpKeys + (lane & 3) * 2;
    float top[2];
    largest_scores(top, score, first_key, block.num_keys);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((lane & 3) == 0) warp_largest[warp][r + 8 * i] = top[i];
    }
    __syncthreads();  // nobody reads these keys or, the first time, the queries any more
    if (!ends) {
      if ((split + 1 - first_split) % kLaneSplits == 0) {
        ids = next_ids;
        next_ids = block_id((split + 1 + kLaneSplits) * kSplitBlocks + lane);
      }
      stage(keys, cached_keys, split + 1);
      place_own(keys, own_key, split + 1);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top[i] = fmaxf(top[i], warp_largest[w][r + 8 * i]);
    }
    store_weights(weights + r * kWeightRow + warp * kWarpKeys + (lane & 3) * 2, score, top, first_key, block.num_keys);
    if (ends) {
      asm volatile("cp.async.wait_all;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    }
    __syncthreads();

    float part[kOwnPieces][2][4] = {};
    float sums[4] = {};
    const auto add_values = [&](int t) {
      uint32_t w[4];
      load_fragment<true>(w, weights + t * 16, kWeightRow, lane);
      mma(sums, w, kOnes, kOnes);
#pragma unroll
      for (int p = 0; p < kOwnPieces; ++p) {
        const int piece = warp + p * kWarps;
        if (kPieces % kWarps != 0 && piece >= kPieces) break;
        uint32_t v[4];
        load_transposed(v, values + t * 16 * kRow + piece * 16, kRow, lane);
        mma(part[p][0], w, v[0], v[1]);
        mma(part[p][1], w, v[2], v[3]);
      }
    };
    if (warp < kPieces && begin + kSplitKeys <= block.num_keys) {
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) add_values(t);
    } else if (warp < kPieces) {
#pragma unroll 1
      for (int t = 0; begin + t * 16 < block.num_keys; ++t) add_values(t);
    }
    if (!ends) {
      __syncthreads();  // nobody reads these values and weights any more
      stage(values, cached_values, split + 1);
      place_own(values, own_value, split + 1);
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = r + 8 * i;
      if (joins) {
        const bool first = split == 0;
        const Joint joint = first ? Joint{} : join(&largest[i], top[i]);
        if (first) largest[i] = top[i];
        sum[i] = first ? sums[2 * i] : joined(joint, sum[i], sums[2 * i]);
#pragma unroll
        for (int e = 0; e < kOwnPieces * 4; ++e) {
          float& value = result[e / 4][e / 2 % 2][2 * i + e % 2];
          const float more = part[e / 4][e / 2 % 2][2 * i + e % 2];
          value = first ? more : joined(joint, value, more);
        }
        continue;
      }
      if (head >= block.num_heads) continue;
      float* const to = partials.of(head, split);
#pragma unroll
      for (int e = 0; e < kOwnPieces * 2; ++e) {
        const int piece = warp + e / 2 * kWarps;
        if (piece >= kPieces) break;
        *reinterpret_cast<float2*>(to + piece * 16 + e % 2 * 8 + (lane & 3) * 2) = {part[e / 2][e % 2][2 * i],
                                                                                    part[e / 2][e % 2][2 * i + 1]};
      }
      if (thread < 32 && (lane & 3) == 0) *reinterpret_cast<float2*>(to + kDim) = {top[i], sums[2 * i]};
    }
    if (ends) break;
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
  }

  if (!joins) {
    if (ends_last(task, block, (block.num_splits + kSpan - 1) / kSpan)) join_splits<kDim>(task, block, partials);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = r + 8 * i;
    if (head >= block.num_heads) continue;
#pragma unroll
    for (int e = 0; e < kOwnPieces * 2; ++e) {
      const int piece = warp + e / 2 * kWarps;
      if (piece >= kPieces) break;
      const float* const value = &result[e / 2][e % 2][2 * i];
      store_pair(task, block, head * kDim + piece * 16 + e % 2 * 8 + (lane & 3) * 2, __fdiv_rn(value[0], sum[i]),
                 __fdiv_rn(value[1], sum[i]));
    }
  }
}

template <int kDim>
void launch_walk(const AttentionTask& task) {
  const int tiles = head_group(task.num_heads, task.num_kv_heads).tiles;
  allow_shared(walk_kernel<kDim>, kWalkBytes<kDim>);
  launch(walk_kernel<kDim>,
         dim3(static_cast<unsigned>(task.num_kv_heads * tiles),
              static_cast<unsigned>((task.max_splits + kSpan - 1) / kSpan), static_cast<unsigned>(task.num_rows)),
         dim3(kSplitThreads), kWalkBytes<kDim>, task.stream, task);
}

}  // namespace tw::cuda
