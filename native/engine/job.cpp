#include "engine/job.h"

#include <utility>

namespace tw {

Job::Job(uint64_t handle, JobSpec job_spec)
    : spec(std::move(job_spec)), text(spec.stops), submitted_at(Clock::now()), handle_(handle) {
  last_token_at = submitted_at;
  if (spec.timeout_ms > 0) deadline = submitted_at + std::chrono::milliseconds(spec.timeout_ms);
  sequence.id = handle;
  sequence.priority = spec.priority;
  sequence.cache_salt = spec.cache_salt;
  sequence.tokens = spec.prompt_ids;
  sequence.num_prompt_tokens = static_cast<int32_t>(spec.prompt_ids.size());
  sequence.max_total_tokens = sequence.num_prompt_tokens + spec.max_tokens;
}

bool Job::mark_ready() { return !std::exchange(reported_ready_, true); }

Taken Job::take(const std::vector<std::string>& vocabulary) {
  Taken taken;
  TokenEvent tokens;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    reported_ready_ = false;
    if (outcome_taken_) return taken;
    if (!started_.empty()) taken.messages.push_back(std::exchange(started_, {}));
    tokens = std::exchange(pending_, {});
    if (outcome_) {
      taken.outcome = outcome_;
      outcome_taken_ = true;
    }
  }
  if (!tokens.ids.empty()) taken.messages.push_back(encode(tokens, vocabulary));
  if (taken.outcome) {
    const Outcome& outcome = *taken.outcome;
    taken.messages.push_back(encode(outcome.metrics));
    if (outcome.error_code.empty()) {
      EndEvent end;
      end.tokens_out = outcome.metrics.tokens_out;
      end.decode_time_ms = static_cast<uint64_t>(outcome.metrics.decode_ms);
      end.stop_reason = outcome.stop_reason;
      end.stop_sequence = outcome.stop_sequence;
      end.digest = outcome.digest;
      taken.messages.push_back(encode(end));
    }
  }
  return taken;
}

uint32_t Job::cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!outcome_) {
    cancel_requested_.store(true, std::memory_order_relaxed);
    pending_ = {};
    unreleased_.clear();
  }
  return num_tokens_out();
}

bool Job::finished() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return outcome_.has_value();
}

bool Job::start(StartedEvent event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  started_ = encode(event);
  return mark_ready();
}

void Job::release_waiting() {
  if (unreleased_.empty()) return;
  if (pending_.ids.empty()) pending_.first_index = next_index_;
  next_index_ += static_cast<uint32_t>(unreleased_.size());
  for (SampleResult& result : unreleased_) {
    pending_.ids.push_back(static_cast<uint32_t>(result.id));
    if (spec.sampling.num_logprobs >= 0) pending_.logprobs.push_back(std::move(result));
  }
  unreleased_.clear();
}

bool Job::add_token(const SampleResult& result, std::string released) {
  num_tokens_out_.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (cancel_requested()) return false;
  unreleased_.push_back(result);
  if (released.empty()) return false;
  release_waiting();
  pending_.text += released;
  return mark_ready();
}

bool Job::finish(Outcome outcome, std::string rest) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (outcome_) return false;
  if (!cancel_requested()) {
    release_waiting();
    pending_.text += rest;
  }
  outcome_ = std::move(outcome);
  return mark_ready();
}

int32_t Job::num_undelivered() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int32_t>(pending_.ids.size());
}

}  // namespace tw
