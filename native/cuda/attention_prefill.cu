// Paged attention for consecutive rows of a sequence (attention.cuh): a block of 4 warps owns 64 queries of one kv
// head, the heads that share it times as many rows as fit, and walks over the splits of their keys; a warp owns 16 of
// them. Keys and values of a split pass through shared memory, the next keys on their way while the values are used.
// Reads 4 · head_dim bytes for each key, kv head and 64 queries.
// Hopper has a kernel of its own for the usual heads (attention_tall.cuh), with the same sums.
#include "cuda/attention.cuh"
#include "cuda/attention_tall.cuh"
#include "cuda/matmul.h"

namespace tw::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kQueries = kWarps * kTileQueries;

template <int kDim>
constexpr size_t kSharedBytes = size_t{kQueries + 2 * kSplitKeys} * kHeadRow<kDim> * sizeof(__half);

template <int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    prefill_kernel(const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(16) __half shared[];  // queries, keys, values: rows of kHeadRow
  constexpr int kRow = kHeadRow<kDim>;
  __half* const keys = shared + kQueries * kRow;
  __half* const values = keys + kSplitKeys * kRow;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  const HeadGroup group = head_group(task.num_heads, task.num_kv_heads);
  const int group_size = task.num_heads / task.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) / group.tiles;
  const int first_head = kv_head * group_size + static_cast<int>(blockIdx.x) % group.tiles * group.per_tile;
  const int num_heads = min(group.per_tile, (kv_head + 1) * group_size - first_head);
  // The last rows see the most keys, so their blocks begin first.
  const int2 rows = task.row_tiles[gridDim.y - 1 - blockIdx.y];
  const int first_position = task.step.positions[rows.x];
  const int32_t* table = task.step.tables + task.step.table_offsets[rows.x];
  const int num_keys = first_position + rows.y;
  release_successor();
  await_predecessor();

  const auto stage = [&](__half* to, int64_t offset, int begin) {
    if (begin < num_keys) stage_heads<kDim, kThreads>(to, task, table, kv_head, offset, begin, num_keys, thread);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  // Queries beside each other are heads of one row, then rows.
  constexpr int kChunks = kDim / 8;
  for (int i = thread; i < kQueries * kChunks; i += kThreads) {
    const int slot = i / kChunks;
    const int row = slot / num_heads;
    const bool exists = row < rows.y;
    const __half* from = task.queries + (rows.x + row) * task.query_stride +
                         static_cast<int64_t>(first_head + slot % num_heads) * kDim + i % kChunks * 8;
    copy_async16(shared + slot * kRow + i % kChunks * 8, exists ? from : task.queries, exists);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  stage(keys, 0, 0);
  stage(values, values_offset(task), 0);
  asm volatile("cp.async.wait_group 2;" ::: "memory");
  __syncthreads();
  const Queries<kDim> queries(shared + warp * kTileQueries * kRow, lane);
  // Queries r and r + 8 of the warp: the keys that they see, and what is joined so far.
  const int slots[2] = {warp * kTileQueries + (lane >> 2), warp * kTileQueries + (lane >> 2) + 8};
  const int seen[2] = {first_position + min(slots[0] / num_heads, rows.y - 1) + 1,
                       first_position + min(slots[1] / num_heads, rows.y - 1) + 1};
  const int warp_sees_least = first_position + min(warp * kTileQueries / num_heads, rows.y - 1) + 1;
  const int warp_seen = first_position + min((warp * kTileQueries + 15) / num_heads, rows.y - 1) + 1;
  float largest[2] = {-FLT_MAX, -FLT_MAX};
  float sums[2] = {0, 0};
  float out[kDim / 8][4] = {};
  for (int begin = 0; begin < num_keys; begin += kSplitKeys) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    float score[kKeySteps * 2][4] = {};
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) {
      if (begin + t * 16 < warp_seen) {
        queries.score(score[2 * t], score[2 * t + 1], keys + t * 16 * kRow, lane);
      }
    }
    __syncthreads();
    stage(keys, 0, begin + kSplitKeys);

    float top[2] = {-FLT_MAX, -FLT_MAX};
    const auto sees = [&](int n, int e) { return begin + n * 8 + (lane & 3) * 2 + (e & 1) < seen[e / 2]; };
    // Most splits are seen as a whole by all queries of the warp.
    const bool whole = begin + kSplitKeys <= warp_sees_least;
    if (whole) {
#pragma unroll
      for (int n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], score[n][e]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!sees(n, e)) score[n][e] = -INFINITY;
          top[e / 2] = fmaxf(top[e / 2], score[n][e]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
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

    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    float part[kDim / 8][4] = {};
    float weight_sums[4] = {};
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) {
      if (begin + t * 16 >= warp_seen) continue;
      mma(weight_sums, weights[t], kOnes, kOnes);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t v[4];
        load_transposed(v, values + t * 16 * kRow + d * 16, kRow, lane);
        mma(part[2 * d], weights[t], v[0], v[1]);
        mma(part[2 * d + 1], weights[t], v[2], v[3]);
      }
    }
    __syncthreads();
    stage(values, values_offset(task), begin + kSplitKeys);

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (begin >= seen[i]) continue;
      if (begin == 0) {
        largest[i] = top[i];
        sums[i] = weight_sums[2 * i];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          out[n][2 * i] = part[n][2 * i];
          out[n][2 * i + 1] = part[n][2 * i + 1];
        }
        continue;
      }
      const Joint joint = join(&largest[i], top[i]);
      sums[i] = joined(joint, sums[i], weight_sums[2 * i]);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[n][2 * i] = joined(joint, out[n][2 * i], part[n][2 * i]);
        out[n][2 * i + 1] = joined(joint, out[n][2 * i + 1], part[n][2 * i + 1]);
      }
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = slots[i] / num_heads;
    if (row >= rows.y) continue;
    const int column = (first_head + slots[i] % num_heads) * kDim + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(task.out +
                                   pair_offset(task.tiled_out, rows.x + row, column + n * 8, task.out_stride)) =
          pack_half2(__fdiv_rn(out[n][2 * i], sums[i]), __fdiv_rn(out[n][2 * i + 1], sums[i]));
    }
  }
}

template <int kDim>
void launch_prefill(const AttentionTask& task) {
  const HeadGroup group = head_group(task.num_heads, task.num_kv_heads);
  allow_shared(prefill_kernel<kDim>, kSharedBytes<kDim>);
  launch(prefill_kernel<kDim>,
         dim3(static_cast<unsigned>(task.num_kv_heads * group.tiles), static_cast<unsigned>(task.num_row_tiles)),
         dim3(kThreads), kSharedBytes<kDim>, task.stream, task);
}

// Whether Hopper's own kernel takes heads of this size.
bool takes_tall(int32_t head_dim) { return (head_dim == 64 || head_dim == 128) && has_hopper(); }

}  // namespace

int32_t prefill_tile_rows(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim) {
  return (takes_tall(head_dim) ? kTallQueries : kQueries) / head_group(num_heads, num_kv_heads).per_tile;
}

void attend_prefill(const AttentionTask& task) {
#ifdef TW_CUDA_HOPPER
  if (takes_tall(task.head_dim)) {
    return task.head_dim == 64 ? launch_tall_prefill<64>(task) : launch_tall_prefill<128>(task);
  }
#endif
  switch (task.head_dim) {
    case 16: return launch_prefill<16>(task);
    case 32: return launch_prefill<32>(task);
    case 64: return launch_prefill<64>(task);
    case 96: return launch_prefill<96>(task);
    case 128: return launch_prefill<128>(task);
    default: throw Error(ErrorCode::kInternal, "no attention kernel for this head size");
  }
}

}  // namespace tw::cuda
