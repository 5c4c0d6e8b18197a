// Paged attention over FP16 keys and values, for prefill and decode alike.
//
// Reduction order, the same for every tile, chunk and thread: keys are cut in splits at multiples of kSplitTokens.
// Within a split a score is Σ_d q[d]·k[d] in order of d (fma); weights are e^(score - the split's maximum); their sum
// runs over 16 lanes by position and then over the lanes; values are Σ_t weight·v[t] in order of t (fma). Splits are
// combined in order by combine_splits(). Reads 4 · head_dim bytes a key.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {
namespace {

#if defined(TW_ISA_AVX512)
constexpr int kMicroRows = 6;
#else
constexpr int kMicroRows = 2;
#endif

constexpr float kLowest = -3.0e38f;

// Scores of kRows queries with kGroups groups of 16 consecutive keys. `scores` has kSplitTokens values a row.
template <int kRows, int kGroups>
void score_groups(const KvLayer& layer, const AttentionTile& tile, int row, int32_t first_key, int32_t split_begin,
                  float* scores) {
  F32x16 acc[kRows][kGroups];
  const uint16_t* keys[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    keys[g] = layer.keys(tile.block_table[first_key / kBlockTokens + g], tile.kv_head);
    for (int r = 0; r < kRows; ++r) acc[r][g] = F32x16::zero();
  }
  for (int32_t d = 0; d < layer.head_dim; ++d) {
    F32x16 k[kGroups];
    for (int g = 0; g < kGroups; ++g) k[g] = F32x16::load_f16(keys[g] + int64_t{d} * kBlockTokens);
    for (int r = 0; r < kRows; ++r) {
      const F32x16 q = F32x16::broadcast(tile.queries[row + r][d]);
      for (int g = 0; g < kGroups; ++g) acc[r][g] = fma(q, k[g], acc[r][g]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = scores + (row + r) * kSplitTokens + (first_key - split_begin);
    for (int g = 0; g < kGroups; ++g) acc[r][g].store(out + 16 * g);
  }
}

template <int kRows>
void score_rows(const KvLayer& layer, const AttentionTile& tile, int row, int32_t begin, int32_t end, float* scores) {
  constexpr int kGroups = kRows >= 5 ? 2 : 4;
  int32_t key = begin;
  for (; key + kGroups * kBlockTokens < end + kBlockTokens; key += kGroups * kBlockTokens) {
    score_groups<kRows, kGroups>(layer, tile, row, key, begin, scores);
  }
  for (; key < end; key += kBlockTokens) score_groups<kRows, 1>(layer, tile, row, key, begin, scores);
}

// Scores → weights e^(score - max), zero beyond the row's keys; the row's maximum and sum.
void weigh_row(float* scores, int32_t num_keys, int32_t num_padded, AttentionState* state) {
  F32x16 best = F32x16::broadcast(kLowest);
  for (int32_t t = 0; t < num_padded; t += 16) {
    best = max(best, first_lanes(F32x16::load(scores + t), num_keys - t, kLowest));
  }
  state->max = max_lane(best);
  const F32x16 top = F32x16::broadcast(state->max);
  F32x16 total = F32x16::zero();
  for (int32_t t = 0; t < num_padded; t += 16) {
    const F32x16 weight = first_lanes(exp(F32x16::load(scores + t) - top), num_keys - t, 0.0f);
    weight.store(scores + t);
    total = total + weight;
  }
  state->sum = sum(total);
}

// values[r][d … d+64) = Σ_t weight[r][t] · v[t][d … d+64) over keys [begin, end), in order of t.
template <int kRows, int kVectors>
void sum_values(const KvLayer& layer, const AttentionTile& tile, int row, int32_t begin, int32_t end, int32_t d,
                const float* weights, AttentionState* states) {
  F32x16 acc[kRows][kVectors];
  for (auto& r : acc) {
    for (F32x16& a : r) a = F32x16::zero();
  }
  for (int32_t t = begin; t < end; ++t) {
    const uint16_t* value =
        layer.values(tile.block_table[t / kBlockTokens], tile.kv_head) + int64_t{t % kBlockTokens} * layer.head_dim + d;
    F32x16 v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = F32x16::load_f16(value + 16 * i);
    for (int r = 0; r < kRows; ++r) {
      const F32x16 w = F32x16::broadcast(weights[(row + r) * kSplitTokens + (t - begin)]);
      for (int i = 0; i < kVectors; ++i) acc[r][i] = fma(w, v[i], acc[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) acc[r][i].store(states[row + r].values + d + 16 * i);
  }
}

template <int kRows>
void sum_rows(const KvLayer& layer, const AttentionTile& tile, int row, int32_t begin, int32_t end,
              const float* weights, AttentionState* states) {
  int32_t d = 0;
  for (; d + 64 <= layer.head_dim; d += 64) {
    sum_values<kRows, 4>(layer, tile, row, begin, end, d, weights, states);
  }
  for (; d < layer.head_dim; d += 16) sum_values<kRows, 1>(layer, tile, row, begin, end, d, weights, states);
}

template <int kRows>
void attend_rows(const KvLayer& layer, const AttentionTile& tile, int row, int32_t begin, AttentionState* states,
                 float* scratch) {
  int32_t end = begin;  // beyond the last key that any of these rows sees in this split
  for (int r = 0; r < kRows; ++r) {
    const int32_t keys = tile.num_keys[row + r];
    const int32_t stop = keys < begin + kSplitTokens ? keys : begin + kSplitTokens;
    end = stop > end ? stop : end;
  }
  if (end == begin) {
    for (int r = 0; r < kRows; ++r) states[row + r].sum = 0.0f;
    return;
  }
  score_rows<kRows>(layer, tile, row, begin, end, scratch);
  const int32_t padded = (end - begin + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  for (int r = 0; r < kRows; ++r) {
    const int32_t keys = tile.num_keys[row + r] - begin;
    float* scores = scratch + (row + r) * kSplitTokens;
    if (keys <= 0) {
      for (int32_t t = 0; t < padded; ++t) scores[t] = 0.0f;
      states[row + r].sum = 0.0f;
    } else {
      weigh_row(scores, keys, padded, &states[row + r]);
    }
  }
  sum_rows<kRows>(layer, tile, row, begin, end, scratch, states);
}

}  // namespace

// A row whose keys end before `end` gets weight 0 for the rest: fma(0, v, acc) leaves acc as it is, since cached values
// are finite, so its result does not depend on the rows that share its tile.
void attend_split(const KvLayer& layer, const AttentionTile& tile, int32_t split, AttentionState* states,
                  float* scratch) {
  const int32_t begin = split * kSplitTokens;
  int row = 0;
  while (row < tile.num_rows) {
    const int left = tile.num_rows - row;
    const int rows = left < kMicroRows ? left : kMicroRows;
    if constexpr (kMicroRows == 6) {
      switch (rows) {
        case 1: attend_rows<1>(layer, tile, row, begin, states, scratch); break;
        case 2: attend_rows<2>(layer, tile, row, begin, states, scratch); break;
        case 3: attend_rows<3>(layer, tile, row, begin, states, scratch); break;
        case 4: attend_rows<4>(layer, tile, row, begin, states, scratch); break;
        case 5: attend_rows<5>(layer, tile, row, begin, states, scratch); break;
        default: attend_rows<6>(layer, tile, row, begin, states, scratch); break;
      }
    } else {
      if (rows == 1) {
        attend_rows<1>(layer, tile, row, begin, states, scratch);
      } else {
        attend_rows<2>(layer, tile, row, begin, states, scratch);
      }
    }
    row += rows;
  }
}

void combine_splits(AttentionState* total, const AttentionState& part, int32_t head_dim) {
  if (part.sum == 0.0f) return;
  if (total->sum == 0.0f) {
    total->max = part.max;
    total->sum = part.sum;
    for (int32_t d = 0; d < head_dim; d += 16) F32x16::load(part.values + d).store(total->values + d);
    return;
  }
  const float top = total->max > part.max ? total->max : part.max;
  alignas(64) float factors[16] = {total->max - top, part.max - top};
  exp(F32x16::load(factors)).store(factors);
  const F32x16 keep = F32x16::broadcast(factors[0]);
  const F32x16 add = F32x16::broadcast(factors[1]);
  for (int32_t d = 0; d < head_dim; d += 16) {
    fma(F32x16::load(total->values + d), keep, F32x16::load(part.values + d) * add).store(total->values + d);
  }
  total->sum = total->sum * factors[0] + part.sum * factors[1];
  total->max = top;
}

void finish_attention(const AttentionState& state, int32_t head_dim, float* out) {
  const F32x16 factor = F32x16::broadcast(1.0f / state.sum);
  for (int32_t d = 0; d < head_dim; d += 16) (F32x16::load(state.values + d) * factor).store(out + d);
}

}  // namespace tw::cpu::TW_ISA
