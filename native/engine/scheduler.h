// Which sequences compute which tokens in the next step. Pure policy: no threads, no tensors, no clock.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/step.h"
#include "engine/kv_pool.h"

namespace tw {

// What the scheduler knows of a job.
struct Sequence {
  uint64_t id = 0;
  int32_t priority = 0;  // its class: higher ones go first; in a class, in order of arrival
  std::string cache_salt;
  std::vector<int32_t> tokens;  // prompt, then generated
  int32_t num_prompt_tokens = 0;
  int32_t max_total_tokens = 0;  // prompt + max_tokens

  // Owned by the scheduler.
  int32_t num_computed = 0;       // leading tokens whose keys and values the steps asked for put into the cache
  int32_t num_cached_tokens = 0;  // of the prompt, found in the prefix cache at the first admission
  // Set by the engine: draws that the device has yet to tell, and the last one's index in its step, or -1.
  int32_t num_draws_in_flight = 0;
  int32_t pending_draw = -1;
  std::vector<int32_t> block_table;
  int32_t num_published = 0;  // leading blocks offered to the prefix cache
  KvPool::Hash chain{};       // hash of the last of those
  int32_t num_overtaken = 0;  // later arrivals of higher classes that were put before it
  bool admitted_before = false;
  bool paused = false;  // keeps its blocks, computes nothing

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  // With the one that is drawn.
  int32_t length() const { return num_tokens() + (pending_draw >= 0 ? 1 : 0); }
};

struct SchedulerLimits {
  int32_t max_rows = 0;       // tokens in a step
  int32_t max_running = 0;    // sequences that hold blocks
  int32_t max_lone_rows = 0;  // tokens in a step in which no sequence waits for its next token, if more than max_rows
};

// How many later arrivals of higher classes may be put before a waiting sequence: after that it is overtaken no more,
// so that no class starves another.
constexpr int32_t kMaxOvertaken = 32;

// Continuous batching with chunked prefill. Each step: first every running sequence that waits for its next token (one
// row each), then prompt chunks by class, in a class those of running sequences before newly admitted ones, until the
// row budget is spent, which is larger while there is no stream to hold up. If a running sequence needs a block and
// none can be had, the youngest of the lowest class is preempted: it gives its blocks back, waits at the front of its
// class, and later recomputes exactly what it had (invisible: W-42).
class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, KvPool* pool) : limits_(limits), pool_(pool) {}

  // Whether a sequence of this many tokens could ever run alone.
  bool can_ever_fit(int32_t max_total_tokens) const;

  // Queues a sequence; the caller keeps it alive until remove().
  void add(Sequence* sequence);
  // Forgets a sequence and gives back its blocks.
  void remove(Sequence* sequence);

  // Plans a step. `scheduled[i]` is the sequence of plan slice i; a slice's last row is wanted as logits exactly if it
  // reaches the sequence's last token. `admitted` lists sequences that were admitted for the first time. A token that
  // is still drawn is named as its draw; a sequence that it may complete waits for it.
  void plan(StepPlan* plan, std::vector<Sequence*>* scheduled, std::vector<Sequence*>* admitted);
  // Records that the device was asked for the plan, and publishes the blocks that prompts fill: whoever finds them
  // is computed later.
  void commit(const StepPlan& plan, const std::vector<Sequence*>& scheduled);
  // Publishes the blocks that generated tokens filled: whenever there is time, at the latest when they are released.
  void publish_generated();

  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }
  int32_t num_waiting() const { return static_cast<int32_t>(waiting_.size()); }
  int64_t num_preemptions() const { return num_preemptions_; }
  // Whether plan() could give work.
  bool has_work() const;
  std::string audit() const;

 private:
  bool admit(Sequence* sequence);
  bool grow(Sequence* sequence, int32_t num_tokens);
  void preempt(Sequence* sequence);
  Sequence* victim() const;
  void release_blocks(Sequence* sequence);
  void publish(Sequence* sequence);
  void schedule(Sequence* sequence, int32_t num_rows, StepPlan* plan, std::vector<Sequence*>* scheduled);
  static int32_t blocks_for(int32_t num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

  SchedulerLimits limits_;
  KvPool* pool_;
  std::vector<Sequence*> running_;  // in order of admission: the last is the youngest
  // By class, then arrival; preempted ones first in their class, and what was overtaken often enough where it stands.
  std::deque<Sequence*> waiting_;
  int64_t num_preemptions_ = 0;
};

}  // namespace tw
