// Paged attention over FP16 keys and values, for prefill and decode alike.
//
// Reduction order, the same for every tile, chunk and thread: keys are cut in splits at multiples of kSplitTokens.
// Within a split a score is Σ_d q[d]·k[d] in order of d (fma); weights are e^(score - the split's maximum); their sum
// runs over 16 lanes by position and then over the lanes; values are Σ_t weight·v[t] in order of t (fma). Splits are
// combined in order by combine_splits(). Reads 4 · head_dim bytes a key.
#include <algorithm>
#include <type_traits>

#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {
namespace {

#if defined(TW_ISA_AVX512)
constexpr int kMicroRows = 6;
#else
constexpr int kMicroRows = 2;
#endif

constexpr float kLowest = -3.0e38f;

// Keys and values where the cache has them: FP16, block by block.
struct PagedTokens {
  const KvLayer& layer;
  const AttentionTile& tile;

  // Dimension `d` of the 16 keys from position `key` on, a multiple of 16.
  F32x16 keys(int32_t key, int32_t d) const {
    const uint16_t* block = layer.keys(tile.block_table[key / kBlockTokens], tile.kv_head);
    return F32x16::load_f16(block + int64_t{d} * kBlockTokens);
  }
  // Dimensions d … d+15 of the value at position `t`.
  F32x16 value(int32_t t, int32_t d) const {
    const uint16_t* block = layer.values(tile.block_table[t / kBlockTokens], tile.kv_head);
    return F32x16::load_f16(block + int64_t{t % kBlockTokens} * layer.head_dim + d);
  }
};

// A chunk of keys [position / 16][head_dim][16], or of values [position][head_dim], widened to floats.
struct WideTokens {
  const float* data;
  int32_t first;  // position of the chunk's first token
  int32_t head_dim;

  F32x16 keys(int32_t key, int32_t d) const {
    return F32x16::load(data + int64_t{key - first} * head_dim + int64_t{d} * kBlockTokens);
  }
  F32x16 value(int32_t t, int32_t d) const { return F32x16::load(data + int64_t{t - first} * head_dim + d); }
};

// Keys of positions [begin, end) → WideTokens' form; values likewise.
void widen_keys(const PagedTokens& tokens, int32_t begin, int32_t end, float* out) {
  for (int32_t key = begin; key < end; key += kBlockTokens) {
    for (int32_t d = 0; d < tokens.layer.head_dim; ++d, out += kBlockTokens) tokens.keys(key, d).store(out);
  }
}

void widen_values(const PagedTokens& tokens, int32_t begin, int32_t end, float* out) {
  for (int32_t t = begin; t < end; ++t) {
    for (int32_t d = 0; d < tokens.layer.head_dim; d += 16, out += 16) tokens.value(t, d).store(out);
  }
}

// Scores of kRows queries with kGroups groups of 16 consecutive keys. `scores` has kSplitTokens values a row.
template <int kRows, int kGroups, class Tokens>
void score_groups(const Tokens& tokens, const AttentionTile& tile, int32_t head_dim, int row, int32_t first_key,
                  int32_t split_begin, float* scores) {
  F32x16 acc[kRows][kGroups];
  for (auto& r : acc) {
    for (F32x16& a : r) a = F32x16::zero();
  }
  for (int32_t d = 0; d < head_dim; ++d) {
    F32x16 k[kGroups];
    for (int g = 0; g < kGroups; ++g) k[g] = tokens.keys(first_key + g * kBlockTokens, d);
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

template <int kRows, class Tokens>
void score_rows(const Tokens& tokens, const AttentionTile& tile, int32_t head_dim, int row, int32_t begin, int32_t end,
                int32_t split_begin, float* scores) {
  constexpr int kGroups = 4;
  int32_t key = begin;
  for (; key + kGroups * kBlockTokens < end + kBlockTokens; key += kGroups * kBlockTokens) {
    score_groups<kRows, kGroups>(tokens, tile, head_dim, row, key, split_begin, scores);
  }
  for (; key < end; key += kBlockTokens) {
    score_groups<kRows, 1>(tokens, tile, head_dim, row, key, split_begin, scores);
  }
}

// The largest of a row's first `num_keys` scores.
float max_score(const float* scores, int32_t num_keys) {
  F32x16 best = F32x16::broadcast(kLowest);
  int32_t t = 0;
  for (; t + 16 <= num_keys; t += 16) best = max(best, F32x16::load(scores + t));
  if (t < num_keys) best = max(best, first_lanes(F32x16::load(scores + t), num_keys - t, kLowest));
  return max_lane(best);
}

// Scores → weights e^(score - top), zero from `num_keys` to `num_padded`; lane i of the result is their sum over the
// positions 16·n + i.
F32x16 weigh_row(float* scores, int32_t num_keys, int32_t num_padded, float top) {
  const F32x16 shift = F32x16::broadcast(top);
  F32x16 total = F32x16::zero();
  int32_t t = 0;
  for (; t + 16 <= num_keys; t += 16) {
    const F32x16 weight = exp(F32x16::load(scores + t) - shift);
    weight.store(scores + t);
    total = total + weight;
  }
  for (; t < num_padded; t += 16) {
    const F32x16 weight = first_lanes(exp(F32x16::load(scores + t) - shift), num_keys - t, 0.0f);
    weight.store(scores + t);
    total = total + weight;
  }
  return total;
}

// values[r][d … d+16·kVectors) += Σ_t weight[r][t] · v[t] over keys [begin, end), in order of t; from 0 if `begin` is
// the split's first key.
template <int kRows, int kVectors, class Tokens>
void sum_values(const Tokens& tokens, int row, int32_t begin, int32_t end, int32_t split_begin, int32_t d,
                const float* weights, AttentionState* states) {
  F32x16 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      acc[r][i] = begin == split_begin ? F32x16::zero() : F32x16::load(states[row + r].values + d + 16 * i);
    }
  }
  for (int32_t t = begin; t < end; ++t) {
    F32x16 v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = tokens.value(t, d + 16 * i);
    for (int r = 0; r < kRows; ++r) {
      const F32x16 w = F32x16::broadcast(weights[(row + r) * kSplitTokens + (t - split_begin)]);
      for (int i = 0; i < kVectors; ++i) acc[r][i] = fma(w, v[i], acc[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) acc[r][i].store(states[row + r].values + d + 16 * i);
  }
}

template <int kRows, class Tokens>
void sum_rows(const Tokens& tokens, int32_t head_dim, int row, int32_t begin, int32_t end, int32_t split_begin,
              const float* weights, AttentionState* states) {
  int32_t d = 0;
  for (; d + 64 <= head_dim; d += 64) {
    sum_values<kRows, 4>(tokens, row, begin, end, split_begin, d, weights, states);
  }
  for (; d < head_dim; d += 16) sum_values<kRows, 1>(tokens, row, begin, end, split_begin, d, weights, states);
}

// Calls body(integral_constant of the count, first row) for groups of at most kMicroRows rows, evenly split.
template <class Body>
void for_row_groups(int num_rows, const Body& body) {
  int row = 0;
  for (int groups = (num_rows + kMicroRows - 1) / kMicroRows; groups > 0; --groups) {
    const int rows = (num_rows - row + groups - 1) / groups;
    switch (rows) {
      case 1: body(std::integral_constant<int, 1>(), row); break;
      case 2: body(std::integral_constant<int, 2>(), row); break;
#if defined(TW_ISA_AVX512)
      case 3: body(std::integral_constant<int, 3>(), row); break;
      case 4: body(std::integral_constant<int, 4>(), row); break;
      case 5: body(std::integral_constant<int, 5>(), row); break;
      default: body(std::integral_constant<int, 6>(), row); break;
#endif
    }
    row += rows;
  }
}

// Beyond the last key of [split_begin, split_begin + kSplitTokens) that any of the rows sees.
int32_t end_of_rows(const AttentionTile& tile, int row, int num_rows, int32_t split_begin) {
  int32_t end = split_begin;
  for (int r = row; r < row + num_rows; ++r) {
    const int32_t stop = tile.num_keys[r] < split_begin + kSplitTokens ? tile.num_keys[r] : split_begin + kSplitTokens;
    end = stop > end ? stop : end;
  }
  return end;
}

// A row whose keys end before `end` gets weight 0 for the rest: fma(0, v, acc) leaves acc as it is, since cached values
// are finite, so its result does not depend on the rows that share its tile. Maxima, weights and sums are found in
// turn: one row's reductions then overlap the next row's.
template <int kRows>
void weigh_rows(const AttentionTile& tile, int row, int32_t begin, int32_t end, AttentionState* states,
                float* scratch) {
  const int32_t padded = (end - begin + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  const auto keys_of = [&](int r) { return std::clamp(tile.num_keys[row + r] - begin, 0, padded); };
  float* scores = scratch + row * kSplitTokens;
  F32x16 totals[kRows];
  for (int r = 0; r < kRows; ++r) states[row + r].max = max_score(scores + r * kSplitTokens, keys_of(r));
  for (int r = 0; r < kRows; ++r) {
    totals[r] = weigh_row(scores + r * kSplitTokens, keys_of(r), padded, states[row + r].max);
  }
  for (int r = 0; r < kRows; ++r) states[row + r].sum = sum(totals[r]);
}

}  // namespace

// Few rows read the cache as it is. More rows than fit in registers would widen each value again for every group of
// them: keys and values are widened once, a chunk at a time.
void attend_split(const KvLayer& layer, const AttentionTile& tile, int32_t split, AttentionState* states,
                  float* scratch) {
  const int32_t begin = split * kSplitTokens;
  const int32_t head_dim = layer.head_dim;
  const PagedTokens paged = {layer, tile};
  const int32_t last = end_of_rows(tile, 0, tile.num_rows, begin);
  if (last == begin) {
    for (int r = 0; r < tile.num_rows; ++r) states[r].sum = 0.0f;
    return;
  }
  float* wide = scratch + kAttentionRows * kSplitTokens;
  const bool widen = tile.num_rows > kMicroRows;
  const int32_t chunk = widen ? kChunkTokens : kSplitTokens;
  for (int32_t from = begin; from < last; from += chunk) {
    const int32_t to = last - from < chunk ? last : from + chunk;
    if (widen) widen_keys(paged, from, to, wide);
    for_row_groups(tile.num_rows, [&](auto rows, int row) {
      const int32_t group_end = end_of_rows(tile, row, rows, begin);
      const int32_t end = group_end < to ? group_end : to;
      if (end <= from) return;
      if (widen) {
        score_rows<rows>(WideTokens{wide, from, head_dim}, tile, head_dim, row, from, end, begin, scratch);
      } else {
        score_rows<rows>(paged, tile, head_dim, row, from, end, begin, scratch);
      }
    });
  }
  for_row_groups(tile.num_rows, [&](auto rows, int row) {
    weigh_rows<rows>(tile, row, begin, end_of_rows(tile, row, rows, begin), states, scratch);
  });
  for (int32_t from = begin; from < last; from += chunk) {
    const int32_t to = last - from < chunk ? last : from + chunk;
    if (widen) widen_values(paged, from, to, wide);
    for_row_groups(tile.num_rows, [&](auto rows, int row) {
      const int32_t group_end = end_of_rows(tile, row, rows, begin);
      const int32_t end = group_end < to ? group_end : to;
      if (end <= from) return;
      if (widen) {
        sum_rows<rows>(WideTokens{wide, from, head_dim}, head_dim, row, from, end, begin, scratch, states);
      } else {
        sum_rows<rows>(paged, head_dim, row, from, end, begin, scratch, states);
      }
    });
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
  const F32x16 keep = exp(F32x16::broadcast(total->max - top));
  const F32x16 add = exp(F32x16::broadcast(part.max - top));
  for (int32_t d = 0; d < head_dim; d += 16) {
    fma(F32x16::load(total->values + d), keep, F32x16::load(part.values + d) * add).store(total->values + d);
  }
  total->sum = total->sum * first_lane(keep) + part.sum * first_lane(add);
  total->max = top;
}

void finish_attention(const AttentionState& state, int32_t head_dim, float* out) {
  const F32x16 factor = F32x16::broadcast(1.0f / state.sum);
  for (int32_t d = 0; d < head_dim; d += 16) (F32x16::load(state.values + d) * factor).store(out + d);
}

}  // namespace tw::cpu::TW_ISA
