#include "engine/mask_worker.h"

#include <utility>

namespace tw {
namespace {

// Two, so that one costly language does not hold up all others.
constexpr int kNumThreads = 2;

}  // namespace

MaskWorker::~MaskWorker() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::shared_ptr<NextMask> MaskWorker::start(std::shared_ptr<const Grammar> grammar) {
  auto mask = std::make_shared<NextMask>();
  mask->grammar = std::move(grammar);
  begin(mask);
  return mask;
}

void MaskWorker::accept(const std::shared_ptr<NextMask>& mask, int32_t token) {
  mask->accepted = token;
  begin(mask);
}

void MaskWorker::begin(std::shared_ptr<NextMask> mask) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    mask->state = NextMask::State::kPending;
    mask->missed = false;
    queue_.push_back(std::move(mask));
    while (threads_.size() < kNumThreads) threads_.emplace_back([this] { run(); });
  }
  work_.notify_one();
}

NextMask::State MaskWorker::wait(NextMask* mask, std::chrono::steady_clock::time_point deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait_until(lock, deadline, [mask] { return mask->state != NextMask::State::kPending; });
  mask->missed = mask->state == NextMask::State::kPending;
  return mask->state;
}

NextMask::State MaskWorker::state(const NextMask& mask) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return mask.state;
}

NextMask::State MaskWorker::compute(NextMask* mask) {
  try {
    if (!mask->constraint) mask->constraint = mask->grammar->start();
    if (mask->accepted) mask->constraint->accept(*std::exchange(mask->accepted, std::nullopt));
    return mask->constraint->next(&mask->bits) == Constraint::Next::kTokens ? NextMask::State::kTokens
                                                                            : NextMask::State::kComplete;
  } catch (const std::exception& error) {
    mask->error = error.what();
    return NextMask::State::kFailed;
  }
}

void MaskWorker::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    const std::shared_ptr<NextMask> mask = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    const NextMask::State state = compute(mask.get());
    lock.lock();
    mask->state = state;
    const bool missed = std::exchange(mask->missed, false);
    done_.notify_all();
    if (missed) {
      lock.unlock();
      on_ready_();
      lock.lock();
    }
  }
}

}  // namespace tw
