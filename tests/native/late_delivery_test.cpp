// A device that computes by itself is asked for the next step before the texts of the last one are made
// (Backend::computes_beside_host), and, if it can, before it is known what that one drew (Backend::runs_ahead); whoever
// reads must not be able to tell, whatever happens in between. Every test runs the same requests at each pace.
#include <poll.h>

#include <chrono>
#include <map>
#include <random>
#include <thread>

#include "check.h"
#include "engine/engine.h"
#include "gated_device.h"
#include "tiny_model.h"

namespace {

using tw::Engine;
using tw::EngineOptions;
using tw::ErrorCode;
using tw::Job;
using tw::JobSpec;
using tw::Outcome;
using tw::StopReason;
using tw::test::check_settled;
using tw::test::constrained_spec;
using tw::test::Gate;
using tw::test::GatedDevice;
using tw::test::kBlockBytes;
using tw::test::kPaces;
using tw::test::kPatience;
using tw::test::kStop;
using tw::test::kVocab;
using tw::test::Pace;
using tw::test::Place;
using tw::test::random_spec;

// One printable character a token, but that some ids are the halves of `é`: text that waits for the next token.
std::vector<std::string> vocabulary() {
  std::vector<std::string> words = tw::test::vocabulary();
  for (size_t id = 80; id < kVocab; ++id) words[id] = id % 2 == 0 ? "\xC3" : "\xA9";
  return words;
}

const std::vector<std::string> kWords = vocabulary();

// An engine with its device and a gate to it.
struct Machine {
  explicit Machine(Pace pace, EngineOptions options = {}, int32_t kv_blocks = 64) {
    options.kv_cache_bytes = kv_blocks * kBlockBytes;
    auto own = std::make_unique<GatedDevice>(pace, &gate);
    device = own.get();
    engine = std::make_unique<Engine>(
        std::move(own), tw::test::tiny_file(), [] { return tw::Vocabulary{kWords, {kStop}}; }, options, [](int) {});
  }
  Engine* operator->() const { return engine.get(); }

  Gate gate;
  const GatedDevice* device = nullptr;  // the engine's
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

// Of these, what does not ask what was drawn before: a device that can goes on with them by itself.
JobSpec blind_spec(uint32_t seed) {
  JobSpec spec = any_spec(seed);
  spec.grammar = nullptr;
  spec.sampling.repetition_penalty = 1.0f;
  return spec;
}

}  // namespace

TEST(the_same_requests_give_the_same_events) {
  constexpr uint32_t kJobs = 240;
  std::map<Pace, std::vector<Stream>> streams;
  for (const Pace pace : kPaces) {
    EngineOptions options;
    options.max_batch_tokens = 24;
    const Machine machine(pace, options, 20);
    std::vector<std::shared_ptr<Job>> jobs;
    for (uint32_t i = 0; i < kJobs; ++i) jobs.push_back(machine->submit(any_spec(i)));
    for (const auto& job : jobs) streams[pace].push_back(read_to_end(job.get()));
    CHECK(machine->stats().num_preemptions > 0);
    check_settled(machine.engine.get());
    for (uint32_t i = 0; i < kJobs; ++i) check_over(jobs[i], streams[pace][i]);
    // Nobody is called to a job that is over.
    machine->take_ready();
    const auto last = machine->submit(steady_spec(1, 8));
    read_to_end(last.get());
    for (const uint64_t handle : machine->take_ready()) CHECK_EQ(handle, last->handle());
  }
  std::map<StopReason, int> ends;
  for (uint32_t i = 0; i < kJobs; ++i) {
    for (const Pace pace : kPaces) check_same(streams[pace][i], streams[Pace::kAtOnce][i]);
    CHECK_EQ(streams[Pace::kAtOnce][i].outcome.error_code, std::string());
    ++ends[streams[Pace::kAtOnce][i].outcome.stop_reason];
  }
  for (const StopReason reason : {StopReason::kEos, StopReason::kMaxTokens, StopReason::kStopSequence}) {
    CHECK(ends[reason] >= 10);
  }
}

TEST(a_device_that_runs_ahead_gives_what_one_does_that_waits) {
  constexpr uint32_t kJobs = 200;
  const Machine alone(Pace::kAtOnce);
  std::vector<Stream> whole;
  for (uint32_t i = 0; i < kJobs; ++i) whole.push_back(read_to_end(alone->submit(blind_spec(i)).get()));
  for (const int32_t kv_blocks : {14, 64}) {
    EngineOptions options;
    options.max_batch_tokens = 24;
    const Machine machine(Pace::kAhead, options, kv_blocks);
    std::vector<std::shared_ptr<Job>> jobs;
    for (uint32_t i = 0; i < kJobs; ++i) jobs.push_back(machine->submit(blind_spec(i)));
    std::mt19937 random(5);
    for (uint32_t i = 3; i < kJobs; i += 7) {
      while (random() % 3 != 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
      jobs[i]->cancel();
      machine->wake();
    }
    for (uint32_t i = 0; i < kJobs; ++i) {
      const Stream stream = read_to_end(jobs[i].get());
      check_over(jobs[i], stream);
      if (stream.outcome.error_code.empty()) {
        check_same(stream, whole[i]);
      } else {
        CHECK_EQ(stream.outcome.error_code, std::string("CANCELLED"));
        CHECK(i % 7 == 3 && stream.tokens.empty());
      }
    }
    check_settled(machine.engine.get());
    CHECK_EQ(machine->stats().num_preemptions > 0, kv_blocks == 14);
    CHECK(machine.device->num_named() > 1000);
  }
}

TEST(a_text_is_made_while_the_next_step_computes) {
  for (const Pace pace : kPaces) {
    Machine machine(pace);
    machine.gate.hold(1, Place::kBegin);
    const auto job = machine->submit(steady_spec(1, 20));
    CHECK(machine.gate.wait());
    // Nobody waits for a first token longer than it takes: where the device runs ahead it is not known yet.
    CHECK_EQ(job->num_tokens_out(), pace == Pace::kAhead ? 0u : 1u);
    machine.gate.hold(4, Place::kBegin);
    CHECK(machine.gate.wait());
    const uint32_t num_made = pace == Pace::kAtOnce ? 4 : pace == Pace::kLate ? 3 : 2;
    CHECK_EQ(job->num_tokens_out(), num_made);
    Stream stream;
    stream.take(job.get());
    CHECK_EQ(stream.kinds, "s" + std::string(num_made, 't'));
    machine->take_ready();
    machine.gate.hold(4, Place::kCompute);
    CHECK(machine.gate.wait());
    if (pace != Pace::kAtOnce) {
      // Made, and its reader called, though the step that follows it is far from done.
      pollfd ready = {machine->event_fd(), POLLIN, 0};
      CHECK_EQ(poll(&ready, 1, 20000), 1);
      CHECK(machine->take_ready() == std::vector<uint64_t>{job->handle()});
    }
    CHECK(becomes([&] {
      stream.take(job.get());
      return stream.kinds == "stttt";
    }));
    machine.gate.open();
    stream.read_to_end(job.get());
    CHECK_EQ(stream.kinds, "s" + std::string(20, 't') + "me");
    check_over(job, stream);
  }
}

TEST(an_engine_with_nothing_to_compute_keeps_no_text_back) {
  std::map<Pace, Stream> streams;
  for (const Pace pace : kPaces) {
    EngineOptions options;
    options.max_undelivered_tokens = 2;
    const Machine machine(pace, options);
    const auto job = machine->submit(steady_spec(1, 20));
    // The reader takes nothing, so the job pauses. A token or two may be on their way when its reader turns out slow.
    const uint32_t num_tokens = pace == Pace::kAtOnce ? 2 : pace == Pace::kLate ? 3 : 4;
    CHECK(becomes([&] { return job->num_tokens_out() == num_tokens; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_EQ(job->num_undelivered(), static_cast<int32_t>(num_tokens));
    streams[pace] = read_to_end(job.get());
    check_over(job, streams[pace]);
    check_same(streams[pace], streams[Pace::kAtOnce]);
  }
}

TEST(a_cancel_between_a_token_and_its_text_ends_that_job_and_no_other) {
  const Machine alone(Pace::kAtOnce);
  const Stream whole = read_to_end(alone->submit(steady_spec(1, 30)).get());
  std::map<Pace, std::vector<Stream>> streams;
  for (const Pace pace : kPaces) {
    Machine machine(pace);
    machine.gate.hold(2, Place::kBegin);
    const auto cancelled = machine->submit(steady_spec(1, 30));
    CHECK(machine.gate.wait());
    std::vector<std::shared_ptr<Job>> others;
    for (uint32_t i = 2; i < 6; ++i) others.push_back(machine->submit(steady_spec(i, 30)));
    machine.gate.hold(6, Place::kBegin);
    CHECK(machine.gate.wait());
    Stream stream;
    stream.take(cancelled.get());
    const size_t num_before = pace == Pace::kAtOnce ? 6 : pace == Pace::kLate ? 5 : 4;
    CHECK_EQ(stream.kinds, "s" + std::string(num_before, 't'));
    CHECK_EQ(cancelled->cancel(), static_cast<uint32_t>(num_before));
    machine.gate.open();
    machine->wake();
    stream.read_to_end(cancelled.get());
    // The beginning of the whole answer, and no token after the cancel.
    CHECK_EQ(stream.kinds, "s" + std::string(num_before, 't') + "m");
    for (size_t i = 0; i < num_before; ++i) CHECK(stream.tokens[i] == whole.tokens[i]);
    CHECK_EQ(stream.outcome.error_code, std::string("CANCELLED"));
    // What was drawn, read or not; of a device that runs ahead the last draw is never asked for.
    CHECK_EQ(stream.outcome.metrics.tokens_out, pace == Pace::kAhead ? 6u : 7u);
    for (const auto& job : others) streams[pace].push_back(read_to_end(job.get()));
    check_settled(machine.engine.get());
    check_over(cancelled, stream);
    for (size_t i = 0; i < others.size(); ++i) check_over(others[i], streams[pace][i]);
  }
  for (const Pace pace : kPaces) {
    for (size_t i = 0; i < streams[pace].size(); ++i) {
      check_same(streams[pace][i], streams[Pace::kAtOnce][i]);
      CHECK_EQ(streams[pace][i].outcome.metrics.tokens_out, 30u);
    }
  }
}

TEST(a_deadline_between_a_token_and_its_text_loses_no_token) {
  std::map<Pace, Stream> streams;
  for (const Pace pace : kPaces) {
    Machine machine(pace);
    JobSpec spec = steady_spec(1, 100);
    spec.timeout_ms = 600000;
    machine.gate.hold(5, Place::kBegin);
    const auto job = machine->submit(spec);
    CHECK(machine.gate.wait());
    job->deadline = std::chrono::steady_clock::now();  // its owner, the engine's thread, is held
    machine.gate.open();
    streams[pace] = read_to_end(job.get());
    CHECK_EQ(streams[pace].outcome.error_code, std::string("INFERENCE_TIMEOUT"));
    const size_t num_tokens = pace == Pace::kAhead ? 5 : 6;  // ahead, the last step's draw is not known yet
    CHECK_EQ(streams[pace].kinds, "s" + std::string(num_tokens, 't') + "m");
    for (size_t i = 0; i < num_tokens; ++i) CHECK(streams[pace].tokens[i] == streams[Pace::kAtOnce].tokens[i]);
    check_settled(machine.engine.get());
    check_over(job, streams[pace]);
  }
  check_same(streams[Pace::kLate], streams[Pace::kAtOnce]);
}

TEST(a_step_that_fails_takes_no_text_of_the_step_before) {
  const std::map<std::string, std::string> code_of = {{"oom@5", "VRAM_OOM"}, {"device-error@5", "CUDA_ERROR"}};
  for (const auto& [fault, code] : code_of) {
    std::map<Pace, std::vector<Stream>> streams;
    for (const Pace pace : kPaces) {
      EngineOptions options;
      options.faults = fault;
      Machine machine(pace, options);
      machine.gate.hold(1, Place::kBegin);
      std::vector<std::shared_ptr<Job>> jobs;
      jobs.push_back(machine->submit(steady_spec(1, 20)));
      CHECK(machine.gate.wait());
      jobs.push_back(machine->submit(steady_spec(2, 20)));
      machine.gate.open();
      for (const auto& job : jobs) streams[pace].push_back(read_to_end(job.get()));
      for (size_t i = 0; i < jobs.size(); ++i) check_over(jobs[i], streams[pace][i]);
    }
    for (const Pace pace : kPaces) {
      // Of two that ask the same, the later one pays for memory that there is not; a device that fails ends both, and
      // takes with it what it was asked for ahead.
      const bool spared = code == "VRAM_OOM";
      const size_t num_lost = !spared && pace == Pace::kAhead ? 1 : 0;
      CHECK_EQ(streams[pace][0].outcome.error_code, spared ? "" : code);
      CHECK_EQ(streams[pace][0].kinds, "s" + std::string(spared ? 20 : 5 - num_lost, 't') + (spared ? "me" : "m"));
      CHECK_EQ(streams[pace][1].outcome.error_code, code);
      CHECK_EQ(streams[pace][1].kinds, "s" + std::string(3 - num_lost, 't') + "m");
      for (size_t i = 0; i < 2; ++i) {
        if (num_lost == 0) check_same(streams[pace][i], streams[Pace::kAtOnce][i]);
        for (size_t t = 0; t < streams[pace][i].tokens.size(); ++t) {
          CHECK(streams[pace][i].tokens[t] == streams[Pace::kAtOnce][i].tokens[t]);
        }
      }
    }
  }
}

TEST(whoever_ends_all_jobs_at_once_takes_no_text_from_them) {
  const Machine alone(Pace::kAtOnce);
  const Stream whole = read_to_end(alone->submit(steady_spec(1, 200)).get());
  for (const Pace pace : kPaces) {
    int num_cut = 0;
    for (int round = 0; round < 20; ++round) {
      Machine machine(pace, {}, 80);
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
