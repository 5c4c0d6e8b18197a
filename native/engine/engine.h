// The token loop: one thread that owns jobs, blocks and the device, and never takes Python's lock.
//
// Others talk to it through a bounded inbox (submit), each job's cancel flag, and fail_all(). It talks back through
// each job's output and one eventfd, written at most once a step.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/backend.h"
#include "engine/fault_plan.h"
#include "engine/job.h"
#include "engine/scheduler.h"
#include "engine/telemetry.h"
#include "models/model.h"

namespace tw {

// 0 means: choose for this machine and model.
struct EngineOptions {
  std::string device = "cpu";  // "cpu", "cuda" or "cuda:N"
  int32_t num_threads = 0;
  // How far the threads that compute on a CPU stand back behind others, 0-19 (core/thread_priority.h).
  int32_t compute_nice = 0;
  int64_t kv_cache_bytes = 0;
  int32_t max_context_tokens = 0;
  int32_t max_batch_tokens = 0;       // rows in a step: the chunk of a prefill
  int32_t max_lone_batch_tokens = 0;  // rows in a step that holds up no stream
  int32_t max_running_jobs = 0;
  int32_t max_queued_jobs = 256;
  int64_t max_queued_tokens = 0;  // prompt tokens that wait
  int32_t batch_window_ms = 0;    // how long an idle engine waits for company before a first step; see set_batch_window
  bool prefix_cache = true;
  bool run_ahead = true;  // a device that can is asked for a step before the draws of the one before are known
  int32_t max_undelivered_tokens = 64;
  int32_t slow_reader_timeout_ms = 30000;
  std::string faults;  // for tests: what the device suffers at which step (FaultPlan)
};

struct EngineStats {
  int32_t active_jobs = 0;
  int32_t queued_jobs = 0;
  int32_t total_blocks = 0;
  int32_t free_blocks = 0;
  int32_t used_blocks = 0;
  int32_t cached_blocks = 0;
  int64_t num_steps = 0;
  int64_t num_prompt_tokens = 0;
  int64_t num_cached_tokens = 0;
  int64_t num_generated_tokens = 0;
  int64_t num_preemptions = 0;
  int64_t num_cache_hits = 0;    // first admissions that found a part of their prompt in the prefix cache
  int64_t num_cache_misses = 0;  // those that found nothing; 0 while the cache is off
  int64_t num_evictions = 0;     // cached blocks given up for new content
  int32_t last_batch_size = 0;
  Histogram inter_token_s{inter_token_bounds_s()};  // between two generated tokens of a job
  Histogram batch_size{batch_size_bounds()};        // sequences in a step
  Histogram cancel_s{cancel_bounds_s()};            // from a cancel to the job's blocks being free
  double tokens_per_second = 0;                     // generated, lately
  RateWindow generated;
  double heartbeat_age_ms = 0;
  int64_t num_out_of_memory = 0;  // jobs that a step had no memory for
  MemoryUse memory;
  std::string failure;  // why the loop died; empty while it lives
  std::string failure_code;
};

// What an engine needs to know of the tokenizer.
struct Vocabulary {
  std::vector<std::string> tokens;  // the bytes that each id stands for in text
  std::vector<int32_t> stop_token_ids;
};

class Engine {
 public:
  // `read_vocabulary` is asked, on the caller's thread, when the weights are in place: it may be made meanwhile.
  Engine(const gguf::File& file, const std::function<Vocabulary()>& read_vocabulary, const EngineOptions& options,
         const std::function<void(int)>& on_progress);
  // On a backend that is there, whatever options.device says.
  Engine(std::unique_ptr<Backend> backend, const gguf::File& file, const std::function<Vocabulary()>& read_vocabulary,
         const EngineOptions& options, const std::function<void(int)>& on_progress);
  Engine(std::unique_ptr<Backend> backend, const gguf::File& file, std::vector<std::string> vocabulary,
         std::vector<int32_t> stop_token_ids, const EngineOptions& options,
         const std::function<void(int)>& on_progress);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const ModelInfo& model_info() const { return model_->info(); }
  const DeviceInfo& device_info() const { return device_; }
  // With every choice made.
  const EngineOptions& options() const { return options_; }
  const std::vector<std::string>& vocabulary() const { return vocabulary_; }
  int event_fd() const { return event_fd_; }
  bool supports_grammars() const { return backend_->supports_masks(); }

  // Throws Error with kOverloaded, kKvCapacity, kContextLengthExceeded, kInvalidRequest or kUnavailable.
  std::shared_ptr<Job> submit(JobSpec spec);
  // Wakes the loop after Job::cancel().
  void wake();
  std::vector<uint64_t> take_ready();
  int32_t fail_all(ErrorCode code, const std::string& message);
  EngineStats stats() const;
  // Each of these runs on the engine thread between two steps and waits for it.
  std::string audit();
  // Empty if all that the device computes from lies in its own memory, else what does not. Asks the driver.
  std::string check_residency() const { return backend_->check_residency(); }
  CacheContents cache_contents();
  int32_t clear_cache();
  // Takes effect with the next first step. Any thread.
  void set_batch_window(int32_t milliseconds) { batch_window_ms_.store(milliseconds, std::memory_order_relaxed); }
  int32_t batch_window() const { return batch_window_ms_.load(std::memory_order_relaxed); }
  // Holds the engine thread up as a step that hangs would, for tests of what watches it.
  void inject_stall(int32_t milliseconds);
  void stop();

 private:
  using Jobs = std::unordered_map<uint64_t, std::shared_ptr<Job>>;

  // A step that the device was asked for and whose draws were not taken yet.
  struct StepInFlight {
    std::vector<uint64_t> drawn;               // handle of each draw's job, which may have ended meanwhile
    std::vector<NextMask::State> mask_states;  // of each; kTokens also for a job without a grammar
  };

  // Runs `errand` on the engine thread between two steps; `refused` if there is none any more.
  template <typename Result>
  Result on_engine_thread(std::function<Result()> errand, Result refused);
  void loop();
  void run_loop();
  void take_vocabulary(Vocabulary vocabulary);
  void take_inbox();
  bool expire_jobs();
  bool can_plan_blindly() const;
  bool begin_step();
  void compute(StepInFlight* step);
  void end_step();
  void fail_largest(const std::string& message);
  NextMask::State await_mask(Job* job, Clock::time_point now, bool alone);
  void handle_token(Job* job, SampleResult* result);
  void deliver(Job* job, const SampleResult& result);
  void deliver_tokens();
  void catch_up();
  void finish(Job* job, ErrorCode code, const std::string& message);
  void complete(Job* job, StopReason reason, std::string rest);
  void end_job(Job* job, Outcome outcome, std::string rest);
  MetricsEvent metrics_of(const Job& job) const;
  void notify(uint64_t handle);
  void flush_ready();
  void publish_stats();
  Clock::time_point next_timer() const;

  const std::unique_ptr<Backend> backend_;
  const DeviceInfo device_;
  const EngineOptions options_;
  const FaultPlan faults_;
  std::vector<std::string> vocabulary_;
  std::vector<char> is_stop_token_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvPool> pool_;
  std::unique_ptr<Scheduler> scheduler_;
  int event_fd_ = -1;

  // Guarded by mutex_: what other threads put in or read.
  mutable std::mutex mutex_;
  std::condition_variable wakeup_;
  bool woken_ = false;
  bool stopping_ = false;
  std::vector<std::shared_ptr<Job>> inbox_;
  int32_t num_queued_ = 0;         // in the inbox or waiting in the scheduler, never admitted
  int64_t num_queued_tokens_ = 0;  // their prompts
  std::vector<std::function<void()>> errands_;
  std::vector<uint64_t> ready_;
  EngineStats stats_;
  uint64_t next_handle_ = 1;
  std::atomic<int64_t> heartbeat_ns_{0};
  std::atomic<int32_t> batch_window_ms_;

  // Engine thread only.
  Jobs jobs_;
  StepPlan plan_;
  std::vector<Sequence*> scheduled_;
  std::vector<Sequence*> admitted_;
  std::deque<StepInFlight> steps_;  // at most two, oldest first
  std::vector<SampleJob> sample_jobs_;
  std::vector<SampleResult> samples_;
  const SamplingParams unused_draw_ = [] {
    SamplingParams greedy;
    greedy.temperature = 0;
    return greedy;
  }();
  // Jobs whose last token their readers do not have yet: on a device that computes by itself, texts are made while it
  // is at the next step. Delivered before anything else happens to a job.
  std::vector<Job*> undelivered_;
  std::vector<uint64_t> ready_now_;
  EngineStats counters_;
  int64_t num_steps_begun_ = 0;

  MaskWorker masks_{[this] { wake(); }};
  std::mutex join_mutex_;
  std::thread thread_;  // last: starts when all else is ready
};

}  // namespace tw
