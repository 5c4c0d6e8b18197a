// A step of the engine: planned, asked of the device, and what it drew given to the jobs.
#include <algorithm>

#include "engine/engine.h"

namespace tw {
namespace {

// How long a step waits for the masks of its constrained jobs, with and without others in it.
constexpr auto kMaskPatience = std::chrono::milliseconds(1);
constexpr auto kMaskPatienceAlone = std::chrono::milliseconds(100);

}  // namespace

// Whether the next step can be planned without knowing what the one that is computed draws: what a job draws next may
// depend on it, by a penalty or a grammar.
bool Engine::can_plan_blindly() const {
  return std::all_of(steps_.back().drawn.begin(), steps_.back().drawn.end(), [&](uint64_t handle) {
    const auto job = jobs_.find(handle);
    return job == jobs_.end() || (!job->second->mask && !job->second->spec.sampling.has_penalties());
  });
}

// Asks the device for a step. False if there was nothing that could be computed.
bool Engine::begin_step() {
  const Clock::time_point begin = Clock::now();
  scheduler_->plan(&plan_, &scheduled_, &admitted_);
  const Clock::time_point now = Clock::now();
  const auto wall = std::chrono::system_clock::now().time_since_epoch();
  for (const Sequence* sequence : admitted_) {
    Job* job = jobs_.at(sequence->id).get();
    job->admitted_at = now;
    job->cache_lookup_ms = std::chrono::duration<double, std::milli>(now - begin).count();
    if (options_.prefix_cache)
      ++(sequence->num_cached_tokens > 0 ? counters_.num_cache_hits : counters_.num_cache_misses);
    StartedEvent event;
    event.job_id = job->spec.job_id;
    event.model = job->spec.model;
    event.unix_seconds = std::chrono::duration_cast<std::chrono::seconds>(wall).count();
    event.nanos = static_cast<int32_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(wall).count() % 1000000000);
    event.seed = job->spec.sampling.seed;
    event.prompt_tokens = static_cast<uint32_t>(sequence->num_prompt_tokens);
    event.cached_tokens = static_cast<uint32_t>(sequence->num_cached_tokens);
    if (job->start(std::move(event))) notify(job->handle());
    counters_.num_cached_tokens += sequence->num_cached_tokens;
    counters_.num_prompt_tokens += sequence->num_prompt_tokens;
    const std::lock_guard<std::mutex> lock(mutex_);
    --num_queued_;
    num_queued_tokens_ -= sequence->num_prompt_tokens;
  }
  if (plan_.token_ids.empty()) return false;

  StepInFlight step;
  try {
    compute(&step);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kVramOom && error.code() != ErrorCode::kInsufficientVram) throw;
    fail_largest(error.what());
    return true;
  }
  // A job whose mask is late has its last token computed again, with the same result, once the mask is there.
  for (size_t i = 0, next = 0; i < scheduled_.size() && next < step.drawn.size(); ++i) {
    if (scheduled_[i]->id != step.drawn[next]) continue;
    if (step.mask_states[next] == NextMask::State::kPending) {
      --plan_.slices[i].num_rows;
    } else {
      scheduled_[i]->pending_draw = static_cast<int32_t>(next);
      ++scheduled_[i]->num_draws_in_flight;
    }
    ++next;
  }
  scheduler_->commit(plan_, scheduled_);
  ++counters_.num_steps;
  counters_.last_batch_size = static_cast<int32_t>(scheduled_.size());
  counters_.batch_size.observe(static_cast<double>(scheduled_.size()));
  steps_.push_back(std::move(step));
  return true;
}

// Waits for the oldest step that the device was asked for, and gives its jobs what it drew.
void Engine::end_step() {
  deliver_tokens();
  backend_->take_draws(&samples_);
  const StepInFlight step = std::move(steps_.front());
  steps_.pop_front();
  for (size_t i = 0; i < step.drawn.size(); ++i) {
    const auto found = jobs_.find(step.drawn[i]);
    if (found == jobs_.end()) continue;  // it ended before it was known that it did not need this
    Job* job = found->second.get();
    if (step.mask_states[i] != NextMask::State::kPending && --job->sequence.num_draws_in_flight == 0) {
      job->sequence.pending_draw = -1;
    }
    switch (step.mask_states[i]) {
      case NextMask::State::kTokens: handle_token(job, &samples_[i]); break;
      case NextMask::State::kPending: job->awaits_mask = job->sequence.paused = true; break;
      case NextMask::State::kComplete: complete(job, StopReason::kEos, job->text.finish()); break;
      case NextMask::State::kFailed:
        finish(job, ErrorCode::kInvalidRequest, "response_format: " + job->mask->error);
        break;
    }
  }
}

void Engine::compute(StepInFlight* step) {
  faults_.apply(num_steps_begun_++, backend_.get());
  model_->forward(backend_.get(), plan_);
  catch_up();
  flush_ready();
  sample_jobs_.clear();
  const Clock::time_point now = Clock::now();
  for (size_t i = 0; i < scheduled_.size(); ++i) {
    const Sequence& sequence = *scheduled_[i];
    if (plan_.slices[i].position + plan_.slices[i].num_rows != sequence.length()) continue;
    Job* job = jobs_.at(sequence.id).get();
    SampleJob draw = {&job->spec.sampling, &job->generated,
                      static_cast<uint64_t>(sequence.length() - sequence.num_prompt_tokens), nullptr};
    NextMask::State state = NextMask::State::kTokens;
    if (job->mask) {
      state = await_mask(job, now, scheduled_.size() == 1);
      if (state == NextMask::State::kTokens) {
        draw.mask = job->mask->bits.data();
      } else {
        draw.params = &unused_draw_;  // the row is there, its draw is of no use
      }
    }
    step->drawn.push_back(sequence.id);
    step->mask_states.push_back(state);
    sample_jobs_.push_back(draw);
  }
  backend_->draw(sample_jobs_);
}

// Masks are made while the step computes, and are nearly always there before it is over. One that is not holds up
// others only so long: its job then computes again what it needs, when it is there.
NextMask::State Engine::await_mask(Job* job, Clock::time_point now, bool alone) {
  return masks_.wait(job->mask.get(), now + (alone ? kMaskPatienceAlone : kMaskPatience));
}

// A step had no memory (W-44). The job that asked the most of it ends, the latest of equals; nothing of the step was
// committed, so the others compute the same again in the next one.
void Engine::fail_largest(const std::string& message) {
  backend_->abandon_step();
  counters_.memory = backend_->memory_use();
  ++counters_.num_out_of_memory;
  size_t largest = 0;
  for (size_t i = 1; i < plan_.slices.size(); ++i) {
    if (plan_.slices[i].num_rows >= plan_.slices[largest].num_rows) largest = i;
  }
  const uint64_t handle = scheduled_[largest]->id;
  while (!steps_.empty()) end_step();
  deliver_tokens();
  const auto job = jobs_.find(handle);
  if (job != jobs_.end()) finish(job->second.get(), ErrorCode::kVramOom, message);
}

void Engine::handle_token(Job* job, SampleResult* result) {
  if (!result->finite) {
    finish(job, ErrorCode::kInternal, "the model produced a value that is not finite");
    return;
  }
  const Clock::time_point now = Clock::now();
  const bool is_stop = is_stop_token_[static_cast<size_t>(result->id)] != 0;
  const bool is_first = !job->first_token_at;
  if (is_first) {
    job->first_token_at = now;
  } else if (!is_stop) {
    counters_.inter_token_s.observe(std::chrono::duration<double>(now - job->last_token_at).count());
  }
  job->last_token_at = now;
  if (is_stop) {
    complete(job, StopReason::kEos, job->text.finish());
    return;
  }
  ++counters_.num_generated_tokens;
  counters_.generated.add(now, 1);
  Sequence& sequence = job->sequence;
  sequence.tokens.push_back(result->id);
  if (job->spec.sampling.has_penalties()) {
    const auto known = std::find_if(job->generated.begin(), job->generated.end(),
                                    [&](const TokenCount& token) { return token.id == result->id; });
    if (known != job->generated.end()) {
      ++known->count;
    } else {
      job->generated.push_back({result->id, 1});
    }
  }
  const bool is_last = sequence.num_tokens() == sequence.max_total_tokens;
  // A text that may end the job cannot wait, and nobody should wait for a first token.
  if (backend_->computes_beside_host() && job->spec.stops.empty() && !is_first && !is_last) {
    if (job->mask) masks_.accept(job->mask, result->id);
    job->undelivered = std::move(*result);
    undelivered_.push_back(job);
    return;
  }
  deliver(job, *result);
  if (job->text.stopped()) {
    complete(job, StopReason::kStopSequence, "");
  } else if (is_last) {
    std::string rest = job->text.finish();
    const StopReason reason = job->text.stopped() ? StopReason::kStopSequence : StopReason::kMaxTokens;
    complete(job, reason, std::move(rest));
  } else if (job->mask) {
    masks_.accept(job->mask, result->id);
  }
}

void Engine::deliver(Job* job, const SampleResult& result) {
  if (job->add_token(result, job->text.push(vocabulary_[static_cast<size_t>(result.id)]))) notify(job->handle());
}

void Engine::deliver_tokens() {
  for (Job* job : undelivered_) deliver(job, job->undelivered);
  undelivered_.clear();
}

// What the last step left for the time in which the device is busy.
void Engine::catch_up() {
  deliver_tokens();
  scheduler_->publish_generated();
}

}  // namespace tw
