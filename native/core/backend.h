// What a device must do for a model: hold weights and the paged KV cache, and run the fused operations of one step.
//
// A model (native/models) is written once against this interface; native/cpu and native/cuda implement it. The
// activations are the backend's own and each has one meaning (see Activation), so a model says only which weights to
// use in which order. Every operation obeys docs/determinism.md: an output row depends on its own input row, the
// weights and the model's shape, never on the other rows of the step.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/sampling.h"
#include "core/step.h"

namespace tw {

// A row-major matrix as it lies in the model file: [num_rows, num_cols], each row a whole number of blocks.
struct MatrixSource {
  DType dtype;
  int64_t num_rows;  // outputs
  int64_t num_cols;  // inputs
  const void* data;  // valid during the call it is passed to
};

// Indexes a backend's weights.
struct MatrixHandle {
  int32_t index = -1;
};
struct VectorHandle {
  int32_t index = -1;
};

// How rotary position embedding pairs the dimensions of a head.
enum class RopeKind {
  kInterleaved,  // (0,1), (2,3), … (GGUF's `llama` files)
  kHalfSplit,    // (0, d/2), (1, d/2+1), … (GPT-NeoX; `qwen2`)
};

struct ModelShape {
  int32_t vocab_size = 0;
  int32_t context_length = 0;
  int32_t num_layers = 0;
  int32_t hidden_size = 0;
  int32_t ffn_size = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float rms_eps = 0;
  RopeKind rope = RopeKind::kInterleaved;
  int32_t rope_dims = 0;        // leading dimensions of a head that are rotated
  std::vector<float> rope_cos;  // [context_length, rope_dims / 2]
  std::vector<float> rope_sin;  // the same shape

  // Bytes of FP16 keys and values that one token takes in all layers.
  int64_t kv_bytes_per_token() const { return int64_t{2} * 2 * num_layers * num_kv_heads * head_dim; }
};

// The most a step can hold, fixed when the backend is prepared.
struct StepLimits {
  int32_t max_rows = 0;        // tokens in a step
  int32_t max_logit_rows = 0;  // rows whose logits are wanted
};

// Bytes in use, by purpose.
struct MemoryUse {
  int64_t weight_bytes = 0;
  int64_t kv_bytes = 0;
  int64_t workspace_bytes = 0;
};

// Where a backend computes.
struct DeviceInfo {
  std::string id;               // `cpu` or `cuda:N`
  std::string name;             // as its driver names it; empty for the CPU
  int32_t sm = 0;               // compute capability, major × 10 + minor; 0 for the CPU
  std::string runtime_version;  // of CUDA, such as `13.0`; empty for the CPU
};

// What tests make a device suffer (FaultPlan).
enum class Fault {
  kOutOfMemory,  // a step asks for memory that there is not
  kDeviceError,  // the device fails and stays failed
  kHostMemory,   // something that the device computes from lies outside its memory
};

// The input of a projection.
enum class Activation {
  kAttention,    // [rows, num_heads * head_dim], the output of attend()
  kFeedForward,  // [rows, ffn_size], the output of feed_forward_up()
};

class Backend {
 public:
  virtual ~Backend() = default;

  // --- Loading. Sources are copied, still quantised, into the device's layout. ---

  // The matrices' rows one after another; they share num_cols and may differ in format. `bias` is empty or has one
  // value a row.
  virtual MatrixHandle add_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias) = 0;
  // Two matrices of the same shape and format whose rows are used in pairs by feed_forward_up().
  virtual MatrixHandle add_gate_up(const MatrixSource& gate, const MatrixSource& up) = 0;
  virtual VectorHandle add_vector(const std::vector<float>& values) = 0;
  // Allocates the activations. Called once, after all weights.
  virtual void prepare(const ModelShape& shape, const StepLimits& limits) = 0;
  // Allocates the KV pool. Called once, after prepare(), so that free_bytes() says what is left for it.
  virtual void allocate_kv(int32_t num_blocks) = 0;

  // --- One step. `plan` outlives it. ---

  virtual void begin_step(const StepPlan& plan) = 0;
  // hidden[r] = table[token_ids[r]]
  virtual void embed(MatrixHandle table) = 0;
  // qkv = W · rms_norm(hidden, gain) + bias
  virtual void project_qkv(VectorHandle gain, MatrixHandle qkv) = 0;
  // Rotates q and k by their positions and writes k and v to the sequences' blocks.
  virtual void rope_append(int32_t layer) = 0;
  // attention = softmax(q · kᵀ / √head_dim) · v over each row's own sequence up to its position. `reader` is the matrix
  // that project_add() will multiply it with.
  virtual void attend(int32_t layer, MatrixHandle reader) = 0;
  // hidden += W · activation
  virtual void project_add(Activation input, MatrixHandle matrix) = 0;
  // feed_forward = silu(G · n) ∘ (U · n) with n = rms_norm(hidden, gain)
  virtual void feed_forward_up(VectorHandle gain, MatrixHandle gate_up) = 0;
  // logits[i] = W · rms_norm(hidden[logit_rows[i]], gain)
  virtual void project_logits(VectorHandle gain, MatrixHandle head) = 0;
  // Has a token drawn from each wanted row's logits. `jobs` has one entry a logit row and is not read afterwards.
  virtual void draw(const std::vector<SampleJob>& jobs) = 0;
  // Waits for the oldest draw() that was not taken yet; one result a job.
  virtual void take_draws(std::vector<SampleResult>* results) = 0;
  // Whether the device computes by itself between these calls, so that the host can use the time.
  virtual bool computes_beside_host() const { return false; }
  // Whether a step may begin before the draws of the one before were taken, and name them as its tokens.
  virtual bool runs_ahead() const { return false; }
  // Whether draw() heeds SampleJob::mask.
  virtual bool supports_masks() const { return false; }
  // Copies logit row `index` of the step, [vocab_size], for tests and tools.
  virtual void read_logits(int32_t index, float* out) = 0;

  // A step ended with kVramOom: drops what it began and gives back what can be made again.
  virtual void abandon_step() = 0;

  // --- What it is and holds. ---

  virtual DeviceInfo device_info() const = 0;
  virtual MemoryUse memory_use() const = 0;
  // Bytes that can still be allocated.
  virtual int64_t free_bytes() const = 0;
  // Empty if all that the device computes from lies in its own memory, else what does not. Asks the driver, and may be
  // called from any thread, during a step too.
  virtual std::string check_residency() const = 0;
  // Makes the device suffer a fault now. Throws what the fault would make a step throw, at once or in a later
  // operation.
  virtual void inject(Fault fault) = 0;
};

}  // namespace tw
