// The token loop under many threads, on a tiny model: who submits, takes, cancels, asks and stops at the same time. Its
// value is greatest under ThreadSanitizer and AddressSanitizer (scripts/sanitize.sh).
#include "engine/engine.h"

#include <poll.h>

#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "check.h"
#include "tiny_model.h"

namespace {

using tw::Engine;
using tw::EngineOptions;
using tw::ErrorCode;
using tw::Job;
using tw::JobSpec;
using tw::Outcome;
using tw::test::check_settled;
using tw::test::constrained_spec;
using tw::test::kBlockBytes;
using tw::test::kStop;
using tw::test::random_spec;
using tw::test::SlowGrammar;
using tw::test::tiny_file;
using tw::test::vocabulary;

std::unique_ptr<Engine> make_engine(int32_t num_threads, int32_t kv_blocks, EngineOptions options = {}) {
  options.num_threads = num_threads;
  options.kv_cache_bytes = kv_blocks * kBlockBytes;
  return std::make_unique<Engine>(
      tiny_file(), [] { return tw::Vocabulary{vocabulary(), {kStop}}; }, options, [](int) {});
}

// What a reader that only polls got from a job: ids are compared through their digest.
struct Answer {
  std::string error;
  std::string digest;
  tw::StopReason reason = tw::StopReason::kNone;
  uint32_t num_tokens = 0;

  bool operator==(const Answer& other) const {
    return error == other.error && digest == other.digest && reason == other.reason && num_tokens == other.num_tokens;
  }
};

Answer read_to_end(Job* job, const std::vector<std::string>& words) {
  for (;;) {
    const tw::Taken taken = job->take(words);
    if (taken.outcome) {
      const Outcome& outcome = *taken.outcome;
      return {outcome.error_code, outcome.digest, outcome.stop_reason, outcome.metrics.tokens_out};
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

}  // namespace

TEST(many_threads_get_what_one_gets_alone) {
  constexpr uint32_t kThreads = 4;
  constexpr uint32_t kJobs = 40;
  const std::vector<std::string> words = vocabulary();
  EngineOptions options;
  options.prefix_cache = false;
  const auto quiet = make_engine(1, 64, options);
  std::vector<Answer> expected;
  for (uint32_t i = 0; i < kThreads * kJobs; ++i) {
    expected.push_back(read_to_end(quiet->submit(random_spec(i)).get(), words));
    CHECK_EQ(expected.back().error, std::string());
  }
  options.prefix_cache = true;
  options.max_batch_tokens = 24;
  options.max_undelivered_tokens = 5;
  const auto busy = make_engine(2, 20, options);
  std::atomic<int> differing{0};
  std::vector<std::thread> clients;
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    clients.emplace_back([&, thread] {
      std::vector<std::shared_ptr<Job>> jobs;
      for (uint32_t i = 0; i < kJobs; ++i) jobs.push_back(busy->submit(random_spec(thread * kJobs + i)));
      // Small undelivered limits: every job must be read before any can be waited for, so readers take turns.
      std::vector<char> done(kJobs, 0);
      for (uint32_t left = kJobs; left > 0;) {
        for (uint32_t i = 0; i < kJobs; ++i) {
          if (done[i] != 0) continue;
          const tw::Taken taken = jobs[i]->take(words);
          if (!taken.outcome) continue;
          const Outcome& outcome = *taken.outcome;
          const Answer answer = {outcome.error_code, outcome.digest, outcome.stop_reason, outcome.metrics.tokens_out};
          if (!(answer == expected[thread * kJobs + i])) ++differing;
          done[i] = 1;
          --left;
        }
        std::this_thread::yield();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  CHECK_EQ(differing.load(), 0);
  CHECK(busy->stats().num_preemptions > 0);
  CHECK(busy->stats().num_cached_tokens > 0);
  check_settled(busy.get());
}

TEST(wake_ups_alone_bring_every_job_to_its_reader) {
  const std::vector<std::string> words = vocabulary();
  const auto engine = make_engine(2, 32);
  constexpr uint32_t kJobs = 120;
  std::map<uint64_t, std::shared_ptr<Job>> live;
  std::mutex mutex;
  std::thread submitter([&] {
    for (uint32_t i = 0; i < kJobs; ++i) {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto job = engine->submit(random_spec(i));
      live.emplace(job->handle(), job);
    }
  });
  uint32_t finished = 0;
  while (finished < kJobs) {
    pollfd ready = {engine->event_fd(), POLLIN, 0};
    CHECK_EQ(poll(&ready, 1, 20000), 1);
    if (ready.revents == 0) break;
    for (const uint64_t handle : engine->take_ready()) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (live.at(handle)->take(words).outcome) ++finished;
    }
  }
  submitter.join();
  CHECK_EQ(finished, kJobs);
  check_settled(engine.get());
}

TEST(cancels_questions_and_failures_from_all_sides_leave_the_ledger_exact) {
  const std::vector<std::string> words = vocabulary();
  const auto engine = make_engine(2, 20);
  std::atomic<bool> over{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> clients;
  for (uint32_t thread = 0; thread < 3; ++thread) {
    clients.emplace_back([&, thread] {
      std::mt19937 random(thread);
      for (uint32_t i = 0; i < 60; ++i) {
        const auto job = engine->submit(random_spec(thread * 1000 + i));
        std::thread canceller;
        if (i % 3 == 0) {
          canceller = std::thread([&, wait = random() % 400] {
            std::this_thread::sleep_for(std::chrono::microseconds(wait));
            job->cancel();
            engine->wake();
          });
        }
        const Answer answer = read_to_end(job.get(), words);
        const std::set<std::string> allowed = {"", "CANCELLED", "UNAVAILABLE"};
        if (allowed.count(answer.error) == 0) ++wrong;
        if (canceller.joinable()) canceller.join();
      }
    });
  }
  std::thread asker([&] {
    while (!over) {
      if (!engine->audit().empty()) ++wrong;
      engine->cache_contents();
      engine->clear_cache();
      engine->set_batch_window(engine->batch_window() == 0 ? 1 : 0);
      const tw::EngineStats stats = engine->stats();
      if (stats.free_blocks + stats.used_blocks + stats.cached_blocks != stats.total_blocks) ++wrong;
      engine->take_ready();
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  std::thread failer([&] {
    while (!over) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      engine->fail_all(ErrorCode::kUnavailable, "a test says so");
    }
  });
  for (std::thread& client : clients) client.join();
  over = true;
  asker.join();
  failer.join();
  CHECK_EQ(wrong.load(), 0);
  check_settled(engine.get());
}

TEST(stopping_ends_every_job_and_refuses_new_ones) {
  const std::vector<std::string> words = vocabulary();
  for (uint32_t round = 0; round < 10; ++round) {
    const auto engine = make_engine(2, 20);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (uint32_t thread = 0; thread < 2; ++thread) {
      threads.emplace_back([&, thread] {
        for (uint32_t i = 0;; ++i) {
          std::shared_ptr<Job> job;
          try {
            job = engine->submit(random_spec(thread * 1000 + i));
          } catch (const tw::Error& error) {
            if (error.code() != ErrorCode::kUnavailable) ++wrong;
            return;
          }
          const std::string code = read_to_end(job.get(), words).error;
          if (!code.empty() && code != "UNAVAILABLE") ++wrong;
        }
      });
    }
    for (int stopper = 0; stopper < 2; ++stopper) {
      threads.emplace_back([&, round] {
        std::this_thread::sleep_for(std::chrono::microseconds(500 * round));
        engine->stop();
        if (engine->fail_all(ErrorCode::kInternal, "too late") != 0) ++wrong;
        if (engine->audit() != "the engine is not running") ++wrong;
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(wrong.load(), 0);
    CHECK_EQ(engine->stats().used_blocks, 0);
    CHECK_EQ(engine->stats().queued_jobs, 0);
  }
}

TEST(a_job_outlives_its_engine) {
  const std::vector<std::string> words = vocabulary();
  std::shared_ptr<Job> job;
  {
    EngineOptions options;
    options.max_undelivered_tokens = 2;
    const auto engine = make_engine(1, 20, options);
    JobSpec spec = random_spec(1);
    spec.max_tokens = 100;
    job = engine->submit(spec);
  }
  CHECK_EQ(read_to_end(job.get(), words).error, std::string("UNAVAILABLE"));
  CHECK(!job->take(words).outcome);
}

TEST(slow_readers_and_late_jobs_end_with_their_own_errors) {
  const std::vector<std::string> words = vocabulary();
  EngineOptions options;
  options.max_undelivered_tokens = 2;
  options.slow_reader_timeout_ms = 30;
  options.max_running_jobs = 1;
  const auto engine = make_engine(1, 20, options);
  JobSpec slow = random_spec(1);
  slow.max_tokens = 100;
  slow.stops.clear();
  slow.sampling.logit_bias = {{kStop, -100.0f}};
  const auto job = engine->submit(slow);
  JobSpec late = slow;
  late.timeout_ms = 5;
  const auto queued = engine->submit(late);
  CHECK_EQ(read_to_end(queued.get(), words).error, std::string("INFERENCE_TIMEOUT"));
  while (!job->finished()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const Answer answer = read_to_end(job.get(), words);
  CHECK_EQ(answer.error, std::string("SLOW_CONSUMER"));
  CHECK_EQ(answer.num_tokens, 2u);
  check_settled(engine.get());
}

TEST(a_grammar_bounds_the_answer_and_ends_it) {
  const std::vector<std::string> words = vocabulary();
  const auto engine = make_engine(1, 20);
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const Answer answer = read_to_end(engine->submit(constrained_spec(seed, 12)).get(), words);
    CHECK_EQ(answer.error, std::string());
    CHECK_EQ(answer.num_tokens, 12u);
    CHECK(answer.reason == tw::StopReason::kEos);
    JobSpec cut = constrained_spec(seed, 12);
    cut.max_tokens = 12;
    CHECK(read_to_end(engine->submit(cut).get(), words).reason == tw::StopReason::kMaxTokens);
  }
  const Answer nothing = read_to_end(engine->submit(constrained_spec(1, 0)).get(), words);
  CHECK_EQ(nothing.error, std::string());
  CHECK_EQ(nothing.num_tokens, 0u);
  check_settled(engine.get());
}

TEST(masks_that_are_late_change_no_byte_and_hold_up_nobody_else) {
  const std::vector<std::string> words = vocabulary();
  constexpr uint32_t kJobs = 24;
  const auto quiet = make_engine(1, 64);
  std::vector<Answer> expected;
  for (uint32_t i = 0; i < kJobs; ++i) {
    JobSpec spec = i % 2 == 0 ? constrained_spec(i, 20) : random_spec(i);
    expected.push_back(read_to_end(quiet->submit(spec).get(), words));
  }
  EngineOptions options;
  options.max_batch_tokens = 24;
  const auto busy = make_engine(2, 20, options);
  std::vector<std::shared_ptr<Job>> jobs;
  for (uint32_t i = 0; i < kJobs; ++i) {
    // From always in time to far beyond what a step waits for.
    const std::chrono::microseconds delay(i % 4 == 0 ? 0 : 500 * (i % 12));
    jobs.push_back(busy->submit(i % 2 == 0 ? constrained_spec(i, 20, delay) : random_spec(i)));
  }
  for (uint32_t i = 0; i < kJobs; ++i) CHECK(read_to_end(jobs[i].get(), words) == expected[i]);
  CHECK(busy->stats().num_preemptions > 0);
  check_settled(busy.get());

  // Beside a mask that takes a second, another job takes what it takes alone.
  const auto slow = busy->submit(constrained_spec(1, 4, std::chrono::seconds(1)));
  JobSpec other = random_spec(3);
  other.stops.clear();
  const Answer answer = read_to_end(busy->submit(other).get(), words);
  CHECK_EQ(answer.error, std::string());
  CHECK_EQ(slow->num_tokens_out(), 0u);
  slow->cancel();
  busy->wake();
  CHECK_EQ(read_to_end(slow.get(), words).error, std::string("CANCELLED"));
  check_settled(busy.get());
}

TEST(a_mask_that_cannot_be_made_ends_its_own_job_only) {
  const std::vector<std::string> words = vocabulary();
  const auto engine = make_engine(1, 20);
  JobSpec spec = constrained_spec(1, 12);
  spec.grammar = std::make_shared<SlowGrammar>(12, std::chrono::microseconds(0), 5);
  const auto good = engine->submit(constrained_spec(2, 12));
  const Answer answer = read_to_end(engine->submit(spec).get(), words);
  CHECK_EQ(answer.error, std::string("INVALID_REQUEST"));
  CHECK_EQ(answer.num_tokens, 5u);
  CHECK_EQ(read_to_end(good.get(), words).num_tokens, 12u);
  check_settled(engine.get());
}

TEST(an_engine_may_stop_while_masks_are_made) {
  for (int round = 0; round < 10; ++round) {
    const auto engine = make_engine(1, 20);
    for (uint32_t i = 0; i < 4; ++i) engine->submit(constrained_spec(i, 12, std::chrono::milliseconds(3)));
    std::this_thread::sleep_for(std::chrono::milliseconds(round));
  }
}
