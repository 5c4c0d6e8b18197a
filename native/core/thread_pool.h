// A fixed set of threads that run one body together, for kernels that last microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace tw {

// The caller is thread 0. Between bodies the others spin for a short while, since a decode step starts a body every few
// microseconds, and then sleep in the kernel, so an idle engine uses no processor time. Only one thread may call `run`.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Calls body(thread_index) once on every thread and returns when all are done. `body` must not throw.
  template <class Body>
  void run(const Body& body) {
    if (num_threads_ == 1) {
      body(0);
      return;
    }
    dispatch([](const void* context, int thread) { (*static_cast<const Body*>(context))(thread); }, &body);
  }

  // Calls body(item, thread_index) for every item in [0, num_items), handing items out one by one, so that a thread
  // that the system holds up delays one item only. Which thread computes an item must not matter to the result.
  template <class Body>
  void for_each(int64_t num_items, const Body& body) {
    if (num_threads_ == 1 || num_items <= 1) {
      for (int64_t item = 0; item < num_items; ++item) body(item, 0);
      return;
    }
    next_item_.store(0, std::memory_order_relaxed);
    run([&](int thread) {
      for (;;) {
        const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
        if (item >= num_items) return;
        body(item, thread);
      }
    });
  }

 private:
  using Entry = void (*)(const void* context, int thread);

  void dispatch(Entry entry, const void* context);
  void work(int thread);

  const int num_threads_;
  std::vector<std::thread> threads_;

  // Written by the caller before it raises `round_`, read by the others after they saw it rise.
  Entry entry_ = nullptr;
  const void* context_ = nullptr;
  bool stopping_ = false;

  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int64_t> next_item_{0};
};

}  // namespace tw
