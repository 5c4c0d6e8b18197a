// Makes the masks of constrained jobs beside the steps that compute their logits, so that neither waits for the other
// longer than it must.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/grammar.h"

namespace tw {

// One job's next mask. While it is pending all of it but the state belongs to a worker thread, else to the engine's.
struct NextMask {
  enum class State { kPending, kTokens, kComplete, kFailed };

  std::shared_ptr<const Grammar> grammar;
  std::unique_ptr<Constraint> constraint;  // made with the first mask
  std::optional<int32_t> accepted;         // to go on by, before the next mask
  std::vector<uint32_t> bits;              // for kTokens
  std::string error;                       // for kFailed

  // Guarded by the worker's mutex.
  State state = State::kPending;
  bool missed = false;  // the engine went on without it, and wants to be woken
};

class MaskWorker {
 public:
  // `on_ready` is called, on a worker's thread, when a mask that wait() gave up is there.
  explicit MaskWorker(std::function<void()> on_ready) : on_ready_(std::move(on_ready)) {}
  ~MaskWorker();
  MaskWorker(const MaskWorker&) = delete;
  MaskWorker& operator=(const MaskWorker&) = delete;

  // Begins a job's first mask.
  std::shared_ptr<NextMask> start(std::shared_ptr<const Grammar> grammar);
  // Begins the mask that follows `token`.
  void accept(const std::shared_ptr<NextMask>& mask, int32_t token);
  // The state; if it is kPending, waits for another until `deadline`.
  NextMask::State wait(NextMask* mask, std::chrono::steady_clock::time_point deadline);
  NextMask::State state(const NextMask& mask) const;

 private:
  void begin(std::shared_ptr<NextMask> mask);
  void run();
  static NextMask::State compute(NextMask* mask);

  const std::function<void()> on_ready_;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable done_;
  std::deque<std::shared_ptr<NextMask>> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;  // started with the first mask
};

}  // namespace tw
