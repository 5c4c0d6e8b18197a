#include "engine/profiling_backend.h"

#include <chrono>

namespace tw {

template <class Op>
void ProfilingBackend::timed(const char* name, int64_t bytes, const Op& op) {
  const auto begin = std::chrono::steady_clock::now();
  op();
  OpProfile& entry = profile_[name];
  ++entry.num_calls;
  entry.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  entry.bytes += bytes;
}

MatrixHandle ProfilingBackend::add_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias) {
  const int64_t before = inner_->memory_use().weight_bytes;
  const MatrixHandle handle = inner_->add_matrix(parts, bias);
  matrix_bytes_.push_back(inner_->memory_use().weight_bytes - before);
  return handle;
}

MatrixHandle ProfilingBackend::add_gate_up(const MatrixSource& gate, const MatrixSource& up) {
  const int64_t before = inner_->memory_use().weight_bytes;
  const MatrixHandle handle = inner_->add_gate_up(gate, up);
  matrix_bytes_.push_back(inner_->memory_use().weight_bytes - before);
  return handle;
}

void ProfilingBackend::prepare(const ModelShape& shape, const StepLimits& limits) {
  kv_bytes_per_token_ = shape.kv_bytes_per_token() / shape.num_layers;
  inner_->prepare(shape, limits);
}

void ProfilingBackend::begin_step(const StepPlan& plan) {
  plan_ = &plan;
  inner_->begin_step(plan);
}

void ProfilingBackend::embed(MatrixHandle table) {
  timed("embed", 0, [&] { inner_->embed(table); });
}

void ProfilingBackend::project_qkv(VectorHandle gain, MatrixHandle qkv) {
  timed("norm + qkv", bytes_of(qkv), [&] { inner_->project_qkv(gain, qkv); });
}

void ProfilingBackend::rope_append(int32_t layer) {
  timed("rope + append", 0, [&] { inner_->rope_append(layer); });
}

void ProfilingBackend::attend(int32_t layer, MatrixHandle reader) {
  int64_t bytes = 0;
  for (const SequenceSlice& slice : plan_->slices) bytes += (slice.position + slice.num_rows) * kv_bytes_per_token_;
  timed("attention", bytes, [&] { inner_->attend(layer, reader); });
}

void ProfilingBackend::project_add(Activation input, MatrixHandle matrix) {
  const char* name = input == Activation::kAttention ? "attention out + residual" : "down + residual";
  timed(name, bytes_of(matrix), [&] { inner_->project_add(input, matrix); });
}

void ProfilingBackend::feed_forward_up(VectorHandle gain, MatrixHandle gate_up) {
  timed("norm + gate·up + silu", bytes_of(gate_up), [&] { inner_->feed_forward_up(gain, gate_up); });
}

void ProfilingBackend::project_logits(VectorHandle gain, MatrixHandle head) {
  timed("norm + head", bytes_of(head), [&] { inner_->project_logits(gain, head); });
}

void ProfilingBackend::draw(const std::vector<SampleJob>& jobs) {
  timed("draw", 0, [&] { inner_->draw(jobs); });
}

}  // namespace tw
