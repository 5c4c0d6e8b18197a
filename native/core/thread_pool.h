// A fixed set of threads that share the items of one loop, for kernels that last microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tw {

// Of loops that read or copy much memory: threads, since more do not make one memory faster, and what one takes at a
// time.
int num_memory_threads();
constexpr int64_t kMemoryItemBytes = int64_t{256} << 10;

// The caller is thread 0. Each thread takes the items of a range of its own in order, so that what lies side by side in
// memory is read by one thread, and then helps with the others' ranges. The caller never waits for a thread that has
// not begun: helpers join a round while it is open, so one that the system holds up costs nothing unless it holds an
// item. Between rounds helpers spin for a short while, since a decode step starts one every few microseconds, and then
// sleep in the kernel, so an idle engine uses no processor time. Only one thread may call for_each().
class ThreadPool {
 public:
  // `nice`: how far the helpers stand back behind other threads (thread_priority.h).
  explicit ThreadPool(int num_threads, int nice = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Calls body(item, thread_index) for every item in [0, num_items). Which thread computes an item must not matter to
  // the result. `body` must not throw.
  template <class Body>
  void for_each(int64_t num_items, const Body& body) {
    if (num_threads_ == 1 || num_items <= 1) {
      for (int64_t item = 0; item < num_items; ++item) body(item, 0);
      return;
    }
    for (int range = 0; range < num_threads_; ++range) {
      ranges_[static_cast<size_t>(range)].next.store(num_items * range / num_threads_, std::memory_order_relaxed);
      ranges_[static_cast<size_t>(range)].end = num_items * (range + 1) / num_threads_;
    }
    struct Loop {
      ThreadPool* pool;
      const Body* body;
    };
    const Loop loop = {this, &body};
    run(
        [](const void* context, int thread) {
          const auto& self = *static_cast<const Loop*>(context);
          const int num_ranges = self.pool->num_threads_;
          for (int i = 0; i < num_ranges; ++i) {
            Range& range = self.pool->ranges_[static_cast<size_t>((thread + i) % num_ranges)];
            for (;;) {
              const int64_t item = range.next.fetch_add(1, std::memory_order_relaxed);
              if (item >= range.end) break;
              (*self.body)(item, thread);
            }
          }
        },
        &loop);
  }

 private:
  using Entry = void (*)(const void* context, int thread);

  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void run(Entry entry, const void* context);
  bool join_round(uint32_t round);
  void work(int thread);

  const int num_threads_;
  std::vector<std::thread> threads_;

  // Written by the caller while no helper is in a round; read by helpers that joined one.
  Entry entry_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<bool> stopping_{false};

  // The round's number, whether it is open, and how many helpers are in it: round << 32 | open << 16 | active.
  alignas(64) std::atomic<uint64_t> state_{0};
  // The same number, for the kernel to wait on.
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::vector<Range> ranges_;  // one a thread
};

}  // namespace tw
