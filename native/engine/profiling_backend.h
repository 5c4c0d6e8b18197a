// A backend that times another one's operations, for benchmarks.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"

namespace tw {

// What one operation did since the last reset.
struct OpProfile {
  int64_t num_calls = 0;
  double seconds = 0;
  int64_t bytes = 0;  // of weights and KV cache that it had to read
};

class ProfilingBackend final : public Backend {
 public:
  explicit ProfilingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  const std::map<std::string, OpProfile>& profile() const { return profile_; }
  void reset_profile() { profile_.clear(); }

  MatrixHandle add_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias) override;
  MatrixHandle add_gate_up(const MatrixSource& gate, const MatrixSource& up) override;
  VectorHandle add_vector(const std::vector<float>& values) override { return inner_->add_vector(values); }
  void prepare(const ModelShape& shape, const StepLimits& limits) override;
  void begin_step(const StepPlan& plan) override;
  void embed(MatrixHandle table) override;
  void project_qkv(VectorHandle gain, MatrixHandle qkv) override;
  void rope_append(int32_t layer) override;
  void attend(int32_t layer, MatrixHandle reader) override;
  void project_add(Activation input, MatrixHandle matrix) override;
  void feed_forward_up(VectorHandle gain, MatrixHandle gate_up) override;
  void project_logits(VectorHandle gain, MatrixHandle head) override;
  void draw(const std::vector<SampleJob>& jobs) override;
  void take_draws(std::vector<SampleResult>* results) override { inner_->take_draws(results); }
  bool supports_masks() const override { return inner_->supports_masks(); }
  void read_logits(int32_t index, float* out) override { inner_->read_logits(index, out); }
  void allocate_kv(int32_t num_blocks) override { inner_->allocate_kv(num_blocks); }
  void abandon_step() override { inner_->abandon_step(); }
  DeviceInfo device_info() const override { return inner_->device_info(); }
  MemoryUse memory_use() const override { return inner_->memory_use(); }
  int64_t free_bytes() const override { return inner_->free_bytes(); }
  std::string check_residency() const override { return inner_->check_residency(); }
  void inject(Fault fault) override { inner_->inject(fault); }

 private:
  template <class Op>
  void timed(const char* name, int64_t bytes, const Op& op);
  int64_t bytes_of(MatrixHandle handle) const { return matrix_bytes_[static_cast<size_t>(handle.index)]; }

  std::unique_ptr<Backend> inner_;
  std::map<std::string, OpProfile> profile_;
  std::vector<int64_t> matrix_bytes_;
  int64_t kv_bytes_per_token_ = 0;  // in one layer
  const StepPlan* plan_ = nullptr;
};

}  // namespace tw
