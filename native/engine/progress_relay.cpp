#include "engine/progress_relay.h"

#include <utility>

namespace tw {

ProgressRelay::ProgressRelay(std::function<void(int)> report)
    : report_(std::move(report)), thread_([this] { run(); }) {}

ProgressRelay::~ProgressRelay() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped_ = true;
  }
  join();
}

void ProgressRelay::post(int percent) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) std::rethrow_exception(failure_);
  waiting_.push_back(percent);
  changed_.notify_one();
}

void ProgressRelay::finish() {
  join();
  if (failure_) std::rethrow_exception(failure_);
}

void ProgressRelay::join() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void ProgressRelay::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return closed_ || !waiting_.empty(); });
    if (waiting_.empty() || dropped_ || failure_) return;
    const int percent = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    std::exception_ptr failure;
    try {
      report_(percent);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    failure_ = failure;
  }
}

}  // namespace tw
