// Rotary position embedding (Su et al. 2021) and the write of keys and values to the paged cache.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {

namespace {

// (x, y) → (x·cos - y·sin, y·cos + x·sin) for every pair.
void rotate(float* head, int32_t rope_dims, bool interleaved, const float* cos, const float* sin) {
  const int32_t half = rope_dims / 2;
  const int32_t step = interleaved ? 2 : 1;
  const int32_t partner = interleaved ? 1 : half;
  for (int32_t i = 0; i < half; ++i) {
    float* a = head + step * i;
    const float x = a[0];
    const float y = a[partner];
    a[0] = x * cos[i] - y * sin[i];
    a[partner] = y * cos[i] + x * sin[i];
  }
}

// The same, 16 values at a time: `twice_cos` and `signed_sin` hold each angle's cosine twice, and its sine negated and
// plain.
void rotate_interleaved(float* head, int32_t rope_dims, const float* twice_cos, const float* signed_sin) {
  for (int32_t i = 0; i < rope_dims; i += 16) {
    const F32x16 v = F32x16::load(head + i);
    (v * F32x16::load(twice_cos + i) + swap_pairs(v) * F32x16::load(signed_sin + i)).store(head + i);
  }
}

void rotate_halves(float* head, int32_t rope_dims, const float* cos, const float* sin) {
  const int32_t half = rope_dims / 2;
  for (int32_t i = 0; i < half; i += 16) {
    const F32x16 x = F32x16::load(head + i);
    const F32x16 y = F32x16::load(head + half + i);
    const F32x16 c = F32x16::load(cos + i);
    const F32x16 s = F32x16::load(sin + i);
    (x * c - y * s).store(head + i);
    (y * c + x * s).store(head + half + i);
  }
}

}  // namespace

void rope_heads(float* heads, int32_t num_heads, int32_t head_dim, int32_t rope_dims, bool interleaved,
                const float* cos, const float* sin, float scale) {
  constexpr int32_t kMaxExpanded = 256;
  const bool whole_pairs = interleaved && rope_dims % 16 == 0 && rope_dims <= kMaxExpanded;
  alignas(64) float twice_cos[kMaxExpanded];
  alignas(64) float signed_sin[kMaxExpanded];
  for (int32_t i = 0; whole_pairs && i < rope_dims / 2; ++i) {
    twice_cos[2 * i] = twice_cos[2 * i + 1] = cos[i];
    signed_sin[2 * i] = -sin[i];
    signed_sin[2 * i + 1] = sin[i];
  }
  const F32x16 factor = F32x16::broadcast(scale);
  for (int32_t index = 0; index < num_heads; ++index) {
    float* head = heads + int64_t{index} * head_dim;
    if (whole_pairs) {
      rotate_interleaved(head, rope_dims, twice_cos, signed_sin);
    } else if (!interleaved && rope_dims % 32 == 0) {
      rotate_halves(head, rope_dims, cos, sin);
    } else {
      rotate(head, rope_dims, interleaved, cos, sin);
    }
    for (int32_t i = 0; i < head_dim; i += 16) (F32x16::load(head + i) * factor).store(head + i);
  }
}

// Keys of one slot lie kBlockTokens apart, so they are written one by one.
void store_kv(const KvLayer& layer, int32_t block, int32_t slot, int32_t kv_head, const float* key,
              const float* value) {
  uint16_t* keys = layer.keys(block, kv_head) + slot;
  uint16_t* values = layer.values(block, kv_head) + int64_t{slot} * layer.head_dim;
  for (int32_t d = 0; d < layer.head_dim; d += 16) {
    uint16_t rounded[16];
    F32x16::load(key + d).store_f16(rounded);
#pragma GCC unroll 16
    for (int32_t i = 0; i < 16; ++i) keys[int64_t{d + i} * kBlockTokens] = rounded[i];
    F32x16::load(value + d).store_f16(values + d);
  }
}

}  // namespace tw::cpu::TW_ISA
