#include "core/thread_pool.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace tw {
namespace {

// About 50 µs of spinning, then a few yields, then sleep. A decode step has gaps of 1–20 µs between bodies.
constexpr int kSpins = 4000;
constexpr int kYields = 20;

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

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
  threads_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int thread = 1; thread < num_threads_; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  round_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(&round_);
  for (std::thread& thread : threads_) thread.join();
}

// The order "raise round_, then look at sleeping_" here and "raise sleeping_, then look at round_" in work() means that
// at least one side sees the other; both are sequentially consistent for that.
void ThreadPool::dispatch(Entry entry, const void* context) {
  entry_ = entry;
  context_ = context;
  running_.store(num_threads_ - 1, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&round_);
  entry(context, 0);
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (round_.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpins) {
        pause_cpu();
      } else if (spins < kSpins + kYields) {
        std::this_thread::yield();
      } else {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        if (round_.load(std::memory_order_seq_cst) == seen) futex_wait(&round_, seen);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    ++seen;
    if (stopping_) return;
    entry_(context_, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace tw
