// The architectures, one row each.
#include <string>

#include "core/error.h"
#include "models/llama.h"

namespace tw {
namespace {

struct Architecture {
  const char* name;  // general.architecture
  LlamaVariant variant;
};

constexpr Architecture kArchitectures[] = {
    {"llama", {RopeKind::kInterleaved, false}},
    {"qwen2", {RopeKind::kHalfSplit, true}},
};

}  // namespace

std::unique_ptr<Model> load_model(const gguf::File& file, Backend* backend, int32_t max_context,
                                  const std::function<void(int)>& on_progress) {
  const std::string name(file.metadata().get_string("general.architecture"));
  for (const Architecture& row : kArchitectures) {
    if (name != row.name) continue;
    Loader loader(file, backend, name, on_progress);
    std::unique_ptr<Model> model = load_llama_family(&loader, max_context, row.variant);
    loader.finish();
    return model;
  }
  std::string known;
  for (const Architecture& row : kArchitectures) known += (known.empty() ? "" : ", ") + std::string(row.name);
  throw Error(ErrorCode::kUnsupportedModel, "architecture `" + name + "` is not supported (known: " + known + ")");
}

}  // namespace tw
