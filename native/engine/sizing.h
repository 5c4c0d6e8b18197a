// How large an engine is made on its device: what its options leave open, and the KV pool.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "engine/engine.h"
#include "gguf/file.h"

namespace tw {

// The options with every 0 replaced by what suits the device.
EngineOptions resolve(EngineOptions options, const DeviceInfo& device);

// Tokens that the KV pool should hold if there is room: on a CPU the larger of a full context and 32,768, on a GPU a
// full context for every running job.
int64_t wanted_kv_tokens(const ModelShape& shape, const EngineOptions& resolved, const DeviceInfo& device);

// Blocks of a KV pool of `kv_cache_bytes`, or for 0 of one that holds `wanted_tokens` but takes at most a quarter of a
// CPU's free memory or nine tenths of a GPU's. Throws Error(kInsufficientVram) with the bytes required and available.
int32_t choose_kv_blocks(const ModelShape& shape, int64_t kv_cache_bytes, int64_t wanted_tokens,
                         const Backend& backend);

// Throws Error(kInsufficientVram) if the file's tensors alone are more than the device can hold, before any is copied.
void require_memory_for_weights(const gguf::File& file, const Backend& backend);

}  // namespace tw
