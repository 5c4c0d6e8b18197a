// One submitted generation, as its two sides see it: the engine thread produces, a reader takes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/sampling.h"
#include "core/sha256.h"
#include "engine/event_encoder.h"
#include "engine/grammar.h"
#include "engine/mask_worker.h"
#include "engine/scheduler.h"
#include "engine/text_output.h"

namespace tw {

using Clock = std::chrono::steady_clock;

// What submit() takes.
struct JobSpec {
  std::string job_id;
  std::string model;
  std::vector<int32_t> prompt_ids;
  int32_t max_tokens = 0;
  SamplingParams sampling;
  std::vector<std::string> stops;
  int64_t timeout_ms = 0;  // 0 for none
  std::string cache_salt;
  int32_t priority = 0;
  std::shared_ptr<const Grammar> grammar;  // what the answer must be; null for anything
  bool separate_events = false;  // text that was released on its own stays an event of its own, also while it waits
};

struct Outcome {
  std::string error_code;  // empty for a completed job
  std::string error_message;
  StopReason stop_reason = StopReason::kNone;
  std::string stop_sequence;
  std::string digest;
  double cache_lookup_ms = 0;
  MetricsEvent metrics;
};

// What take() gives.
struct Taken {
  std::vector<std::string> messages;
  std::optional<Outcome> outcome;
};

class Job {
 public:
  Job(uint64_t handle, JobSpec spec);

  // --- Any thread. ---
  uint64_t handle() const { return handle_; }
  Taken take(const std::vector<std::string>& vocabulary);
  // Drops what waits and asks the engine to stop the job. Returns the tokens generated so far.
  uint32_t cancel();
  uint32_t num_tokens_out() const { return num_tokens_out_.load(std::memory_order_relaxed); }
  // When; only after cancel_requested().
  Clock::time_point cancel_requested_at() const;
  bool cancel_requested() const { return cancel_requested_.load(std::memory_order_relaxed); }
  bool finished() const;

  // --- Engine thread. Each returns whether the reader must be told, having taken all before. ---
  bool start(StartedEvent event);
  // Records a sampled token. `text` may be empty: then its id travels with the next text.
  bool add_token(const SampleResult& result, std::string text);
  // `rest` is the text still held back. An error leaves it out, with its tokens: what was sent is then the beginning of
  // the whole answer, which half a character or the beginning of a stop sequence would not be.
  bool finish(Outcome outcome, std::string rest);
  // Tokens that wait for the reader.
  int32_t num_undelivered() const;

  // Owned by the engine thread.
  JobSpec spec;
  Sequence sequence;
  TextOutput text;
  std::vector<TokenCount> generated;  // kept only if penalties need it
  std::shared_ptr<NextMask> mask;     // with a grammar
  bool awaits_mask = false;           // computes nothing until its mask is there
  SampleResult undelivered;           // of those in Engine::undelivered_: the token that add_token() has yet to get
  Clock::time_point submitted_at;
  std::optional<Clock::time_point> deadline;
  std::optional<Clock::time_point> admitted_at;
  std::optional<Clock::time_point> first_token_at;
  Clock::time_point last_token_at;
  std::optional<Clock::time_point> paused_at;
  double cache_lookup_ms = 0;  // planning the step that admitted it, in which its prefix was looked up

 private:
  bool mark_ready();
  // Moves the tokens whose text was held back into pending_, with the text.
  void release_waiting(const std::string& released);

  const uint64_t handle_;
  std::atomic<uint32_t> num_tokens_out_{0};
  std::atomic<bool> cancel_requested_{false};

  mutable std::mutex mutex_;
  Clock::time_point cancel_requested_at_;
  bool reported_ready_ = false;
  std::string started_;                   // serialised, until taken
  std::vector<TokenEvent> pending_;       // may be sent; one event, unless the job wants them separate
  int32_t num_pending_tokens_ = 0;        // in pending_
  std::vector<SampleResult> unreleased_;  // tokens whose text is held back
  uint32_t next_index_ = 0;               // of the first token not yet in pending_
  Sha256 released_hash_;                  // over the ids of all tokens before next_index_
  std::optional<Outcome> outcome_;
  bool outcome_taken_ = false;
};

}  // namespace tw
