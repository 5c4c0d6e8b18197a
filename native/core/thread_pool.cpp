#include "core/thread_pool.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

#include "core/thread_priority.h"

namespace tw {
namespace {

// Tens of microseconds of spinning, then sleep: the gaps between the rounds of a step are shorter.
constexpr int kSpins = 2000;

constexpr uint64_t kOpen = uint64_t{1} << 16;
constexpr uint64_t kActiveMask = kOpen - 1;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

int num_memory_threads() {
  constexpr int kMost = 8;
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMost);
}

ThreadPool::ThreadPool(int num_threads, int nice)
    : num_threads_(num_threads < 1 ? 1 : num_threads), ranges_(static_cast<size_t>(num_threads_)) {
  threads_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int thread = 1; thread < num_threads_; ++thread) {
    threads_.emplace_back([this, thread, nice] {
      let_others_preempt(nice);
      work(thread);
    });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(&round_);
  for (std::thread& thread : threads_) thread.join();
}

// The order "raise round_, then look at sleeping_" here and "raise sleeping_, then look at round_" in work() means that
// at least one side sees the other; both are sequentially consistent for that.
void ThreadPool::run(Entry entry, const void* context) {
  entry_ = entry;
  context_ = context;
  const uint32_t round = round_.load(std::memory_order_relaxed) + 1;
  state_.store(uint64_t{round} << 32 | kOpen, std::memory_order_release);
  round_.store(round, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&round_);
  entry(context, 0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; (state_.load(std::memory_order_acquire) & kActiveMask) != 0; ++spins) {
    if (spins < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

bool ThreadPool::join_round(uint32_t round) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (state >> 32 == round && (state & kOpen) != 0) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      return true;
    }
  }
  return false;
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    uint32_t round;
    while ((round = round_.load(std::memory_order_acquire)) == seen) {
      if (++spins < kSpins) {
        pause_cpu();
        continue;
      }
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      if (round_.load(std::memory_order_seq_cst) == seen) futex_wait(&round_, seen);
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = round;
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (!join_round(round)) continue;
    entry_(context_, thread);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace tw
