// Paged attention for single rows of sequences (attention.cuh): a block owns a row, up to 16 query heads of one kv head
// and up to kSplits splits of 128 keys, four warps a split. A warp scores 32 of the keys and then sums its share of the
// values' dimensions over all of them. Splits of one block meet in shared memory; if there are more, the block that
// ends last joins them. Reads 4 · head_dim bytes a key, kv head and row; where attention itself appends the row's key
// and value, the others are on their way before the predecessor ends: earlier steps wrote them, and positions and block
// tables are in place before a step's first kernel begins.
#include "cuda/attention.cuh"

namespace tw::cuda {
namespace {

constexpr int kWarps = 4;  // of a split
constexpr int kSplitThreads = kWarps * 32;
constexpr int kWarpKeys = kSplitKeys / kWarps;

// FP16 values in shared memory: the queries, then keys, values and weights of each split.
template <int kDim>
constexpr int kQueryValues = kTileQueries * kHeadRow<kDim>;
template <int kDim>
constexpr int kSplitValues = 2 * kSplitKeys * kHeadRow<kDim> + kTileQueries * kWeightRow;
template <int kDim>
constexpr size_t shared_bytes(int splits) {
  return (size_t{kQueryValues<kDim>} + static_cast<size_t>(splits) * kSplitValues<kDim>)*sizeof(__half);
}

// Where splits leave their results: [head_dim values, largest score, sum of weights] for each head.
template <int kDim>
struct Partials {
  float* base;
  int64_t head_stride, split_stride;
  bool local;  // in this block's shared memory
  __device__ __forceinline__ float* of(int head, int split) const {
    return base + head * head_stride + split * split_stride;
  }
};

// What another block may have written comes from L2.
__device__ __forceinline__ float2 load_result(const float* from, bool local) {
  const auto* pair = reinterpret_cast<const float2*>(from);
  return local ? *pair : __ldcg(pair);
}

// Joins the splits of the block's heads and writes them out.
template <int kDim>
__device__ __forceinline__ void join_splits(const AttentionTask& task, const Partials<kDim>& partials, int64_t row,
                                            int first_head, int num_heads, int num_splits) {
  const int num_threads = static_cast<int>(blockDim.x);
  for (int i = 2 * static_cast<int>(threadIdx.x); i < num_heads * kDim; i += 2 * num_threads) {
    const int d = i % kDim;
    float2 value{};
    float largest = 0, sum = 0;
#pragma unroll 4
    for (int s = 0; s < num_splits; ++s) {
      const float* split = partials.of(i / kDim, s);
      const float2 more = load_result(split + d, partials.local);
      const float2 stats = load_result(split + kDim, partials.local);
      if (s == 0) {
        value = more;
        largest = stats.x;
        sum = stats.y;
        continue;
      }
      const Joint joint = join(&largest, stats.x);
      sum = joined(joint, sum, stats.y);
      value = {joined(joint, value.x, more.x), joined(joint, value.y, more.y)};
    }
    *reinterpret_cast<uint32_t*>(
        task.out + pair_offset(task.tiled_out, row, static_cast<int64_t>(first_head) * kDim + i, task.out_stride)) =
        pack_half2(__fdiv_rn(value.x, sum), __fdiv_rn(value.y, sum));
  }
}

template <int kDim, int kSplits>
__global__ void __launch_bounds__(kSplits* kSplitThreads) decode_kernel(const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(16) __half shared[];
  __shared__ float warp_largest[kSplits * kWarps][kTileQueries];
  __shared__ bool last;
  constexpr int kRow = kHeadRow<kDim>;
  constexpr int kThreads = kSplits * kSplitThreads;
  static_assert(kSplitKeys * kRow * sizeof(__half) >= kTileQueries * (kDim + 2) * sizeof(float),
                "a split's results fit where its keys were");
  const int group = static_cast<int>(threadIdx.x) / kSplitThreads;
  const int thread = static_cast<int>(threadIdx.x) % kSplitThreads;
  const int lane = thread & 31;
  const int warp = thread >> 5;
  __half* const keys = shared + kQueryValues<kDim> + group * kSplitValues<kDim>;
  __half* const values = keys + kSplitKeys * kRow;
  __half* const weights = values + kSplitKeys * kRow;
  const auto sync_split = [&]() { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kSplitThreads) : "memory"); };
  const HeadGroup heads = head_group(task.num_heads, task.num_kv_heads);
  const int group_size = task.num_heads / task.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) / heads.tiles;
  const int first_head = kv_head * group_size + static_cast<int>(blockIdx.x) % heads.tiles * heads.per_tile;
  const int num_heads = min(heads.per_tile, (kv_head + 1) * group_size - first_head);
  const int64_t index = blockIdx.z;
  const int64_t row = task.single_rows == nullptr ? task.first_row + index : task.single_rows[task.first_row + index];
  const int position = task.step.positions[row];
  const int num_keys = position + 1;
  const int num_splits = (num_keys + kSplitKeys - 1) / kSplitKeys;
  const int first_split = static_cast<int>(blockIdx.y) * kSplits;
  release_successor();
  if (first_split >= num_splits) {
    await_predecessor();
    for (int i = 2 * static_cast<int>(threadIdx.x); position < 0 && first_split == 0 && i < num_heads * kDim;
         i += 2 * kThreads) {
      *reinterpret_cast<uint32_t*>(
          task.out + pair_offset(task.tiled_out, row, static_cast<int64_t>(first_head) * kDim + i, task.out_stride)) =
          0;
    }
    return;
  }

  const int split = first_split + group;
  const bool active = split < num_splits;
  const int begin = split * kSplitKeys;
  const int32_t* table = task.step.tables + task.step.table_offsets[row];
  const bool appends = task.append && split == num_splits - 1;
  if (!task.append) await_predecessor();
  if (active) {
    const int end = min(begin + kSplitKeys, appends ? position : num_keys);
    stage_heads<kDim, kSplitThreads>(keys, task, table, kv_head, 0, begin, end, thread);
    asm volatile("cp.async.commit_group;" ::: "memory");
    stage_heads<kDim, kSplitThreads>(values, task, table, kv_head, values_offset(task), begin, end, thread);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  if (task.append) await_predecessor();

  const int64_t rope = static_cast<int64_t>(position) * (task.rope_dims / 2);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < kTileQueries * kDim; i += kThreads) {
    float value = 0;
    if (i / kDim < num_heads) {
      const float* head = task.qkv + row * task.qkv_stride + static_cast<int64_t>(first_head + i / kDim) * kDim;
      value = rotated(task, head, task.rope_cos + rope, task.rope_sin + rope, i % kDim);
    }
    shared[i / kDim * kRow + i % kDim] = scaled_query(value, kDim);
  }
  if (appends) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    sync_split();  // the zeros in the row's own place have been written
    append_row(task, row, kv_head, position, thread, kSplitThreads, keys + (position - begin) * kRow,
               values + (position - begin) * kRow);
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();

  float* const meeting = task.partials + (index * task.num_heads + first_head) * task.max_splits * (kDim + 2);
  Partials<kDim> partials{meeting, int64_t{task.max_splits} * (kDim + 2), kDim + 2, false};
  if (kSplits > 1 && num_splits <= kSplits) {
    partials = {reinterpret_cast<float*>(shared + kQueryValues<kDim>), kDim + 2,
                kSplitValues<kDim> * static_cast<int64_t>(sizeof(__half)) / static_cast<int64_t>(sizeof(float)), true};
  }
  if (active) {
    const Queries<kDim> queries(shared, lane);
    float score[kWarpKeys / 8][4] = {};
#pragma unroll
    for (int t = 0; t < kWarpKeys / 16; ++t) {
      queries.score(score[2 * t], score[2 * t + 1], keys + (warp * kWarpKeys + t * 16) * kRow, lane);
    }
    const int r = lane >> 2;
    const int first_key = begin + warp * kWarpKeys + (lane & 3) * 2;
    float top[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (first_key + n * 8 + (e & 1) < num_keys) top[e / 2] = fmaxf(top[e / 2], score[n][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2));
      if ((lane & 3) == 0) warp_largest[group * kWarps + warp][r + 8 * i] = top[i];
    }
    sync_split();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top[i] = fmaxf(top[i], warp_largest[group * kWarps + w][r + 8 * i]);
    }
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = first_key + n * 8 + (e & 1) < num_keys ? exp2_of(__fsub_rn(score[n][e], top[e / 2])) : 0.0f;
      }
      __half* to = weights + r * kWeightRow + warp * kWarpKeys + n * 8 + (lane & 3) * 2;
      *reinterpret_cast<uint32_t*>(to) = pack_half2(w[0], w[1]);
      *reinterpret_cast<uint32_t*>(to + 8 * kWeightRow) = pack_half2(w[2], w[3]);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    sync_split();

    // Sixteen dimensions at a time.
    for (int d = warp; d < kDim / 16; d += kWarps) {
      float part[2][4] = {};
      float sums[4] = {};
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
        if (begin + t * 16 >= num_keys) break;
        uint32_t w[4], v[4];
        load_fragment<true>(w, weights + t * 16, kWeightRow, lane);
        load_transposed(v, values + t * 16 * kRow + d * 16, kRow, lane);
        mma(part[0], w, v[0], v[1]);
        mma(part[1], w, v[2], v[3]);
        mma(sums, w, kOnes, kOnes);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = r + 8 * i;
        if (head >= num_heads) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = d * 16 + n * 8 + (lane & 3) * 2;
          const float2 value = {part[n][2 * i], part[n][2 * i + 1]};
          if (num_splits == 1) {
            *reinterpret_cast<uint32_t*>(task.out + pair_offset(task.tiled_out, row,
                                                                static_cast<int64_t>(first_head + head) * kDim + column,
                                                                task.out_stride)) =
                pack_half2(__fdiv_rn(value.x, sums[2 * i]), __fdiv_rn(value.y, sums[2 * i]));
          } else {
            *reinterpret_cast<float2*>(partials.of(head, split) + column) = value;
          }
        }
        if (num_splits > 1 && d == 0 && (lane & 3) == 0) {
          *reinterpret_cast<float2*>(partials.of(head, split) + kDim) = {top[i], sums[2 * i]};
        }
      }
    }
  }
  if (num_splits == 1) return;
  if (kSplits == 1 || num_splits > kSplits) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* arrivals = task.arrivals + index * gridDim.x + blockIdx.x;
      last = atomicAdd(arrivals, 1) == (num_splits + kSplits - 1) / kSplits - 1;
      if (last) *arrivals = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
  } else {
    __syncthreads();
  }
  join_splits<kDim>(task, partials, row, first_head, num_heads, num_splits);
}

template <int kDim, int kSplits>
void launch_decode(const AttentionTask& task) {
  const int tiles = head_group(task.num_heads, task.num_kv_heads).tiles;
  allow_shared(decode_kernel<kDim, kSplits>, shared_bytes<kDim>(kSplits));
  launch(decode_kernel<kDim, kSplits>,
         dim3(static_cast<unsigned>(task.num_kv_heads * tiles),
              static_cast<unsigned>((task.max_splits + kSplits - 1) / kSplits), static_cast<unsigned>(task.num_rows)),
         dim3(kSplits * kSplitThreads), shared_bytes<kDim>(kSplits), task.stream, task);
}

// Splits share a block to meet sooner. Where heads are small and rows many, their number keeps the device busy: more,
// smaller blocks, and no split of a short sequence holds memory in vain. With heads of 128 that was slower.
template <int kDim>
void launch_decode(const AttentionTask& task) {
  const size_t most = max_shared_bytes();
  const int64_t blocks =
      int64_t{task.num_rows} * task.num_kv_heads * head_group(task.num_heads, task.num_kv_heads).tiles;
  if (kDim > 64 || blocks < 4 * device_attribute(cudaDevAttrMultiProcessorCount)) {
    if constexpr (kDim <= 64) {
      if (task.max_splits > 2 && shared_bytes<kDim>(4) <= most) return launch_decode<kDim, 4>(task);
    }
    if (task.max_splits > 1 && shared_bytes<kDim>(2) <= most) return launch_decode<kDim, 2>(task);
  }
  return launch_decode<kDim, 1>(task);
}

}  // namespace

bool supports_head_dim(int32_t head_dim) {
  return head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128;
}

void attend_decode(const AttentionTask& task) {
  switch (task.head_dim) {
    case 16: return launch_decode<16>(task);
    case 32: return launch_decode<32>(task);
    case 64: return launch_decode<64>(task);
    case 96: return launch_decode<96>(task);
    case 128: return launch_decode<128>(task);
    default: throw Error(ErrorCode::kInternal, "no attention kernel for this head size");
  }
}

}  // namespace tw::cuda
