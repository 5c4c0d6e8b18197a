// Decoder-only transformers of the Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.
#pragma once

#include "models/loader.h"
#include "models/model.h"

namespace tw {

// What distinguishes the members of the family.
struct LlamaVariant {
  RopeKind rope;
  bool qkv_bias;  // required; otherwise used where the file has one
};

std::unique_ptr<Model> load_llama_family(Loader* loader, int32_t max_context, const LlamaVariant& variant);

}  // namespace tw
