#include "models/llama.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace tw {
namespace {

// Angles kept for all positions, 64 MiB of each of sine and cosine: 262,144 tokens of 128-dimensional heads.
constexpr size_t kMaxRopeValues = size_t{1} << 24;

struct Layer {
  VectorHandle attention_norm;  // [hidden]
  MatrixHandle qkv;             // [(heads + 2 kv_heads) · head_dim, hidden]
  MatrixHandle attention_out;   // [hidden, heads · head_dim]
  VectorHandle ffn_norm;        // [hidden]
  MatrixHandle gate_up;         // [ffn, hidden], twice
  MatrixHandle down;            // [hidden, ffn]
};

ModelShape read_shape(Loader* loader, int32_t max_context, const LlamaVariant& variant) {
  ModelShape shape;
  shape.rope = variant.rope;
  shape.context_length = loader->integer("context_length", 1, 1 << 24);
  if (max_context > 0) shape.context_length = std::min(shape.context_length, max_context);
  shape.num_layers = loader->integer("block_count", 1, 1024);
  shape.hidden_size = loader->integer("embedding_length", 32, 1 << 17);
  shape.ffn_size = loader->integer("feed_forward_length", 32, 1 << 20);
  shape.num_heads = loader->integer("attention.head_count", 1, 1024);
  shape.num_kv_heads = loader->integer_or("attention.head_count_kv", 1, 1024, shape.num_heads);
  if (shape.num_heads % shape.num_kv_heads != 0) {
    throw Error(ErrorCode::kModelLoadFailed, std::to_string(shape.num_heads) + " attention heads cannot share " +
                                                 std::to_string(shape.num_kv_heads) + " key-value heads evenly");
  }
  const bool has_head_dim = loader->has("attention.key_length");
  if (!has_head_dim && shape.hidden_size % shape.num_heads != 0) {
    throw Error(ErrorCode::kModelLoadFailed, "an embedding of " + std::to_string(shape.hidden_size) +
                                                 " cannot be split into " + std::to_string(shape.num_heads) + " heads");
  }
  shape.head_dim = loader->integer_or("attention.key_length", 2, 1024, shape.hidden_size / shape.num_heads);
  if (loader->integer_or("attention.value_length", 2, 1024, shape.head_dim) != shape.head_dim) {
    throw Error(ErrorCode::kUnsupportedModel, "keys and values of different length are not supported");
  }
  if (loader->integer_or("expert_count", 0, 1 << 16, 0) != 0) {
    throw Error(ErrorCode::kUnsupportedModel, "mixtures of experts are not supported");
  }
  shape.rms_eps = loader->real_or("attention.layer_norm_rms_epsilon", 1e-12f, 1e-1f, 1e-5f);
  shape.rope_dims =
      loader->integer_or("rope.dimension_count", 2, static_cast<uint32_t>(shape.head_dim), shape.head_dim);
  if (shape.rope_dims % 2 != 0) throw Error(ErrorCode::kModelLoadFailed, "an odd number of rotated dimensions");
  return shape;
}

// Angles position · base^(-2i/dims), divided by the file's factors if it has any (Llama 3's context extension).
void build_rope(Loader* loader, ModelShape* shape) {
  const double base = loader->real_or("rope.freq_base", 1.0f, 1e12f, 10000.0f);
  const std::string scaling = loader->text_or("rope.scaling.type", "none");
  double position_scale = 1.0;
  if (scaling == "linear") {
    position_scale = 1.0 / loader->real_or("rope.scaling.factor", 1.0f, 1e6f, 1.0f);
  } else if (scaling != "none") {
    throw Error(ErrorCode::kUnsupportedModel, "rope scaling `" + scaling + "` is not supported");
  }
  const int32_t half = shape->rope_dims / 2;
  std::vector<float> factors(static_cast<size_t>(half), 1.0f);
  if (loader->has_tensor("rope_freqs.weight")) factors = loader->vector("rope_freqs.weight", half);
  const auto size = static_cast<size_t>(shape->context_length) * static_cast<size_t>(half);
  if (size > kMaxRopeValues) {
    throw Error(ErrorCode::kUnsupportedModel, "a context of " + std::to_string(shape->context_length) +
                                                  " tokens is too long; set a smaller maximum context");
  }
  shape->rope_cos.resize(size);
  shape->rope_sin.resize(size);
  for (int32_t i = 0; i < half; ++i) {
    const double factor = factors[static_cast<size_t>(i)];
    if (!(factor > 0) || !std::isfinite(factor))
      throw Error(ErrorCode::kModelLoadFailed, "a rope factor is not positive");
    const double frequency = std::pow(base, -2.0 * i / shape->rope_dims) / factor * position_scale;
    for (int32_t position = 0; position < shape->context_length; ++position) {
      const auto index = static_cast<size_t>(position) * static_cast<size_t>(half) + static_cast<size_t>(i);
      shape->rope_cos[index] = static_cast<float>(std::cos(position * frequency));
      shape->rope_sin[index] = static_cast<float>(std::sin(position * frequency));
    }
  }
}

class LlamaModel final : public Model {
 public:
  LlamaModel(Loader* loader, int32_t max_context, const LlamaVariant& variant) {
    shape_ = read_shape(loader, max_context, variant);
    build_rope(loader, &shape_);
    load_weights(loader, variant);
    info_.architecture = loader->architecture();
    info_.name = std::string(loader->file().metadata().find_string("general.name").value_or("unnamed"));
    info_.quant_kind = loader->quant_kind();
    info_.context_length = shape_.context_length;
    info_.vocab_size = shape_.vocab_size;
    info_.num_layers = shape_.num_layers;
    info_.weight_bytes = loader->backend()->memory_use().weight_bytes;
    info_.kv_bytes_per_token = shape_.kv_bytes_per_token();
  }

  void forward(Backend* backend, const StepPlan& plan) const override {
    backend->begin_step(plan);
    backend->embed(embedding_);
    for (int32_t i = 0; i < shape_.num_layers; ++i) {
      const Layer& layer = layers_[static_cast<size_t>(i)];
      backend->project_qkv(layer.attention_norm, layer.qkv);
      backend->rope_append(i);
      backend->attend(i, layer.attention_out);
      backend->project_add(Activation::kAttention, layer.attention_out);
      backend->feed_forward_up(layer.ffn_norm, layer.gate_up);
      backend->project_add(Activation::kFeedForward, layer.down);
    }
    if (!plan.logit_rows.empty()) backend->project_logits(output_norm_, head_);
  }

 private:
  void load_weights(Loader* loader, const LlamaVariant& variant);

  MatrixHandle embedding_;  // [vocab, hidden]
  VectorHandle output_norm_;
  MatrixHandle head_;  // [vocab, hidden]; the embedding itself if the file has no output.weight
  std::vector<Layer> layers_;
};

void LlamaModel::load_weights(Loader* loader, const LlamaVariant& variant) {
  Backend* backend = loader->backend();
  const int64_t hidden = shape_.hidden_size;
  const int64_t query = int64_t{shape_.num_heads} * shape_.head_dim;
  const int64_t key = int64_t{shape_.num_kv_heads} * shape_.head_dim;
  const int64_t ffn = shape_.ffn_size;

  const int64_t vocab = loader->num_rows("token_embd.weight");
  if (vocab < 1 || vocab > 1 << 24) throw Error(ErrorCode::kModelLoadFailed, "token_embd.weight has an absurd shape");
  shape_.vocab_size = static_cast<int32_t>(vocab);
  embedding_ = backend->add_matrix({loader->matrix("token_embd.weight", vocab, hidden)}, {});
  loader->packed();

  for (int32_t i = 0; i < shape_.num_layers; ++i) {
    const std::string prefix = "blk." + std::to_string(i) + ".";
    Layer layer;
    layer.attention_norm = backend->add_vector(loader->vector(prefix + "attn_norm.weight", hidden));
    std::vector<float> bias;
    if (variant.qkv_bias || loader->has_tensor(prefix + "attn_q.bias")) {
      for (const auto& [name, size] :
           {std::pair<const char*, int64_t>{"attn_q.bias", query}, {"attn_k.bias", key}, {"attn_v.bias", key}}) {
        const std::vector<float> part = loader->vector(prefix + name, size);
        bias.insert(bias.end(), part.begin(), part.end());
      }
    }
    layer.qkv = backend->add_matrix(
        {loader->matrix(prefix + "attn_q.weight", query, hidden), loader->matrix(prefix + "attn_k.weight", key, hidden),
         loader->matrix(prefix + "attn_v.weight", key, hidden)},
        bias);
    layer.attention_out = backend->add_matrix({loader->matrix(prefix + "attn_output.weight", hidden, query)}, {});
    layer.ffn_norm = backend->add_vector(loader->vector(prefix + "ffn_norm.weight", hidden));
    layer.gate_up = backend->add_gate_up(loader->matrix(prefix + "ffn_gate.weight", ffn, hidden),
                                         loader->matrix(prefix + "ffn_up.weight", ffn, hidden));
    layer.down = backend->add_matrix({loader->matrix(prefix + "ffn_down.weight", hidden, ffn)}, {});
    layers_.push_back(layer);
    loader->packed();
  }

  output_norm_ = backend->add_vector(loader->vector("output_norm.weight", hidden));
  head_ = embedding_;
  if (loader->has_tensor("output.weight")) {
    head_ = backend->add_matrix({loader->matrix("output.weight", vocab, hidden)}, {});
  }
  loader->packed();
}

}  // namespace

std::unique_ptr<Model> load_llama_family(Loader* loader, int32_t max_context, const LlamaVariant& variant) {
  return std::make_unique<LlamaModel>(loader, max_context, variant);
}

}  // namespace tw
