#include "engine/engine.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <future>

#include "core/thread_priority.h"
#include "engine/backend_factory.h"
#include "engine/sizing.h"

namespace tw {
namespace {

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

// An idle loop wakes this often to show that it lives.
constexpr auto kHeartbeat = std::chrono::milliseconds(500);

}  // namespace

Engine::Engine(const gguf::File& file, const std::function<Vocabulary()>& read_vocabulary, const EngineOptions& options,
               const std::function<void(int)>& on_progress)
    : Engine(make_backend(options.device, options.num_threads, options.compute_nice), file, read_vocabulary, options,
             on_progress) {}

Engine::Engine(std::unique_ptr<Backend> backend, const gguf::File& file,
               const std::function<Vocabulary()>& read_vocabulary, const EngineOptions& options,
               const std::function<void(int)>& on_progress)
    : backend_(std::move(backend)),
      device_(backend_->device_info()),
      options_(resolve(options, device_)),
      faults_(options.faults),
      batch_window_ms_(options.batch_window_ms) {
  require_memory_for_weights(file, *backend_);
  model_ = load_model(file, backend_.get(), options_.max_context_tokens, on_progress);
  const ModelShape& shape = model_->shape();
  StepLimits limits;
  limits.max_rows = options_.max_lone_batch_tokens;
  limits.max_logit_rows = options_.max_running_jobs;
  backend_->prepare(shape, limits);
  const int32_t num_kv_blocks =
      choose_kv_blocks(shape, options_.kv_cache_bytes, wanted_kv_tokens(shape, options_, device_), *backend_);
  backend_->allocate_kv(num_kv_blocks);
  take_vocabulary(read_vocabulary());
  pool_ = std::make_unique<KvPool>(num_kv_blocks, options_.prefix_cache);
  scheduler_ = std::make_unique<Scheduler>(
      SchedulerLimits{options_.max_batch_tokens, options_.max_running_jobs, options_.max_lone_batch_tokens},
      pool_.get());
  counters_.memory = backend_->memory_use();
  publish_stats();
  event_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (event_fd_ < 0) throw Error(ErrorCode::kInternal, std::string("eventfd: ") + std::strerror(errno));
  thread_ = std::thread([this] { loop(); });
}

void Engine::take_vocabulary(Vocabulary vocabulary) {
  const int32_t size = model_->shape().vocab_size;
  if (static_cast<int32_t>(vocabulary.tokens.size()) != size) {
    throw Error(ErrorCode::kModelLoadFailed, "the tokenizer has " + std::to_string(vocabulary.tokens.size()) +
                                                 " tokens, the model " + std::to_string(size));
  }
  vocabulary_ = std::move(vocabulary.tokens);
  is_stop_token_.resize(vocabulary_.size(), 0);
  for (const int32_t id : vocabulary.stop_token_ids) {
    if (id < 0 || id >= size) {
      throw Error(ErrorCode::kModelLoadFailed, "stop token " + std::to_string(id) + " is outside the vocabulary");
    }
    is_stop_token_[static_cast<size_t>(id)] = 1;
  }
}

Engine::~Engine() {
  stop();
  if (event_fd_ >= 0) close(event_fd_);
}

std::shared_ptr<Job> Engine::submit(JobSpec spec) {
  const ModelShape& shape = model_->shape();
  const auto prompt = static_cast<int64_t>(spec.prompt_ids.size());
  if (prompt == 0 || spec.max_tokens < 1) {
    throw Error(ErrorCode::kInvalidRequest, "a job needs at least one prompt token and one token to generate");
  }
  for (const int32_t id : spec.prompt_ids) {
    if (id < 0 || id >= shape.vocab_size) {
      throw Error(ErrorCode::kInvalidRequest, "token id " + std::to_string(id) + " is outside the vocabulary of " +
                                                  std::to_string(shape.vocab_size));
    }
  }
  for (const auto& [id, bias] : spec.sampling.logit_bias) {
    if (id < 0 || id >= shape.vocab_size) {
      throw Error(ErrorCode::kInvalidRequest, "logit_bias id " + std::to_string(id) + " is outside the vocabulary");
    }
  }
  if (spec.grammar && !backend_->supports_masks()) {
    throw Error(ErrorCode::kInvalidRequest, "response_format: this device has no structured output");
  }
  const int64_t total = prompt + spec.max_tokens;
  if (total > shape.context_length) {
    throw Error(ErrorCode::kContextLengthExceeded, "prompt and max_tokens need " + std::to_string(total) +
                                                       " tokens, the context holds " +
                                                       std::to_string(shape.context_length));
  }
  if (!scheduler_->can_ever_fit(static_cast<int32_t>(total))) {
    throw Error(ErrorCode::kKvCapacity, "prompt and max_tokens need " + std::to_string(total) +
                                            " tokens, the KV pool holds " +
                                            std::to_string(int64_t{pool_->num_total()} * kBlockTokens));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_ || !stats_.failure.empty()) throw Error(ErrorCode::kUnavailable, "the engine is not running");
  if (num_queued_ >= options_.max_queued_jobs || num_queued_tokens_ + prompt > options_.max_queued_tokens) {
    throw Error(ErrorCode::kOverloaded, "the queue is full: " + std::to_string(num_queued_) + " jobs wait");
  }
  auto job = std::make_shared<Job>(next_handle_++, std::move(spec));
  inbox_.push_back(job);
  ++num_queued_;
  num_queued_tokens_ += prompt;
  woken_ = true;
  wakeup_.notify_one();
  return job;
}

void Engine::wake() {
  const std::lock_guard<std::mutex> lock(mutex_);
  woken_ = true;
  wakeup_.notify_one();
}

std::vector<uint64_t> Engine::take_ready() {
  uint64_t count;
  while (read(event_fd_, &count, sizeof count) < 0 && errno == EINTR) {
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(ready_, {});
}

template <typename Result>
Result Engine::on_engine_thread(std::function<Result()> errand, Result refused) {
  // Shared: the engine thread may still be inside set_value() when the waiting thread has gone on.
  const auto done = std::make_shared<std::promise<Result>>();
  std::future<Result> result = done->get_future();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_ || !stats_.failure.empty()) return refused;
    errands_.push_back([done, errand = std::move(errand)] { done->set_value(errand()); });
    woken_ = true;
    wakeup_.notify_one();
  }
  return result.get();
}

int32_t Engine::fail_all(ErrorCode code, const std::string& message) {
  const auto fail = [this, code, message] {
    const auto num_jobs = static_cast<int32_t>(jobs_.size());
    while (!jobs_.empty()) finish(jobs_.begin()->second.get(), code, message);
    return num_jobs;
  };
  return on_engine_thread<int32_t>(fail, 0);
}

std::string Engine::audit() {
  return on_engine_thread<std::string>([this] { return scheduler_->audit(); }, "the engine is not running");
}

CacheContents Engine::cache_contents() {
  return on_engine_thread<CacheContents>([this] { return pool_->cache_contents(); }, {});
}

int32_t Engine::clear_cache() {
  return on_engine_thread<int32_t>([this] { return pool_->clear_cache(); }, 0);
}

void Engine::inject_stall(int32_t milliseconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  errands_.push_back([milliseconds] { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); });
  woken_ = true;
  wakeup_.notify_one();
}

EngineStats Engine::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  EngineStats stats = stats_;
  stats.queued_jobs = num_queued_;
  const int64_t beat = heartbeat_ns_.load(std::memory_order_relaxed);
  const Clock::time_point now = Clock::now();
  stats.heartbeat_age_ms = static_cast<double>(now.time_since_epoch().count() - beat) / 1e6;
  stats.tokens_per_second = stats.generated.per_second(now);
  return stats;
}

void Engine::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    woken_ = true;
    wakeup_.notify_one();
  }
  const std::lock_guard<std::mutex> lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

// Whatever goes wrong in the loop ends every stream with a typed error, never silently (W-46).
void Engine::loop() {
  // On a CPU this thread computes; with a device it only says what to compute next, and that must not wait.
  if (device_.id == "cpu") let_others_preempt(options_.compute_nice);
  std::string failure;
  ErrorCode code = ErrorCode::kUnavailable;
  try {
    run_loop();
  } catch (const Error& error) {
    code = error.code();
    failure = error.what();
  } catch (const std::exception& error) {
    code = ErrorCode::kInternal;
    failure = error.what();
  }
  std::vector<std::function<void()>> errands;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_.failure = failure;
    if (!failure.empty()) stats_.failure_code = to_string(code);
    stopping_ = true;
    errands.swap(errands_);
    for (auto& job : inbox_) jobs_.emplace(job->handle(), job);
    inbox_.clear();
  }
  const std::string message = failure.empty() ? "the worker is shutting down" : "the engine failed";
  deliver_tokens();
  while (!jobs_.empty()) finish(jobs_.begin()->second.get(), code, message);
  for (const auto& errand : errands) errand();
  flush_ready();
  counters_.failure = failure;
  if (!failure.empty()) counters_.failure_code = to_string(code);
  publish_stats();
}

void Engine::run_loop() {
  bool is_busy = false;
  for (;;) {
    heartbeat_ns_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    bool was_idle = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (!is_busy && !woken_) {
        was_idle = !scheduler_->has_work();
        wakeup_.wait_until(lock, std::min(next_timer(), Clock::now() + kHeartbeat), [this] { return woken_; });
      }
      if (stopping_) return;
      if (was_idle && batch_window() > 0 && !inbox_.empty()) {
        const auto window = Clock::now() + std::chrono::milliseconds(batch_window());
        wakeup_.wait_until(lock, window, [this] { return stopping_; });
      }
      woken_ = false;
    }
    take_inbox();
    if (expire_jobs()) {
      // Their blocks are free: nobody waits for the step to hear of it.
      publish_stats();
      flush_ready();
    }
    if (!steps_.empty() && !can_plan_blindly()) end_step();
    const bool began = scheduler_->has_work() && begin_step();
    // One step may stay with the device, so that it has the next to compute when that is done.
    const size_t num_ahead = began && options_.run_ahead && backend_->runs_ahead() ? 1 : 0;
    const bool ends = steps_.size() > num_ahead;
    while (steps_.size() > num_ahead) end_step();
    // A step that had nothing to compute, because all that waits needs blocks of paused sequences, is not tried again
    // before something changes.
    is_busy = !steps_.empty() || ((began || ends) && scheduler_->has_work());
    if (!is_busy) catch_up();
    // In this order, so that who is woken sees the ledger after what woke it.
    publish_stats();
    flush_ready();
  }
}

void Engine::take_inbox() {
  std::vector<std::shared_ptr<Job>> arrived;
  std::vector<std::function<void()>> errands;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    arrived.swap(inbox_);
    errands.swap(errands_);
  }
  for (auto& job : arrived) {
    if (job->spec.grammar) job->mask = masks_.start(job->spec.grammar);
    scheduler_->add(&job->sequence);
    jobs_.emplace(job->handle(), std::move(job));
  }
  if (!errands.empty()) catch_up();
  for (const auto& errand : errands) errand();
}

// Ends jobs whose reader cancelled, whose time is over, whose reader takes nothing or whose answer can only end; pauses
// and resumes those whose reader is slow or whose mask is late.
bool Engine::expire_jobs() {
  const Clock::time_point now = Clock::now();
  std::vector<Job*> cancelled, late, slow, complete_now;
  for (auto& [handle, job] : jobs_) {
    if (job->cancel_requested()) {
      cancelled.push_back(job.get());
      continue;
    }
    if (job->deadline && now >= *job->deadline) {
      late.push_back(job.get());
      continue;
    }
    const bool full = job->num_undelivered() >= options_.max_undelivered_tokens;
    if (job->mask) {
      const NextMask::State state = masks_.state(*job->mask);
      if (state == NextMask::State::kComplete && job->admitted_at) {
        complete_now.push_back(job.get());
        continue;
      }
      job->awaits_mask = job->awaits_mask && state == NextMask::State::kPending;
    }
    job->sequence.paused = full || job->awaits_mask;
    if (!full) {
      job->paused_at.reset();
    } else if (!job->paused_at) {
      job->paused_at = now;
    } else if (now - *job->paused_at >= std::chrono::milliseconds(options_.slow_reader_timeout_ms)) {
      slow.push_back(job.get());
    }
  }
  const bool none = cancelled.empty() && late.empty() && slow.empty() && complete_now.empty();
  if (!none) deliver_tokens();
  for (Job* job : cancelled) finish(job, ErrorCode::kCancelled, "the job was cancelled");
  for (Job* job : complete_now) complete(job, StopReason::kEos, job->text.finish());
  for (Job* job : late) finish(job, ErrorCode::kInferenceTimeout, "the job's time limit passed");
  for (Job* job : slow) finish(job, ErrorCode::kSlowConsumer, "the stream's reader took nothing for too long");
  return !none;
}

// When something may have to be done although no step is running: a deadline, or a look at a paused reader.
Clock::time_point Engine::next_timer() const {
  Clock::time_point next = Clock::time_point::max();
  for (const auto& [handle, job] : jobs_) {
    if (job->deadline) next = std::min(next, *job->deadline);
    if (job->paused_at) next = std::min(next, Clock::now() + std::chrono::milliseconds(5));
  }
  return next;
}

MetricsEvent Engine::metrics_of(const Job& job) const {
  MetricsEvent metrics;
  metrics.tokens_in = static_cast<uint32_t>(job.sequence.num_prompt_tokens);
  metrics.tokens_out = job.num_tokens_out();
  metrics.cached_tokens = static_cast<uint32_t>(job.sequence.num_cached_tokens);
  const Clock::time_point now = Clock::now();
  metrics.queue_ms = ms_between(job.submitted_at, job.admitted_at.value_or(now));
  if (job.admitted_at) metrics.prefill_ms = ms_between(*job.admitted_at, job.first_token_at.value_or(now));
  if (job.first_token_at) {
    metrics.first_token_ms = ms_between(job.submitted_at, *job.first_token_at);
    metrics.decode_ms = ms_between(*job.first_token_at, job.last_token_at);
  }
  if (metrics.tokens_out > 1 && metrics.decode_ms > 0) {
    metrics.tokens_per_second = (metrics.tokens_out - 1) * 1000.0 / metrics.decode_ms;
  }
  return metrics;
}

void Engine::finish(Job* job, ErrorCode code, const std::string& message) {
  Outcome outcome;
  outcome.error_code = to_string(code);
  outcome.error_message = message;
  end_job(job, std::move(outcome), "");
}

void Engine::complete(Job* job, StopReason reason, std::string rest) {
  Outcome outcome;
  outcome.stop_reason = reason;
  if (reason == StopReason::kStopSequence) outcome.stop_sequence = job->text.stop_sequence();
  end_job(job, std::move(outcome), std::move(rest));
}

// The one place where a job ends: its blocks are free before its reader can know.
void Engine::end_job(Job* job, Outcome outcome, std::string rest) {
  scheduler_->remove(&job->sequence);
  if (!job->sequence.admitted_before) {
    const std::lock_guard<std::mutex> lock(mutex_);
    --num_queued_;
    num_queued_tokens_ -= job->sequence.num_prompt_tokens;
  }
  outcome.metrics = metrics_of(*job);
  outcome.cache_lookup_ms = job->cache_lookup_ms;
  if (outcome.error_code == to_string(ErrorCode::kCancelled) && job->cancel_requested()) {
    counters_.cancel_s.observe(std::chrono::duration<double>(Clock::now() - job->cancel_requested_at()).count());
  }
  const uint64_t handle = job->handle();
  if (job->finish(std::move(outcome), std::move(rest))) notify(handle);
  jobs_.erase(handle);
}

void Engine::notify(uint64_t handle) { ready_now_.push_back(handle); }

void Engine::flush_ready() {
  if (ready_now_.empty()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ready_.insert(ready_.end(), ready_now_.begin(), ready_now_.end());
  }
  ready_now_.clear();
  const uint64_t one = 1;
  while (write(event_fd_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void Engine::publish_stats() {
  counters_.active_jobs = scheduler_->num_running();
  counters_.total_blocks = pool_->num_total();
  counters_.free_blocks = pool_->num_free();
  counters_.used_blocks = pool_->num_used();
  counters_.cached_blocks = pool_->num_cached();
  counters_.num_preemptions = scheduler_->num_preemptions();
  counters_.num_evictions = pool_->num_evictions();
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_ = counters_;
}

}  // namespace tw
