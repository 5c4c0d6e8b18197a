// Paged attention for single rows of sequences (attention.cuh): a block of 4 warps owns a row, up to 16 query heads of
// one kv head and one split of 128 keys. Each warp scores 32 of the keys and then sums its share of the values'
// dimensions over all of them. The block that ends last joins the splits. Reads 4 · head_dim bytes a key, kv head and
// row; where attention itself appends the row's key and value, the others are on their way before the predecessor ends:
// earlier steps wrote them, and positions and block tables are in place before a step's first kernel begins.
#include "cuda/attention.cuh"

namespace tw::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpKeys = kSplitKeys / kWarps;

template <int kDim>
constexpr size_t kSharedBytes =
    (size_t{kTileQueries + 2 * kSplitKeys} * kHeadRow<kDim> + kTileQueries * kWeightRow) * sizeof(__half);

// The splits' results of one (row, head), in the order of splits: [head_dim values, largest score, sum of weights].
template <int kDim>
__device__ __forceinline__ float* partial_of(const AttentionTask& task, int64_t index, int head, int split) {
  return task.partials + ((index * task.num_heads + head) * task.max_splits + split) * (kDim + 2);
}

// Joins the splits of the block's heads and writes them out.
template <int kDim>
__device__ __forceinline__ void join_splits(const AttentionTask& task, int64_t index, int64_t row, int first_head,
                                            int num_heads, int num_splits) {
  for (int i = 2 * static_cast<int>(threadIdx.x); i < num_heads * kDim; i += 2 * kThreads) {
    const float* from = partial_of<kDim>(task, index, first_head + i / kDim, 0);
    const int d = i % kDim;
    float2 value = __ldcg(reinterpret_cast<const float2*>(from + d));
    float largest = __ldcg(from + kDim);
    float sum = __ldcg(from + kDim + 1);
#pragma unroll 4
    for (int s = 1; s < num_splits; ++s) {
      const float* split = from + s * (kDim + 2);
      const float2 more = __ldcg(reinterpret_cast<const float2*>(split + d));
      const Joint joint = join(&largest, __ldcg(split + kDim));
      sum = joined(joint, sum, __ldcg(split + kDim + 1));
      value = {joined(joint, value.x, more.x), joined(joint, value.y, more.y)};
    }
    *reinterpret_cast<uint32_t*>(
        task.out + pair_offset(task.tiled_out, row, static_cast<int64_t>(first_head) * kDim + i, task.out_stride)) =
        pack_half2(__fdiv_rn(value.x, sum), __fdiv_rn(value.y, sum));
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(16) __half shared[];  // queries, keys, values: rows of kHeadRow; weights: of kWeightRow
  __shared__ float warp_largest[kWarps][kTileQueries];
  __shared__ bool last;
  constexpr int kRow = kHeadRow<kDim>;
  __half* const keys = shared + kTileQueries * kRow;
  __half* const values = keys + kSplitKeys * kRow;
  __half* const weights = values + kSplitKeys * kRow;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  const HeadGroup group = head_group(task.num_heads, task.num_kv_heads);
  const int group_size = task.num_heads / task.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) / group.tiles;
  const int first_head = kv_head * group_size + static_cast<int>(blockIdx.x) % group.tiles * group.per_tile;
  const int num_heads = min(group.per_tile, (kv_head + 1) * group_size - first_head);
  const int64_t index = blockIdx.z;
  const int64_t row = task.single_rows == nullptr ? task.first_row + index : task.single_rows[task.first_row + index];
  const int split = static_cast<int>(blockIdx.y);
  const int position = task.step.positions[row];
  const int num_keys = position + 1;
  const int begin = split * kSplitKeys;
  const int num_splits = (num_keys + kSplitKeys - 1) / kSplitKeys;
  release_successor();
  if (begin >= num_keys) {
    await_predecessor();
    for (int i = 2 * thread; position < 0 && split == 0 && i < num_heads * kDim; i += 2 * kThreads) {
      *reinterpret_cast<uint32_t*>(
          task.out + pair_offset(task.tiled_out, row, static_cast<int64_t>(first_head) * kDim + i, task.out_stride)) =
          0;
    }
    return;
  }

  const int32_t* table = task.step.tables + task.step.table_offsets[row];
  const bool appends = task.append && split == num_splits - 1;
  if (!task.append) await_predecessor();
  const int end = min(begin + kSplitKeys, appends ? position : num_keys);
  stage_heads<kDim>(keys, task, table, kv_head, 0, begin, end, thread, kThreads);
  asm volatile("cp.async.commit_group;" ::: "memory");
  stage_heads<kDim>(values, task, table, kv_head, values_offset(task), begin, end, thread, kThreads);
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (task.append) await_predecessor();

  const int64_t rope = static_cast<int64_t>(position) * (task.rope_dims / 2);
  for (int i = thread; i < kTileQueries * kDim; i += kThreads) {
    float value = 0;
    if (i / kDim < num_heads) {
      const float* head = task.qkv + row * task.qkv_stride + static_cast<int64_t>(first_head + i / kDim) * kDim;
      value = rotated(task, head, task.rope_cos + rope, task.rope_sin + rope, i % kDim);
    }
    shared[i / kDim * kRow + i % kDim] = scaled_query(value, kDim);
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();
  if (appends) {
    append_row(task, row, kv_head, position, thread, kThreads, keys + (position - begin) * kRow,
               values + (position - begin) * kRow);
    __syncthreads();
  }

  float score[kWarpKeys / 8][4] = {};
#pragma unroll
  for (int t = 0; t < kWarpKeys / 16; ++t) {
    score_keys<kDim>(score[2 * t], score[2 * t + 1], shared, keys + (warp * kWarpKeys + t * 16) * kRow, lane);
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
    if ((lane & 3) == 0) warp_largest[warp][r + 8 * i] = top[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top[i] = fmaxf(top[i], warp_largest[w][r + 8 * i]);
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
  __syncthreads();

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
          *reinterpret_cast<float2*>(partial_of<kDim>(task, index, first_head + head, split) + column) = value;
        }
      }
      if (num_splits > 1 && d == 0 && (lane & 3) == 0) {
        float* stats = partial_of<kDim>(task, index, first_head + head, split) + kDim;
        stats[0] = top[i];
        stats[1] = sums[2 * i];
      }
    }
  }
  if (num_splits == 1) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    int32_t* arrivals = task.arrivals + index * gridDim.x + blockIdx.x;
    last = atomicAdd(arrivals, 1) == num_splits - 1;
    if (last) *arrivals = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  join_splits<kDim>(task, index, row, first_head, num_heads, num_splits);
}

template <int kDim>
void launch_decode(const AttentionTask& task) {
  const HeadGroup group = head_group(task.num_heads, task.num_kv_heads);
  allow_shared(decode_kernel<kDim>, kSharedBytes<kDim>);
  launch(decode_kernel<kDim>,
         dim3(static_cast<unsigned>(task.num_kv_heads * group.tiles), static_cast<unsigned>(task.max_splits),
              static_cast<unsigned>(task.num_rows)),
         dim3(kThreads), kSharedBytes<kDim>, task.stream, task);
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
