// A device that computes what a CPU does, at the pace of a CPU or of a GPU, and that a test can hold up at a step.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <vector>

#include "core/backend.h"
#include "engine/backend_factory.h"
#include "tiny_model.h"

namespace tw::test {

constexpr auto kPatience = std::chrono::seconds(20);

// Where a test can hold a step up.
enum class Place {
  kBegin,    // on the engine's thread; what the step before sampled may have no text yet
  kCompute,  // where the device computes
};

// Holds one step up until the test lets it go, so that the test acts at a known moment.
class Gate {
 public:
  // The test's side. Holds step number `step`, from 0, at `place`.
  void hold(int64_t step, Place place) {
    const std::lock_guard<std::mutex> lock(mutex_);
    step_ = step;
    place_ = place;
    is_held_ = false;
    changed_.notify_all();
  }
  // Whether the step has come.
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return is_held_; });
  }
  void open() { hold(-1, Place::kBegin); }

  // The device's side.
  void pass(int64_t step, Place place) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (step != step_ || place != place_) return;
    is_held_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return step != step_ || place != place_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t step_ = -1;
  Place place_ = Place::kBegin;
  bool is_held_ = false;
};

// How an engine and its device share the time.
enum class Pace {
  kAtOnce,  // as on a CPU: a step is over when it was asked for
  kLate,    // a step computes while the texts of the last one are made
  kAhead,   // and the next one is asked for before its draws are known
};

constexpr Pace kPaces[] = {Pace::kAtOnce, Pace::kLate, Pace::kAhead};

// A plan that outlives the scheduler's.
struct OwnPlan {
  explicit OwnPlan(const StepPlan& plan) : plan(plan) {
    tables.reserve(plan.slices.size());
    for (SequenceSlice& slice : this->plan.slices) {
      const int32_t blocks = (slice.position + slice.num_rows + kBlockTokens - 1) / kBlockTokens;
      tables.emplace_back(slice.block_table, slice.block_table + blocks);
      slice.block_table = tables.back().data();
    }
  }
  StepPlan plan;
  std::vector<std::vector<int32_t>> tables;
};

// Draws that outlive their jobs.
struct OwnDraws {
  explicit OwnDraws(const std::vector<SampleJob>& jobs) {
    for (const SampleJob& job : jobs) {
      params.push_back(*job.params);
      generated.push_back(*job.generated);
      masks.emplace_back();
      if (job.mask != nullptr) masks.back().assign(job.mask, job.mask + (kVocab + 31) / 32);
      indices.push_back(job.token_index);
    }
  }
  std::vector<SampleJob> jobs() const {
    std::vector<SampleJob> jobs;
    for (size_t i = 0; i < params.size(); ++i) {
      jobs.push_back({&params[i], &generated[i], indices[i], masks[i].empty() ? nullptr : masks[i].data()});
    }
    return jobs;
  }
  std::vector<SamplingParams> params;
  std::vector<std::vector<TokenCount>> generated;
  std::vector<std::vector<uint32_t>> masks;
  std::vector<uint64_t> indices;
};

// A device that computes what a CPU does: at once, or beside its host on a thread of its own, in the order in which it
// was asked, as a GPU.
class GatedDevice final : public Backend {
 public:
  GatedDevice(Pace pace, Gate* gate) : pace_(pace), gate_(gate), inner_(make_backend("cpu", 1)) {}
  ~GatedDevice() override {
    if (running_.valid()) running_.get();
  }

  bool computes_beside_host() const override { return pace_ != Pace::kAtOnce; }
  bool runs_ahead() const override { return pace_ == Pace::kAhead; }
  // Tokens that were named as draws.
  int64_t num_named() const { return num_named_; }
  void begin_step(const StepPlan& plan) override {
    const int64_t step = num_steps_++;
    gate_->pass(step, Place::kBegin);
    compute([this, step, own = std::make_shared<OwnPlan>(plan)] {
      gate_->pass(step, Place::kCompute);
      for (int32_t& id : own->plan.token_ids) {
        if (id >= 0) continue;
        id = last_drawn_.at(static_cast<size_t>(-1 - id)).id;
        ++num_named_;
      }
      plan_ = own;
      inner_->begin_step(own->plan);
    });
  }
  void embed(MatrixHandle table) override {
    compute([=] { inner_->embed(table); });
  }
  void project_qkv(VectorHandle gain, MatrixHandle qkv) override {
    compute([=] { inner_->project_qkv(gain, qkv); });
  }
  void rope_append(int32_t layer) override {
    compute([=] { inner_->rope_append(layer); });
  }
  void attend(int32_t layer, MatrixHandle reader) override {
    compute([=] { inner_->attend(layer, reader); });
  }
  void project_add(Activation input, MatrixHandle matrix) override {
    compute([=] { inner_->project_add(input, matrix); });
  }
  void feed_forward_up(VectorHandle gain, MatrixHandle gate_up) override {
    compute([=] { inner_->feed_forward_up(gain, gate_up); });
  }
  void project_logits(VectorHandle gain, MatrixHandle head) override {
    compute([=] { inner_->project_logits(gain, head); });
    run_asked();
  }
  void draw(const std::vector<SampleJob>& jobs) override {
    const auto drawn = std::make_shared<std::promise<std::vector<SampleResult>>>();
    draws_.push_back(drawn->get_future());
    compute([this, drawn, own = OwnDraws(jobs)] {
      inner_->draw(own.jobs());
      inner_->take_draws(&last_drawn_);
      drawn->set_value(last_drawn_);
    });
    run_asked();
  }
  void take_draws(std::vector<SampleResult>* results) override {
    *results = draws_.front().get();
    draws_.pop_front();
  }

  MatrixHandle add_matrix(const std::vector<MatrixSource>& parts, const std::vector<float>& bias) override {
    return inner_->add_matrix(parts, bias);
  }
  MatrixHandle add_gate_up(const MatrixSource& gate, const MatrixSource& up) override {
    return inner_->add_gate_up(gate, up);
  }
  VectorHandle add_vector(const std::vector<float>& values) override { return inner_->add_vector(values); }
  void prepare(const ModelShape& shape, const StepLimits& limits) override { inner_->prepare(shape, limits); }
  void allocate_kv(int32_t num_blocks) override { inner_->allocate_kv(num_blocks); }
  bool supports_masks() const override { return inner_->supports_masks(); }
  void read_logits(int32_t index, float* out) override { inner_->read_logits(index, out); }
  void abandon_step() override { inner_->abandon_step(); }
  DeviceInfo device_info() const override { return inner_->device_info(); }
  MemoryUse memory_use() const override { return inner_->memory_use(); }
  int64_t free_bytes() const override { return inner_->free_bytes(); }
  std::string check_residency() const override { return inner_->check_residency(); }
  void inject(Fault fault) override { inner_->inject(fault); }

 private:
  void compute(std::function<void()> op) { computes_beside_host() ? asked_.push_back(std::move(op)) : op(); }
  // Has the device do what it was asked for, after what it is at.
  void run_asked() {
    running_ = std::async(std::launch::async,
                          [before = std::make_shared<std::future<void>>(std::move(running_)), ops = std::move(asked_)] {
                            if (before->valid()) before->get();
                            for (const auto& op : ops) op();
                          });
    asked_.clear();
  }

  const Pace pace_;
  Gate* const gate_;
  const std::unique_ptr<Backend> inner_;
  int64_t num_steps_ = 0;
  std::vector<std::function<void()>> asked_;  // and not yet handed over
  std::deque<std::future<std::vector<SampleResult>>> draws_;
  // The device's side.
  std::shared_ptr<OwnPlan> plan_;
  std::vector<SampleResult> last_drawn_;
  std::atomic<int64_t> num_named_{0};
  std::future<void> running_;  // last: it ends before what it uses
};

}  // namespace tw::test
