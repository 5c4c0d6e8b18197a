#include "engine/scheduler.h"

#include <algorithm>
#include <iterator>
#include <limits>

namespace tw {

bool Scheduler::can_ever_fit(int32_t max_total_tokens) const {
  return blocks_for(max_total_tokens) <= pool_->num_total();
}

void Scheduler::add(Sequence* sequence) {
  auto place = waiting_.end();
  while (place != waiting_.begin()) {
    const Sequence* before = *std::prev(place);
    if (before->priority >= sequence->priority || before->num_overtaken >= kMaxOvertaken) break;
    --place;
  }
  for (auto overtaken = place; overtaken != waiting_.end(); ++overtaken) ++(*overtaken)->num_overtaken;
  waiting_.insert(place, sequence);
}

void Scheduler::remove(Sequence* sequence) {
  running_.erase(std::remove(running_.begin(), running_.end(), sequence), running_.end());
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), sequence), waiting_.end());
  release_blocks(sequence);
}

bool Scheduler::has_work() const {
  const auto active = [](const Sequence* sequence) { return !sequence->paused && sequence->pending_draw < 0; };
  return std::any_of(waiting_.begin(), waiting_.end(), active) ||
         std::any_of(running_.begin(), running_.end(), [](const Sequence* sequence) { return !sequence->paused; });
}

// Of the running sequences, the youngest of the lowest class. The oldest of the highest is thus never preempted, and
// every job finishes in the end.
Sequence* Scheduler::victim() const {
  Sequence* lowest = running_.back();
  for (auto sequence = running_.rbegin(); sequence != running_.rend(); ++sequence) {
    if ((*sequence)->priority < lowest->priority) lowest = *sequence;
  }
  return lowest;
}

// Takes the blocks that hold its first `num_tokens` tokens; preempts others if it must. False if the sequence itself
// was preempted, being the one to go.
bool Scheduler::grow(Sequence* sequence, int32_t num_tokens) {
  while (static_cast<int32_t>(sequence->block_table.size()) < blocks_for(num_tokens)) {
    if (pool_->can_allocate(1)) {
      sequence->block_table.push_back(pool_->allocate());
      continue;
    }
    Sequence* given_up = victim();
    preempt(given_up);
    if (given_up == sequence) return false;
  }
  return true;
}

// Last block first: of a cached prefix the end is then given up before the beginning, without which the rest is lost.
void Scheduler::release_blocks(Sequence* sequence) {
  publish(sequence);
  for (auto block = sequence->block_table.rbegin(); block != sequence->block_table.rend(); ++block) {
    pool_->release(*block);
  }
  sequence->block_table.clear();
}

void Scheduler::preempt(Sequence* sequence) {
  running_.erase(std::remove(running_.begin(), running_.end(), sequence), running_.end());
  release_blocks(sequence);
  sequence->num_computed = 0;
  sequence->num_published = 0;
  ++num_preemptions_;
  const auto place = std::find_if(waiting_.begin(), waiting_.end(),
                                  [&](const Sequence* other) { return other->priority <= sequence->priority; });
  waiting_.insert(place, sequence);
}

// Admits the sequence if the blocks for all its present tokens and one more can be had now. At least its last token is
// computed anew, since its logits are needed.
bool Scheduler::admit(Sequence* sequence) {
  std::vector<int32_t> prefix =
      pool_->acquire_prefix(sequence->cache_salt, sequence->tokens.data(), sequence->num_tokens() - 1);
  const int32_t needed = blocks_for(sequence->num_tokens() + 1) - static_cast<int32_t>(prefix.size());
  if (!pool_->can_allocate(needed)) {
    for (const int32_t block : prefix) pool_->release(block);
    return false;
  }
  sequence->num_published = static_cast<int32_t>(prefix.size());
  sequence->num_computed = sequence->num_published * kBlockTokens;
  sequence->chain = KvPool::root_hash(sequence->cache_salt);
  for (int32_t i = 0; i < sequence->num_published; ++i) {
    sequence->chain = KvPool::chain_hash(sequence->chain, sequence->tokens.data() + i * kBlockTokens);
  }
  sequence->block_table = std::move(prefix);
  for (int32_t i = 0; i < needed; ++i) sequence->block_table.push_back(pool_->allocate());
  running_.push_back(sequence);
  return true;
}

void Scheduler::schedule(Sequence* sequence, int32_t num_rows, StepPlan* plan, std::vector<Sequence*>* scheduled) {
  SequenceSlice slice;
  slice.first_row = plan->num_rows();
  slice.num_rows = num_rows;
  slice.position = sequence->num_computed;
  slice.block_table = sequence->block_table.data();
  const auto begin = sequence->tokens.begin() + sequence->num_computed;
  if (sequence->num_computed == sequence->num_tokens()) {
    plan->token_ids.push_back(-1 - sequence->pending_draw);
  } else {
    plan->token_ids.insert(plan->token_ids.end(), begin, begin + num_rows);
  }
  plan->slices.push_back(slice);
  if (sequence->num_computed + num_rows == sequence->length()) plan->logit_rows.push_back(plan->num_rows() - 1);
  scheduled->push_back(sequence);
}

void Scheduler::plan(StepPlan* plan, std::vector<Sequence*>* scheduled, std::vector<Sequence*>* admitted) {
  plan->clear();
  scheduled->clear();
  admitted->clear();

  // Blocks first, oldest first: growing may preempt others, which then must not be in the plan.
  const std::vector<Sequence*> candidates = running_;
  const int64_t preemptions_before = num_preemptions_;
  const auto still_runs = [&](const Sequence* sequence) {
    return num_preemptions_ == preemptions_before ||
           std::find(running_.begin(), running_.end(), sequence) != running_.end();
  };
  std::vector<Sequence*> decoding;
  for (Sequence* sequence : candidates) {
    if (!still_runs(sequence) || sequence->paused || sequence->length() - sequence->num_computed != 1) continue;
    if (sequence->length() == sequence->max_total_tokens) continue;
    if (grow(sequence, sequence->length())) decoding.push_back(sequence);
  }
  for (Sequence* sequence : decoding) {
    if (plan->num_rows() == limits_.max_rows) break;
    if (!still_runs(sequence)) continue;
    schedule(sequence, 1, plan, scheduled);
  }

  const int32_t max_rows = decoding.empty() ? std::max(limits_.max_rows, limits_.max_lone_rows) : limits_.max_rows;
  const auto prefill = [&](Sequence* sequence) {
    const int32_t left = sequence->num_tokens() - sequence->num_computed;
    const int32_t rows = std::min(left, max_rows - plan->num_rows());
    if (rows > 0) schedule(sequence, rows, plan, scheduled);
  };
  std::vector<Sequence*> prefilling;
  for (Sequence* sequence : running_) {
    if (!sequence->paused && sequence->num_tokens() - sequence->num_computed > 1) prefilling.push_back(sequence);
  }
  std::stable_sort(prefilling.begin(), prefilling.end(),
                   [](const Sequence* a, const Sequence* b) { return a->priority > b->priority; });
  // A preempted sequence whose reader lags is passed over: it would take blocks to compute nothing.
  size_t next = 0;
  bool fits = true;
  const auto admit_above = [&](int64_t priority) {
    while (fits && next < waiting_.size() && plan->num_rows() < max_rows && num_running() < limits_.max_running) {
      Sequence* sequence = waiting_[next];
      if (sequence->paused || sequence->pending_draw >= 0) {
        ++next;
        continue;
      }
      if (sequence->priority <= priority) return;
      fits = admit(sequence);
      if (!fits) return;  // in order: a large job at the front is not overtaken for ever
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(next));
      if (!sequence->admitted_before) {
        sequence->admitted_before = true;
        sequence->num_cached_tokens = std::min(sequence->num_computed, sequence->num_prompt_tokens);
        admitted->push_back(sequence);
      }
      prefill(sequence);
    }
  };
  for (Sequence* sequence : prefilling) {
    admit_above(sequence->priority);
    prefill(sequence);
  }
  admit_above(std::numeric_limits<int64_t>::min());
}

void Scheduler::commit(const StepPlan& plan, const std::vector<Sequence*>& scheduled) {
  for (size_t i = 0; i < scheduled.size(); ++i) {
    Sequence* sequence = scheduled[i];
    sequence->num_computed += plan.slices[i].num_rows;
    // What waits may begin with the same prompt, and is admitted by the next plan.
    if (plan.slices[i].num_rows > 1) publish(sequence);
  }
}

void Scheduler::publish_generated() {
  for (Sequence* sequence : running_) publish(sequence);
}

// Offers the blocks that are full and computed to the prefix cache.
void Scheduler::publish(Sequence* sequence) {
  const int32_t known = std::min(sequence->num_computed, sequence->num_tokens());
  while ((sequence->num_published + 1) * kBlockTokens <= known) {
    const auto index = static_cast<size_t>(sequence->num_published);
    sequence->chain = pool_->publish(sequence->block_table[index], sequence->cache_salt, sequence->chain,
                                     sequence->tokens.data() + index * kBlockTokens);
    ++sequence->num_published;
  }
}

std::string Scheduler::audit() const {
  std::vector<const std::vector<int32_t>*> held;
  for (const Sequence* sequence : running_) held.push_back(&sequence->block_table);
  for (const Sequence* sequence : waiting_) {
    if (!sequence->block_table.empty()) return "a waiting sequence holds blocks";
  }
  return pool_->audit(held);
}

}  // namespace tw
