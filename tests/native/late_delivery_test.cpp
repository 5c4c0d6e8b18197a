// Texts that are made beside the next step. A device that computes by itself is asked for the next step before the
// texts of the last one are made (Backend::computes_beside_host); whoever reads must not be able to tell, whatever
// happens in between. Every test runs the same requests with texts made late and at once.
#include <poll.h>

#include <condition_variable>
#include <future>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "check.h"
#include "engine/backend_factory.h"
#include "engine/engine.h"
#include "tiny_model.h"

namespace {

using tw::Activation;
using tw::Engine;
using tw::EngineOptions;
using tw::ErrorCode;
using tw::Job;
using tw::JobSpec;
using tw::MatrixHandle;
using tw::Outcome;
using tw::StopReason;
using tw::VectorHandle;
using tw::test::check_settled;
using tw::test::constrained_spec;
using tw::test::kBlockBytes;
using tw::test::kStop;
using tw::test::kVocab;
using tw::test::random_spec;

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

// A device that computes what a CPU does: at once, or beside its host on a thread of its own, as a GPU.
class GatedDevice final : public tw::Backend {
 public:
  GatedDevice(bool beside_host, Gate* gate)
      : beside_host_(beside_host), gate_(gate), inner_(tw::make_backend("cpu", 1)) {}

  bool computes_beside_host() const override { return beside_host_; }
  void begin_step(const tw::StepPlan& plan) override {
    const int64_t step = num_steps_++;
    gate_->pass(step, Place::kBegin);
    compute([this, step, &plan] {
      gate_->pass(step, Place::kCompute);
      inner_->begin_step(plan);
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
    if (beside_host_) running_ = std::async(std::launch::async, [this] { run_asked(); });
  }
  void sample(const std::vector<tw::SampleJob>& jobs, std::vector<tw::SampleResult>* results) override {
    if (running_.valid()) running_.get();
    run_asked();
    inner_->sample(jobs, results);
  }

  MatrixHandle add_matrix(const std::vector<tw::MatrixSource>& parts, const std::vector<float>& bias) override {
    return inner_->add_matrix(parts, bias);
  }
  MatrixHandle add_gate_up(const tw::MatrixSource& gate, const tw::MatrixSource& up) override {
    return inner_->add_gate_up(gate, up);
  }
  VectorHandle add_vector(const std::vector<float>& values) override { return inner_->add_vector(values); }
  void prepare(const tw::ModelShape& shape, const tw::StepLimits& limits) override { inner_->prepare(shape, limits); }
  void allocate_kv(int32_t num_blocks) override { inner_->allocate_kv(num_blocks); }
  bool supports_masks() const override { return inner_->supports_masks(); }
  void read_logits(int32_t index, float* out) override { inner_->read_logits(index, out); }
  void abandon_step() override { inner_->abandon_step(); }
  tw::DeviceInfo device_info() const override { return inner_->device_info(); }
  tw::MemoryUse memory_use() const override { return inner_->memory_use(); }
  int64_t free_bytes() const override { return inner_->free_bytes(); }
  std::string check_residency() const override { return inner_->check_residency(); }
  void inject(tw::Fault fault) override { inner_->inject(fault); }

 private:
  void compute(std::function<void()> op) { beside_host_ ? asked_.push_back(std::move(op)) : op(); }
  void run_asked() {
    for (const auto& op : asked_) op();
    asked_.clear();
  }

  const bool beside_host_;
  Gate* const gate_;
  const std::unique_ptr<tw::Backend> inner_;
  int64_t num_steps_ = 0;
  std::vector<std::function<void()>> asked_;  // of this step, not yet computed
  std::future<void> running_;
};

// One printable character a token, but that some ids are the halves of `é`: text that waits for the next token.
std::vector<std::string> vocabulary() {
  std::vector<std::string> words = tw::test::vocabulary();
  for (size_t id = 80; id < kVocab; ++id) words[id] = id % 2 == 0 ? "\xC3" : "\xA9";
  return words;
}

const std::vector<std::string> kWords = vocabulary();

// An engine with its device and a gate to it.
struct Machine {
  explicit Machine(bool late, EngineOptions options = {}, int32_t kv_blocks = 64) {
    options.kv_cache_bytes = kv_blocks * kBlockBytes;
    engine = std::make_unique<Engine>(std::make_unique<GatedDevice>(late, &gate), tw::test::tiny_file(), kWords,
                                      std::vector<int32_t>{kStop}, options, [](int) {});
  }
  Engine* operator->() const { return engine.get(); }

  Gate gate;
  std::unique_ptr<Engine> engine;
};

// What a job's reader got.
struct Stream {
  std::string kinds;                // of its events in their order: s(tarted), t(oken), m(etrics), e(nd)
  std::vector<std::string> tokens;  // the token events, as they go over the wire
  Outcome outcome;

  // Takes what there is; true once there was the outcome.
  bool take(Job* job) {
    tw::Taken taken = job->take(kWords);
    for (std::string& message : taken.messages) {
      kinds += "?stme"[static_cast<uint8_t>(message[0]) >> 3];
      if (kinds.back() == 't') tokens.push_back(std::move(message));
    }
    if (taken.outcome) outcome = *taken.outcome;
    return taken.outcome.has_value();
  }
  void read_to_end(Job* job) {
    while (!take(job)) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
};

Stream read_to_end(Job* job) {
  Stream stream;
  stream.read_to_end(job);
  return stream;
}

void check_same(const Stream& late, const Stream& at_once) {
  CHECK_EQ(late.kinds, at_once.kinds);
  CHECK(late.tokens == at_once.tokens);
  CHECK_EQ(late.outcome.error_code, at_once.outcome.error_code);
  CHECK_EQ(late.outcome.error_message, at_once.outcome.error_message);
  CHECK(late.outcome.stop_reason == at_once.outcome.stop_reason);
  CHECK_EQ(late.outcome.stop_sequence, at_once.outcome.stop_sequence);
  CHECK_EQ(late.outcome.digest, at_once.outcome.digest);
  CHECK_EQ(late.outcome.metrics.tokens_in, at_once.outcome.metrics.tokens_in);
  CHECK_EQ(late.outcome.metrics.tokens_out, at_once.outcome.metrics.tokens_out);
}

// After its outcome a job gives nothing and counts nothing.
void check_over(const std::shared_ptr<Job>& job, const Stream& stream) {
  CHECK(job->finished());
  CHECK_EQ(job->num_tokens_out(), stream.outcome.metrics.tokens_out);
  const tw::Taken taken = job->take(kWords);
  CHECK(taken.messages.empty());
  CHECK(!taken.outcome);
}

template <class Condition>
bool becomes(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!condition() && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return condition();
}

// A job that ends by nothing but its length, with a token event for each token.
JobSpec steady_spec(uint32_t seed, int32_t max_tokens) {
  JobSpec spec;
  spec.job_id = "steady-" + std::to_string(seed);
  spec.model = "tiny";
  spec.prompt_ids = {1, 2, static_cast<int32_t>(3 + seed)};
  spec.max_tokens = max_tokens;
  spec.sampling.seed = seed;
  spec.sampling.num_logprobs = 2;
  spec.sampling.logit_bias = {{kStop, -100.0f}};
  for (int32_t id = 80; id < kVocab; ++id) spec.sampling.logit_bias.emplace_back(id, -100.0f);
  spec.separate_events = true;
  return spec;
}

// Every kind of request there is, with ends of every kind.
JobSpec any_spec(uint32_t seed) {
  JobSpec spec = seed % 5 == 0 ? constrained_spec(seed, 1 + static_cast<int32_t>(seed % 30)) : random_spec(seed);
  if (seed % 4 == 0) spec.max_tokens = 1 + static_cast<int32_t>(seed / 4 % 2);
  if (seed % 3 == 0) spec.sampling.logit_bias = {{kStop, -4.0f}, {80, 6.0f}, {81, 6.0f}};
  if (seed % 6 == 1) spec.stops = {"\xC3\xA9", "e"};
  spec.separate_events = true;
  return spec;
}

}  // namespace

TEST(the_same_requests_give_the_same_events) {
  constexpr uint32_t kJobs = 240;
  std::map<bool, std::vector<Stream>> streams;
  for (const bool late : {false, true}) {
    EngineOptions options;
    options.max_batch_tokens = 24;
    const Machine machine(late, options, 20);
    std::vector<std::shared_ptr<Job>> jobs;
    for (uint32_t i = 0; i < kJobs; ++i) jobs.push_back(machine->submit(any_spec(i)));
    for (const auto& job : jobs) streams[late].push_back(read_to_end(job.get()));
    CHECK(machine->stats().num_preemptions > 0);
    check_settled(machine.engine.get());
    for (uint32_t i = 0; i < kJobs; ++i) check_over(jobs[i], streams[late][i]);
    // Nobody is called to a job that is over.
    machine->take_ready();
    const auto last = machine->submit(steady_spec(1, 8));
    read_to_end(last.get());
    for (const uint64_t handle : machine->take_ready()) CHECK_EQ(handle, last->handle());
  }
  std::map<StopReason, int> ends;
  for (uint32_t i = 0; i < kJobs; ++i) {
    check_same(streams[true][i], streams[false][i]);
    CHECK_EQ(streams[true][i].outcome.error_code, std::string());
    ++ends[streams[true][i].outcome.stop_reason];
  }
  for (const StopReason reason : {StopReason::kEos, StopReason::kMaxTokens, StopReason::kStopSequence}) {
    CHECK(ends[reason] >= 10);
  }
}

TEST(a_text_is_made_while_the_next_step_computes) {
  for (const bool late : {false, true}) {
    Machine machine(late);
    machine.gate.hold(1, Place::kBegin);
    const auto job = machine->submit(steady_spec(1, 20));
    CHECK(machine.gate.wait());
    // Nobody waits for a first token longer than it takes.
    CHECK_EQ(job->num_tokens_out(), 1u);
    machine.gate.hold(4, Place::kBegin);
    CHECK(machine.gate.wait());
    CHECK_EQ(job->num_tokens_out(), late ? 3u : 4u);
    Stream stream;
    stream.take(job.get());
    CHECK_EQ(stream.kinds, std::string(late ? "sttt" : "stttt"));
    machine->take_ready();
    machine.gate.hold(4, Place::kCompute);
    CHECK(machine.gate.wait());
    if (late) {
      // Made, and its reader called, though the step that follows it is far from done.
      pollfd ready = {machine->event_fd(), POLLIN, 0};
      CHECK_EQ(poll(&ready, 1, 20000), 1);
      CHECK(machine->take_ready() == std::vector<uint64_t>{job->handle()});
    }
    stream.take(job.get());
    CHECK_EQ(stream.kinds, std::string("stttt"));
    machine.gate.open();
    stream.read_to_end(job.get());
    CHECK_EQ(stream.kinds, "s" + std::string(20, 't') + "me");
    check_over(job, stream);
  }
}

TEST(an_engine_with_nothing_to_compute_keeps_no_text_back) {
  std::map<bool, Stream> streams;
  for (const bool late : {false, true}) {
    EngineOptions options;
    options.max_undelivered_tokens = 2;
    const Machine machine(late, options);
    const auto job = machine->submit(steady_spec(1, 20));
    // The reader takes nothing, so the job pauses. One token may be on its way when its reader turns out to be slow.
    CHECK(becomes([&] { return job->num_tokens_out() == (late ? 3u : 2u); }));
    CHECK_EQ(job->num_undelivered(), late ? 3 : 2);
    streams[late] = read_to_end(job.get());
    check_over(job, streams[late]);
  }
  check_same(streams[true], streams[false]);
}

TEST(a_cancel_between_a_token_and_its_text_ends_that_job_and_no_other) {
  const Machine alone(false);
  const Stream whole = read_to_end(alone->submit(steady_spec(1, 30)).get());
  std::map<bool, std::vector<Stream>> streams;
  for (const bool late : {false, true}) {
    Machine machine(late);
    machine.gate.hold(2, Place::kBegin);
    const auto cancelled = machine->submit(steady_spec(1, 30));
    CHECK(machine.gate.wait());
    std::vector<std::shared_ptr<Job>> others;
    for (uint32_t i = 2; i < 6; ++i) others.push_back(machine->submit(steady_spec(i, 30)));
    machine.gate.hold(6, Place::kBegin);
    CHECK(machine.gate.wait());
    Stream stream;
    stream.take(cancelled.get());
    const size_t num_before = late ? 5 : 6;
    CHECK_EQ(stream.kinds, "s" + std::string(num_before, 't'));
    CHECK_EQ(cancelled->cancel(), static_cast<uint32_t>(num_before));
    machine.gate.open();
    machine->wake();
    stream.read_to_end(cancelled.get());
    // The beginning of the whole answer, and no token after the cancel.
    CHECK_EQ(stream.kinds, "s" + std::string(num_before, 't') + "m");
    for (size_t i = 0; i < num_before; ++i) CHECK(stream.tokens[i] == whole.tokens[i]);
    CHECK_EQ(stream.outcome.error_code, std::string("CANCELLED"));
    CHECK_EQ(stream.outcome.metrics.tokens_out, 7u);  // what was computed, read or not
    for (const auto& job : others) streams[late].push_back(read_to_end(job.get()));
    check_settled(machine.engine.get());
    check_over(cancelled, stream);
    for (size_t i = 0; i < others.size(); ++i) check_over(others[i], streams[late][i]);
  }
  for (size_t i = 0; i < streams[true].size(); ++i) {
    check_same(streams[true][i], streams[false][i]);
    CHECK_EQ(streams[true][i].outcome.metrics.tokens_out, 30u);
  }
}

TEST(a_deadline_between_a_token_and_its_text_loses_no_token) {
  std::map<bool, Stream> streams;
  for (const bool late : {false, true}) {
    Machine machine(late);
    JobSpec spec = steady_spec(1, 100);
    spec.timeout_ms = 600000;
    machine.gate.hold(5, Place::kBegin);
    const auto job = machine->submit(spec);
    CHECK(machine.gate.wait());
    job->deadline = std::chrono::steady_clock::now();  // its owner, the engine's thread, is held
    machine.gate.open();
    streams[late] = read_to_end(job.get());
    CHECK_EQ(streams[late].outcome.error_code, std::string("INFERENCE_TIMEOUT"));
    CHECK_EQ(streams[late].kinds, "s" + std::string(6, 't') + "m");
    check_settled(machine.engine.get());
    check_over(job, streams[late]);
  }
  check_same(streams[true], streams[false]);
}

TEST(a_step_that_fails_takes_no_text_of_the_step_before) {
  const std::map<std::string, std::string> code_of = {{"oom@5", "VRAM_OOM"}, {"device-error@5", "CUDA_ERROR"}};
  for (const auto& [fault, code] : code_of) {
    std::map<bool, std::vector<Stream>> streams;
    for (const bool late : {false, true}) {
      EngineOptions options;
      options.faults = fault;
      Machine machine(late, options);
      machine.gate.hold(1, Place::kBegin);
      std::vector<std::shared_ptr<Job>> jobs;
      jobs.push_back(machine->submit(steady_spec(1, 20)));
      CHECK(machine.gate.wait());
      jobs.push_back(machine->submit(steady_spec(2, 20)));
      machine.gate.open();
      for (const auto& job : jobs) streams[late].push_back(read_to_end(job.get()));
      for (size_t i = 0; i < jobs.size(); ++i) check_over(jobs[i], streams[late][i]);
    }
    for (size_t i = 0; i < 2; ++i) check_same(streams[true][i], streams[false][i]);
    // Of two that ask the same, the later one pays for memory that there is not; a device that fails ends both.
    const bool spared = code == "VRAM_OOM";
    CHECK_EQ(streams[true][0].outcome.error_code, spared ? "" : code);
    CHECK_EQ(streams[true][0].kinds, "s" + std::string(spared ? 20 : 5, 't') + (spared ? "me" : "m"));
    CHECK_EQ(streams[true][1].outcome.error_code, code);
    CHECK_EQ(streams[true][1].kinds, "s" + std::string(3, 't') + "m");
  }
}

TEST(whoever_ends_all_jobs_at_once_takes_no_text_from_them) {
  const Machine alone(false);
  const Stream whole = read_to_end(alone->submit(steady_spec(1, 200)).get());
  for (const bool late : {false, true}) {
    int num_cut = 0;
    for (int round = 0; round < 20; ++round) {
      Machine machine(late, {}, 80);
      machine.gate.hold(4, Place::kBegin);
      std::vector<std::shared_ptr<Job>> jobs;
      for (int i = 0; i < 3; ++i) jobs.push_back(machine->submit(steady_spec(1, 200)));
      CHECK(machine.gate.wait());
      std::thread ender([&] {
        if (round % 2 == 0) {
          machine->fail_all(ErrorCode::kUnavailable, "a test says so");
        } else {
          machine->stop();
        }
      });
      machine.gate.open();
      int64_t num_tokens = 0;
      for (const auto& job : jobs) {
        const Stream stream = read_to_end(job.get());
        num_tokens += stream.outcome.metrics.tokens_out;
        num_cut += stream.outcome.error_code == "UNAVAILABLE" ? 1 : 0;
        CHECK_EQ(stream.tokens.size(), static_cast<size_t>(stream.outcome.metrics.tokens_out));
        for (size_t i = 0; i < stream.tokens.size(); ++i) CHECK(stream.tokens[i] == whole.tokens[i]);
      }
      ender.join();
      // What was computed was sent, up to the last token.
      CHECK_EQ(num_tokens, machine->stats().num_generated_tokens);
    }
    CHECK(num_cut > 0);
  }
}
