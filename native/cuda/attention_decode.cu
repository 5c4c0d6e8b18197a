// Paged attention for single rows of sequences (attention.cuh): up to 16 query heads of one kv head against the row's
// splits of 128 keys. Four warps take a split: each scores 32 of the keys, then sums its share of the values'
// dimensions over all of them. Reads 4 · head_dim bytes a key, kv head and row; where attention itself appends the
// row's key and value, the others are on their way before the predecessor ends: earlier steps wrote them, and positions
// and block tables are in place before a step's first kernel begins.
//
// Few rows: a block takes several splits at once (decode_kernel), which meet in its shared memory. Many rows: a block
// walks over them (walk_kernel) and is small, so that several share a processor and one's copies run under another's
// arithmetic. Either way, a row with more splits than a block takes leaves its results in device memory, and its block
// that ends last joins them.
#include "cuda/attention_rows.cuh"
#include "cuda/attention_walk.cuh"

namespace tw::cuda {
namespace {

// FP16 values in shared memory: the queries, then keys, values and weights of each split.
template <int kDim>
constexpr int kQueryValues = kTileQueries * kHeadRow<kDim>;
template <int kDim>
constexpr int kSplitValues = 2 * kSplitKeys * kHeadRow<kDim> + kTileQueries * kWeightRow;
template <int kDim>
constexpr size_t shared_bytes(int splits) {
  return (size_t{kQueryValues<kDim>} + static_cast<size_t>(splits) * kSplitValues<kDim>)*sizeof(__half);
}

template <int kDim, int kSplits>
__global__ void __launch_bounds__(kSplits* kSplitThreads) decode_kernel(const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(16) __half shared[];
  __shared__ float warp_largest[kSplits * kWarps][kTileQueries];
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
  const DecodeBlock block = this_block(task);
  const int position = block.position;
  const int num_keys = block.num_keys;
  const int num_splits = block.num_splits;
  const int first_split = static_cast<int>(blockIdx.y) * kSplits;
  release_successor();
  if (first_split >= num_splits) {
    await_predecessor();
    if (position < 0 && first_split == 0) store_zeros<kDim>(task, block);
    return;
  }

  const int split = first_split + group;
  const bool active = split < num_splits;
  const int begin = split * kSplitKeys;
  const bool appends = task.append && split == num_splits - 1;
  if (!task.append) await_predecessor();
  if (active) {
    const int end = min(begin + kSplitKeys, appends ? position : num_keys);
    stage_heads<kDim, kSplitThreads>(keys, task, block.table, block.kv_head, 0, begin, end, thread);
    asm volatile("cp.async.commit_group;" ::: "memory");
    stage_heads<kDim, kSplitThreads>(values, task, block.table, block.kv_head, values_offset(task), begin, end, thread);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  if (task.append) await_predecessor();

  const int64_t rope = static_cast<int64_t>(position) * (task.rope_dims / 2);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < kTileQueries * kDim; i += kThreads) {
    float value = 0;
    if (i / kDim < block.num_heads) {
      const float* head =
          task.qkv + block.row * task.qkv_stride + static_cast<int64_t>(block.first_head + i / kDim) * kDim;
      value = rotated(task, head, task.rope_cos + rope, task.rope_sin + rope, i % kDim);
    }
    shared[i / kDim * kRow + i % kDim] = scaled_query(value, kDim);
  }
  if (appends) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    sync_split();  // the zeros in the row's own place have been written
    append_row(task, block.row, block.kv_head, position, thread, kSplitThreads, keys + (position - begin) * kRow,
               values + (position - begin) * kRow);
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();

  Partials<kDim> partials = device_partials<kDim>(task, block);
  if (kSplits > 1 && num_splits <= kSplits) {
    partials = {reinterpret_cast<float*>(shared + kQueryValues<kDim>), kDim + 2,
                kSplitValues<kDim> * static_cast<int64_t>(sizeof(__half)) / static_cast<int64_t>(sizeof(float)), true};
  }
  if (active) {
    const Queries<kDim> queries(shared, lane);
    Scores score = {};
#pragma unroll
    for (int t = 0; t < kWarpKeys / 16; ++t) {
      queries.score(score[2 * t], score[2 * t + 1], keys + (warp * kWarpKeys + t * 16) * kRow, lane);
    }
    const int r = lane >> 2;
    const int first_key = begin + warp * kWarpKeys + (lane & 3) * 2;
    float top[2];
    largest_scores(top, score, first_key, num_keys);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((lane & 3) == 0) warp_largest[group * kWarps + warp][r + 8 * i] = top[i];
    }
    sync_split();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top[i] = fmaxf(top[i], warp_largest[group * kWarps + w][r + 8 * i]);
    }
    store_weights(weights + r * kWeightRow + warp * kWarpKeys + (lane & 3) * 2, score, top, first_key, num_keys);
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
        if (head >= block.num_heads) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = d * 16 + n * 8 + (lane & 3) * 2;
          const float2 value = {part[n][2 * i], part[n][2 * i + 1]};
          if (num_splits == 1) {
            store_pair(task, block, head * kDim + column, __fdiv_rn(value.x, sums[2 * i]),
                       __fdiv_rn(value.y, sums[2 * i]));
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
  if constexpr (kSplits > 1) {
    if constexpr (kForRacecheck) sync_split();  // it loses count of warps that skipped the loop above
    __syncthreads();
  }
  if (num_splits > kSplits && !ends_last(task, block, (num_splits + kSplits - 1) / kSplits)) return;
  join_splits<kDim>(task, block, partials);
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

template <int kDim>
void launch_decode(const AttentionTask& task) {
  const int64_t blocks =
      int64_t{task.num_rows} * task.num_kv_heads * head_group(task.num_heads, task.num_kv_heads).tiles;
  if (blocks >= int64_t{kWalkFrom} * device_attribute(cudaDevAttrMultiProcessorCount)) return launch_walk<kDim>(task);
  // Splits share a block to meet sooner.
  const size_t most = max_shared_bytes();
  if constexpr (kDim <= 64) {
    if (task.max_splits > 2 && shared_bytes<kDim>(4) <= most) return launch_decode<kDim, 4>(task);
  }
  if (task.max_splits > 1 && shared_bytes<kDim>(2) <= most) return launch_decode<kDim, 2>(task);
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
