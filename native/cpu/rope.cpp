// Rotary position embedding (Su et al. 2021) and the write of keys and values to the paged cache.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {

void rope_head(float* head, int32_t head_dim, int32_t rope_dims, bool interleaved, const float* cos, const float* sin,
               float scale) {
  const int32_t half = rope_dims / 2;
  const int32_t step = interleaved ? 2 : 1;
  const int32_t partner = interleaved ? 1 : half;
  for (int32_t i = 0; i < half; ++i) {
    float* a = head + step * i;
    const float x = a[0];
    const float y = a[partner];
    a[0] = x * cos[i] - y * sin[i];
    a[partner] = x * sin[i] + y * cos[i];
  }
  if (scale == 1.0f) return;
  for (int32_t i = 0; i < head_dim; ++i) head[i] *= scale;
}

void store_kv(const KvLayer& layer, int32_t block, int32_t slot, int32_t kv_head, const float* key,
              const float* value) {
  uint16_t* keys = layer.keys(block, kv_head) + slot;
  uint16_t* values = layer.values(block, kv_head) + int64_t{slot} * layer.head_dim;
  for (int32_t d = 0; d < layer.head_dim; d += 16) {
    uint16_t rounded[16];
    F32x16::load(key + d).store_f16(rounded);
    for (int32_t i = 0; i < 16; ++i) keys[int64_t{d + i} * kBlockTokens] = rounded[i];
    F32x16::load(value + d).store_f16(values + d);
  }
}

}  // namespace tw::cpu::TW_ISA
