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
  std::vector<TokenEvent> tokens;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    reported_ready_ = false;
    if (outcome_taken_) return taken;
    if (!started_.empty()) taken.messages.push_back(std::exchange(started_, {}));
    tokens = std::exchange(pending_, {});
    num_pending_tokens_ = 0;
    if (outcome_) {
      taken.outcome = outcome_;
      outcome_taken_ = true;
    }
  }
  for (const TokenEvent& event : tokens) taken.messages.push_back(encode(event, vocabulary));
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
    if (!cancel_requested()) cancel_requested_at_ = Clock::now();
    cancel_requested_.store(true, std::memory_order_relaxed);
    pending_.clear();
    num_pending_tokens_ = 0;
    unreleased_.clear();
  }
  return num_tokens_out();
}

Clock::time_point Job::cancel_requested_at() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cancel_requested_at_;
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

void Job::release_waiting(const std::string& released) {
  if (unreleased_.empty()) return;  // then there is no text either: it came with the last tokens
  if (pending_.empty() || spec.separate_events) {
    pending_.emplace_back();
    pending_.back().first_index = next_index_;
  }
  TokenEvent& event = pending_.back();
  next_index_ += static_cast<uint32_t>(unreleased_.size());
  num_pending_tokens_ += static_cast<int32_t>(unreleased_.size());
  for (SampleResult& result : unreleased_) {
    const auto id = static_cast<uint32_t>(result.id);
    const uint8_t little_endian[4] = {static_cast<uint8_t>(id), static_cast<uint8_t>(id >> 8),
                                      static_cast<uint8_t>(id >> 16), static_cast<uint8_t>(id >> 24)};
    released_hash_.update(little_endian, sizeof little_endian);
    event.ids.push_back(id);
    if (spec.sampling.num_logprobs >= 0) event.logprobs.push_back(std::move(result));
  }
  unreleased_.clear();
  event.text += released;
  event.stream_hash = released_hash_;
}

bool Job::add_token(const SampleResult& result, std::string released) {
  num_tokens_out_.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (cancel_requested()) return false;
  unreleased_.push_back(result);
  if (released.empty()) return false;
  release_waiting(released);
  return mark_ready();
}

bool Job::finish(Outcome outcome, std::string rest) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (outcome_) return false;
  if (!cancel_requested() && outcome.error_code.empty()) release_waiting(rest);
  outcome.digest = released_hash_.hex();
  outcome_ = std::move(outcome);
  return mark_ready();
}

int32_t Job::num_undelivered() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_pending_tokens_;
}

}  // namespace tw
