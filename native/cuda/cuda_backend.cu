#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/activations.h"
#include "cuda/check.h"
#include "cuda/fault.h"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/packed_matrix.h"
#include "cuda/sampler.h"
#include "cuda/step_inputs.h"

namespace tw::cuda {
namespace {

__global__ void presence_kernel() {}

// Shared memory for the inputs of few tokens, and what their kernels need beside it.
constexpr int64_t kMostStagedBytes = int64_t{80} << 10;
constexpr int64_t kBesideStagedBytes = int64_t{34} << 10;
constexpr size_t kPartialBytes = size_t{64} << 20;

int64_t padded(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The rows that a captured step is padded to.
int32_t bucket_of(int32_t rows) {
  if (rows <= 2) return rows;
  if (rows <= 8) return rows <= 4 ? 4 : 8;
  if (rows <= 64) return (rows + 7) / 8 * 8;
  return (rows + 31) / 32 * 32;
}

int32_t round_up_to_power_of_two(int32_t value) {
  int32_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// A norm's gain, zero padded to a multiple of 64.
struct GainVector {
  DeviceBuffer values;
  int32_t size;
  float factor;  // power of two that keeps gain · x / rms(x) below half of FP16's largest value
};

// A step is recorded once for each (rows, key splits) that decoding meets and replayed from then on: in a replayed step
// the operations do nothing, and project_logits() launches what they were.
enum class StepMode { kDirect, kRecord, kReplay };

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int32_t device) : device_(device), tracker_(device) {
    use_device();
    stream_ = std::make_unique<Stream>();
    packer_ = std::make_unique<Packer>(&tracker_);
  }
  ~CudaBackend() override { (void)cudaSetDevice(device_); }

  MatrixHandle add_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias) override {
    use_device();
    return keep(packer_->pack_matrix(parts, bias));
  }
  MatrixHandle add_gate_up(const MatrixSource& gate, const MatrixSource& up) override {
    use_device();
    return keep(packer_->pack_gate_up(gate, up));
  }
  VectorHandle add_vector(const std::vector<float>& values) override;
  void prepare(const ModelShape& shape, const StepLimits& limits) override;
  void allocate_kv(int32_t num_blocks) override;
  void begin_step(const StepPlan& plan) override;
  void embed(MatrixHandle table) override;
  void project_qkv(VectorHandle gain, MatrixHandle qkv) override;
  void rope_append(int32_t layer) override;
  void attend(int32_t layer, MatrixHandle reader) override;
  void project_add(Activation input, MatrixHandle matrix) override;
  void feed_forward_up(VectorHandle gain, MatrixHandle gate_up) override;
  void project_logits(VectorHandle gain, MatrixHandle head) override;
  void draw(const std::vector<SampleJob>& jobs) override;
  void take_draws(std::vector<SampleResult>* results) override;
  bool computes_beside_host() const override { return true; }
  bool runs_ahead() const override { return true; }
  bool supports_masks() const override { return true; }
  void read_logits(int32_t index, float* out) override;
  void abandon_step() override;
  DeviceInfo device_info() const override;
  MemoryUse memory_use() const override { return tracker_.use(); }
  int64_t free_bytes() const override {
    use_device();
    return MemoryTracker::free_bytes();
  }
  std::string check_residency() const override {
    use_device();
    return tracker_.check_residency();
  }
  void inject(Fault fault) override;

 private:
  // The driver's idea of the current device belongs to the thread, and the engine's thread is not the loader's.
  void use_device() const { TW_CUDA_CHECK(cudaSetDevice(device_)); }
  MatrixHandle keep(PackedMatrix matrix) {
    matrices_.push_back(std::move(matrix));
    return {static_cast<int32_t>(matrices_.size() - 1)};
  }
  const PackedMatrix& matrix(MatrixHandle handle) const { return matrices_[static_cast<size_t>(handle.index)]; }
  void drop_recording();
  const GainVector& gain(VectorHandle handle) const { return gains_[static_cast<size_t>(handle.index)]; }

  template <class T>
  DeviceBuffer workspace(int64_t count) {
    return {&tracker_, Purpose::kWorkspace, static_cast<size_t>(count) * sizeof(T)};
  }
  // Few rows are normalised and scaled by the matrix products themselves, if they fit into shared memory.
  bool fuses_inputs() const {
    const int64_t widest = std::max({hidden_stride_, ffn_stride_});
    return rows_ <= kFusedTokens && rows_ * (widest + 64) * 2 <= most_staged_bytes_;
  }
  void run(const PackedMatrix& matrix, MatmulTask task);
  MatmulTask normed_input(VectorHandle gain, const PackedMatrix& matrix, const int32_t* rows, int32_t num_tokens);
  AttentionTask attention_task(int32_t layer) const;

  const int32_t device_;
  MemoryTracker tracker_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Packer> packer_;
  std::vector<PackedMatrix> matrices_;
  std::vector<GainVector> gains_;

  ModelShape shape_;
  StepLimits limits_;
  int64_t most_staged_bytes_ = 0;
  int64_t hidden_stride_ = 0;
  int64_t square_stride_ = 0;
  int64_t qkv_stride_ = 0;
  int64_t attention_stride_ = 0;
  int64_t ffn_stride_ = 0;
  int64_t logits_stride_ = 0;
  int64_t kv_layer_values_ = 0;
  DeviceBuffer rope_cos_, rope_sin_;
  DeviceBuffer kv_;
  DeviceBuffer hidden_;         // FP32 [rows, hidden_stride]
  DeviceBuffer square_sums_;    // FP32 [rows, square_stride]: sums of squares of each 16 hidden values
  DeviceBuffer normed_;         // FP16 [rows, hidden_stride]
  DeviceBuffer token_factors_;  // FP32 [rows]
  DeviceBuffer qkv_;            // FP32 [rows, qkv_stride]
  DeviceBuffer queries_;        // FP16 [rows, attention_stride], rotated
  DeviceBuffer attention_;      // FP16 [rows, attention_stride]
  DeviceBuffer ffn_;            // FP32 [rows, ffn_stride]
  DeviceBuffer ffn_half_;       // FP16 [rows, ffn_stride]
  DeviceBuffer magnitudes_;     // [kFusedTokens] bits of the largest magnitude of each row of ffn_
  DeviceBuffer logits_;         // FP32 [logit rows, logits_stride]
  DeviceBuffer partials_;
  DeviceBuffer arrivals_;
  DeviceBuffer sums_, sum_arrivals_;  // MatmulScratch
  std::unique_ptr<StepInputs> inputs_;
  Sampler sampler_;
  PinnedBuffer foreign_weights_;  // of an injected fault

  StepMode mode_ = StepMode::kDirect;
  std::pair<int32_t, int32_t> graph_key_;
  std::map<std::pair<int32_t, int32_t>, GraphExec> graphs_;
  int32_t rows_ = 0;  // of this step, padded
  int32_t logit_rows_ = 0;
  int32_t max_splits_ = 1;
  bool one_row_each_ = false;
  bool all_rows_wanted_ = false;  // logit row i is row i
};

VectorHandle CudaBackend::add_vector(const std::vector<float>& values) {
  use_device();
  GainVector vector;
  vector.size = static_cast<int32_t>(values.size());
  vector.values =
      DeviceBuffer(&tracker_, Purpose::kWeights, static_cast<size_t>(padded(vector.size, 64)) * sizeof(float));
  TW_CUDA_CHECK(
      cudaMemcpy(vector.values.as<float>(), values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice));
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  const double bound = std::sqrt(static_cast<double>(vector.size)) * largest;
  const int excess = bound > 32768.0 ? static_cast<int>(std::ceil(std::log2(bound / 32768.0))) : 0;
  vector.factor = std::ldexp(1.0f, -excess);
  gains_.push_back(std::move(vector));
  return {static_cast<int32_t>(gains_.size() - 1)};
}

void CudaBackend::prepare(const ModelShape& shape, const StepLimits& limits) {
  use_device();
  packer_.reset();
  if (!supports_head_dim(shape.head_dim)) {
    throw Error(ErrorCode::kUnsupportedModel,
                "the CUDA backend has no attention for heads of " + std::to_string(shape.head_dim));
  }
  shape_ = shape;
  limits_ = limits;
  most_staged_bytes_ = std::min(kMostStagedBytes, static_cast<int64_t>(max_shared_bytes()) - kBesideStagedBytes);
  const int64_t rows = std::max(limits.max_rows, limits.max_logit_rows);
  const int64_t attention_size = int64_t{shape.num_heads} * shape.head_dim;
  hidden_stride_ = padded(shape.hidden_size, 64);
  square_stride_ = padded(hidden_stride_ / 16, 16);
  qkv_stride_ = attention_size + int64_t{2} * shape.num_kv_heads * shape.head_dim;
  attention_stride_ = padded(attention_size, 64);
  ffn_stride_ = padded(shape.ffn_size, 64);
  logits_stride_ = padded(shape.vocab_size, 4);

  kv_layer_values_ = int64_t{2} * shape.num_kv_heads * shape.head_dim * kBlockTokens;
  const auto upload = [&](const std::vector<float>& values) {
    DeviceBuffer buffer = workspace<float>(static_cast<int64_t>(values.size()));
    TW_CUDA_CHECK(cudaMemcpy(buffer.as<float>(), values.data(), buffer.size(), cudaMemcpyHostToDevice));
    return buffer;
  };
  rope_cos_ = upload(shape.rope_cos);
  rope_sin_ = upload(shape.rope_sin);
  hidden_ = workspace<float>(rows * hidden_stride_);
  square_sums_ = workspace<float>(rows * square_stride_);
  const int64_t padded_rows = padded(rows, kTokenPadding);
  normed_ = workspace<__half>(padded_rows * hidden_stride_);
  token_factors_ = workspace<float>(rows);
  qkv_ = workspace<float>(rows * qkv_stride_);
  queries_ = workspace<__half>(rows * attention_stride_);
  attention_ = workspace<__half>(padded_rows * attention_stride_);
  ffn_ = workspace<float>(rows * ffn_stride_);
  ffn_half_ = workspace<__half>(padded_rows * ffn_stride_);
  magnitudes_ = workspace<uint32_t>(kFusedTokens);
  logits_ = workspace<float>(limits.max_logit_rows * logits_stride_);
  partials_ = DeviceBuffer(&tracker_, Purpose::kWorkspace, kPartialBytes);
  arrivals_ = workspace<int32_t>(rows * shape.num_heads);
  sums_ = DeviceBuffer(&tracker_, Purpose::kWorkspace, kScratchBytes);
  sum_arrivals_ = workspace<int32_t>(kScratchArrivals);
  inputs_ = std::make_unique<StepInputs>(&tracker_, shape, limits);
  sampler_ = Sampler(&tracker_, limits.max_logit_rows, shape.vocab_size);
  TW_CUDA_CHECK(cudaDeviceSynchronize());
}

void CudaBackend::allocate_kv(int32_t num_blocks) {
  use_device();
  kv_ = DeviceBuffer(&tracker_, Purpose::kKv,
                     static_cast<size_t>(kv_layer_values_ * shape_.num_layers * num_blocks) * sizeof(__half));
  TW_CUDA_CHECK(cudaDeviceSynchronize());
}

// Ends the recording of a step that failed while it was recorded.
void CudaBackend::drop_recording() {
  if (mode_ == StepMode::kRecord) {
    cudaGraph_t graph = nullptr;
    (void)cudaStreamEndCapture(stream_->get(), &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();  // what went wrong with it was reported then
  }
  mode_ = StepMode::kDirect;
}

void CudaBackend::abandon_step() {
  use_device();
  drop_recording();
  stream_->synchronize();
  graphs_.clear();
}

void CudaBackend::begin_step(const StepPlan& plan) {
  use_device();
  drop_recording();
  rows_ = plan.num_rows();
  logit_rows_ = static_cast<int32_t>(plan.logit_rows.size());
  one_row_each_ = static_cast<int32_t>(plan.slices.size()) == rows_;
  all_rows_wanted_ = logit_rows_ == rows_;
  max_splits_ = 1;
  for (const SequenceSlice& slice : plan.slices) {
    if (slice.num_rows > kFewRows) continue;
    max_splits_ = std::max(max_splits_, (slice.position + slice.num_rows + kSplitKeys - 1) / kSplitKeys);
  }
  const int32_t bucket = bucket_of(rows_);
  const bool captured =
      one_row_each_ && all_rows_wanted_ && bucket <= limits_.max_rows && bucket <= limits_.max_logit_rows;
  if (captured) {
    rows_ = logit_rows_ = bucket;
    max_splits_ = round_up_to_power_of_two(max_splits_);
  }
  const int32_t tile_rows =
      one_row_each_ ? 0 : prefill_tile_rows(shape_.num_heads, shape_.num_kv_heads, shape_.head_dim);
  inputs_->upload(plan, rows_, tile_rows, sampler_.drawn(), stream_->get());
  if (!captured) return;
  graph_key_ = {bucket, max_splits_};
  if (graphs_.count(graph_key_) != 0) {
    mode_ = StepMode::kReplay;
  } else {
    TW_CUDA_CHECK(cudaStreamBeginCapture(stream_->get(), cudaStreamCaptureModeThreadLocal));
    mode_ = StepMode::kRecord;
  }
}

void CudaBackend::embed(MatrixHandle table) {
  if (mode_ == StepMode::kReplay) return;
  for (const PackedPart& part : matrix(table).parts) {
    kernels_for(part.dtype)
        .embed(part, inputs_->token_ids(), rows_, hidden_.as<float>(), hidden_stride_, square_sums_.as<float>(),
               static_cast<int32_t>(square_stride_), stream_->get());
  }
}

// The input of a product with `matrix`: `rows` of hidden (null for all), normalised here for many tokens and on the fly
// for few.
MatmulTask CudaBackend::normed_input(VectorHandle handle, const PackedMatrix& matrix, const int32_t* rows,
                                     int32_t num_tokens) {
  const GainVector& vector = gain(handle);
  MatmulTask task{};
  task.num_tokens = num_tokens;
  task.input_stride = hidden_stride_;
  if (fuses_inputs() && num_tokens <= kFusedTokens) {
    task.input_kind = Input::kNormed;
    task.input = hidden_.as<float>();
    task.input_rows = rows;
    task.gain = vector.values.as<float>();
    task.input_square_sums = square_sums_.as<float>();
    task.square_stride = static_cast<int32_t>(square_stride_);
    task.inverse_size = 1.0f / static_cast<float>(vector.size);
    task.epsilon = shape_.rms_eps;
    task.gain_factor = vector.factor;
    return task;
  }
  NormTask norm{};
  norm.input = hidden_.as<float>();
  norm.rows = rows;
  norm.input_stride = hidden_stride_;
  norm.num_tokens = num_tokens;
  norm.square_stride = static_cast<int32_t>(square_stride_);
  norm.inverse_size = 1.0f / static_cast<float>(vector.size);
  norm.epsilon = shape_.rms_eps;
  norm.gain_factor = vector.factor;
  norm.gain = vector.values.as<float>();
  norm.out = normed_.as<__half>();
  norm.tiled = takes_tiles(matrix.parts[0], num_tokens);
  norm.token_factors = token_factors_.as<float>();
  norm.stream = stream_->get();
  normalize(norm);
  task.input_kind = Input::kHalf;
  task.tiled = norm.tiled;
  task.input = normed_.as<__half>();
  task.token_factors = token_factors_.as<float>();
  return task;
}

void CudaBackend::run(const PackedMatrix& packed, MatmulTask task) {
  task.stream = stream_->get();
  task.bias = packed.bias.as<float>();
  // Parts in different formats are products that run side by side, each with a share of the scratch memory.
  const auto num_parts = static_cast<int32_t>(packed.parts.size());
  const int64_t floats = static_cast<int64_t>(sums_.size() / sizeof(float)) / num_parts;
  const int32_t arrivals = kScratchArrivals / num_parts;
  for (int32_t i = 0; i < num_parts; ++i) {
    task.part = packed.parts[static_cast<size_t>(i)];
    task.scratch = {sums_.as<float>() + i * floats, floats, sum_arrivals_.as<int32_t>() + i * arrivals, arrivals};
    task.beside = {i > 0, i + 1 < num_parts};
    matmul(task);
    task.magnitudes_to_clear = nullptr;  // which the first does
  }
}

void CudaBackend::project_qkv(VectorHandle gain, MatrixHandle qkv) {
  if (mode_ == StepMode::kReplay) return;
  MatmulTask task = normed_input(gain, matrix(qkv), nullptr, rows_);
  task.epilogue = Epilogue::kStore;
  task.out = qkv_.as<float>();
  task.out_stride = qkv_stride_;
  if (fuses_inputs()) task.magnitudes_to_clear = magnitudes_.as<uint32_t>();
  run(matrix(qkv), task);
}

AttentionTask CudaBackend::attention_task(int32_t layer) const {
  AttentionTask task{};
  task.num_heads = shape_.num_heads;
  task.num_kv_heads = shape_.num_kv_heads;
  task.head_dim = shape_.head_dim;
  task.interleaved = shape_.rope == RopeKind::kInterleaved;
  task.rope_dims = shape_.rope_dims;
  task.rope_cos = rope_cos_.as<float>();
  task.rope_sin = rope_sin_.as<float>();
  task.qkv_stride = qkv_stride_;
  task.cache = kv_.as<__half>() + layer * kv_layer_values_;
  task.block_stride = kv_layer_values_ * shape_.num_layers;
  task.max_splits = max_splits_;
  task.append = one_row_each_;
  task.queries = queries_.as<__half>();
  task.query_stride = attention_stride_;
  task.partials = partials_.as<float>();
  task.arrivals = arrivals_.as<int32_t>();
  task.out_stride = attention_stride_;
  task.stream = stream_->get();
  return task;
}

// Where each sequence has one row, attend() writes its key and value itself.
void CudaBackend::rope_append(int32_t layer) {
  if (mode_ == StepMode::kReplay || one_row_each_) return;
  AttentionTask task = attention_task(layer);
  task.step = inputs_->rows(0);
  task.num_rows = rows_;
  task.qkv = qkv_.as<float>();
  tw::cuda::rope_append(task);
}

void CudaBackend::attend(int32_t layer, MatrixHandle reader) {
  if (mode_ == StepMode::kReplay) return;
  AttentionTask task = attention_task(layer);
  const int64_t row_bytes = int64_t{4} * shape_.num_heads * max_splits_ * (shape_.head_dim + 2);
  const int64_t fitting = std::max<int64_t>(1, static_cast<int64_t>(kPartialBytes) / row_bytes);
  if (row_bytes > static_cast<int64_t>(kPartialBytes)) {
    throw Error(ErrorCode::kUnsupportedModel, "the context is too long for the CUDA backend's attention");
  }
  const int32_t num_rows = one_row_each_ ? rows_ : inputs_->num_single_rows();
  const auto rows_per_launch = static_cast<int32_t>(std::min<int64_t>(fitting, 32768));
  task.qkv = qkv_.as<float>();
  task.out = attention_.as<__half>();
  task.tiled_out = takes_tiles(matrix(reader).parts[0], rows_);
  task.step = inputs_->rows(0);
  for (int32_t first = 0; first < num_rows; first += rows_per_launch) {
    task.num_rows = std::min(rows_per_launch, num_rows - first);
    task.first_row = first;
    task.single_rows = one_row_each_ ? nullptr : inputs_->single_rows();
    attend_decode(task);
  }
  task.row_tiles = inputs_->row_tiles();
  task.num_row_tiles = one_row_each_ ? 0 : inputs_->num_row_tiles();
  if (task.num_row_tiles > 0) attend_prefill(task);
}

void CudaBackend::project_add(Activation input, MatrixHandle handle) {
  if (mode_ == StepMode::kReplay) return;
  MatmulTask task{};
  task.epilogue = Epilogue::kAdd;
  task.num_tokens = rows_;
  task.out = hidden_.as<float>();
  task.out_stride = hidden_stride_;
  if (fuses_inputs()) {
    task.square_sums = square_sums_.as<float>();
    task.square_stride_out = static_cast<int32_t>(square_stride_);
  }
  task.input_kind = Input::kHalf;
  task.tiled = takes_tiles(matrix(handle).parts[0], rows_);
  if (input == Activation::kAttention) {
    task.input = attention_.as<__half>();
    task.input_stride = attention_stride_;
  } else if (fuses_inputs()) {
    task.input_kind = Input::kScaled;
    task.input = ffn_.as<float>();
    task.input_stride = ffn_stride_;
    task.input_magnitudes = magnitudes_.as<uint32_t>();
  } else {
    scale_to_half(ffn_.as<float>(), ffn_stride_, rows_, task.tiled, ffn_half_.as<__half>(), token_factors_.as<float>(),
                  stream_->get());
    task.input = ffn_half_.as<__half>();
    task.input_stride = ffn_stride_;
    task.token_factors = token_factors_.as<float>();
  }
  run(matrix(handle), task);
}

void CudaBackend::feed_forward_up(VectorHandle gain, MatrixHandle gate_up) {
  if (mode_ == StepMode::kReplay) return;
  MatmulTask task = normed_input(gain, matrix(gate_up), nullptr, rows_);
  task.epilogue = Epilogue::kGateUp;
  task.out = ffn_.as<float>();
  task.out_stride = ffn_stride_;
  if (fuses_inputs()) task.magnitudes = magnitudes_.as<uint32_t>();
  run(matrix(gate_up), task);
}

void CudaBackend::project_logits(VectorHandle gain, MatrixHandle head) {
  if (mode_ != StepMode::kReplay) {
    MatmulTask task = normed_input(gain, matrix(head), all_rows_wanted_ ? nullptr : inputs_->logit_rows(), logit_rows_);
    task.epilogue = Epilogue::kStore;
    task.out = logits_.as<float>();
    task.out_stride = logits_stride_;
    run(matrix(head), task);
  }
  if (mode_ == StepMode::kDirect) return;
  if (mode_ == StepMode::kRecord) {
    mode_ = StepMode::kDirect;
    graphs_.emplace(graph_key_, GraphExec::end_capture(stream_->get()));
  }
  graphs_.at(graph_key_).launch(stream_->get());
}

void CudaBackend::draw(const std::vector<SampleJob>& jobs) {
  use_device();
  sampler_.draw(logits_.as<float>(), logits_stride_, jobs, stream_->get());
}

void CudaBackend::take_draws(std::vector<SampleResult>* results) {
  use_device();
  sampler_.take(results);
}

DeviceInfo CudaBackend::device_info() const {
  cudaDeviceProp properties;
  TW_CUDA_CHECK(cudaGetDeviceProperties(&properties, device_));
  int runtime = 0;
  TW_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  return {"cuda:" + std::to_string(device_), properties.name, properties.major * 10 + properties.minor,
          std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10)};
}

void CudaBackend::inject(Fault fault) {
  use_device();
  switch (fault) {
    case Fault::kOutOfMemory: exhaust_memory(&tracker_); break;
    case Fault::kDeviceError: spoil_device(stream_->get()); break;
    case Fault::kHostMemory: foreign_weights_ = make_foreign_weights(&tracker_); break;
  }
}

void CudaBackend::read_logits(int32_t index, float* out) {
  use_device();
  TW_CUDA_CHECK(cudaMemcpyAsync(out, logits_.as<float>() + index * logits_stride_,
                                static_cast<size_t>(shape_.vocab_size) * sizeof(float), cudaMemcpyDeviceToHost,
                                stream_->get()));
  stream_->synchronize();
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(int32_t device) {
  const std::string name = "device cuda:" + std::to_string(device);
  int count = 0;
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (counted != cudaSuccess) {
    throw Error(ErrorCode::kUnavailable, name + " is not usable: " + cudaGetErrorString(counted));
  }
  if (device < 0 || device >= count) {
    throw Error(ErrorCode::kUnavailable,
                name + " is not there: this machine has " +
                    (count == 1 ? "only cuda:0" : "cuda:0 to cuda:" + std::to_string(count - 1)));
  }
  cudaDeviceProp properties;
  TW_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  const std::string named = name + " (" + properties.name + ")";
  // Takes the device: makes this process's context on it.
  cudaError_t taken = cudaSetDevice(device);
  if (taken == cudaSuccess) taken = cudaFree(nullptr);
  if (taken == cudaErrorMemoryAllocation) {
    throw Error(ErrorCode::kInsufficientVram, named + " has not even memory for a context");
  }
  if (taken != cudaSuccess) {
    throw Error(ErrorCode::kUnavailable, named + " is busy or not usable: " + cudaGetErrorString(taken));
  }
  cudaFuncAttributes attributes;
  const cudaError_t present = cudaFuncGetAttributes(&attributes, presence_kernel);
  if (present == cudaErrorNoKernelImageForDevice || present == cudaErrorInvalidDeviceFunction ||
      present == cudaErrorUnsupportedPtxVersion) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::kUnavailable, named + " has compute capability " + std::to_string(properties.major) + "." +
                                             std::to_string(properties.minor) +
                                             ", and this build has code for 8.0 and newer only");
  }
  TW_CUDA_CHECK(present);
  return std::make_unique<CudaBackend>(device);
}

}  // namespace tw::cuda
