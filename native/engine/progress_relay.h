// Hands a load's progress to a reporter that may have to wait, such as for Python's lock, without the load waiting too.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace tw {

class ProgressRelay {
 public:
  // `report` is called with every percentage in order, on a thread of its own.
  explicit ProgressRelay(std::function<void(int)> report);
  // Waits for a report under way; those that wait are dropped.
  ~ProgressRelay();
  ProgressRelay(const ProgressRelay&) = delete;
  ProgressRelay& operator=(const ProgressRelay&) = delete;

  // Throws what an earlier report threw: that is how a reporter abandons the load.
  void post(int percent);
  // Waits until everything was reported; throws what a report threw. Nothing is posted afterwards.
  void finish();

 private:
  void run();
  void join();

  const std::function<void(int)> report_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<int> waiting_;
  bool closed_ = false;
  bool dropped_ = false;
  std::exception_ptr failure_;
  std::thread thread_;  // last: starts when all else is ready
};

}  // namespace tw
