// What the engine counts for its operators. The engine thread writes, and publishes a copy once a step, so that
// counting a token costs an addition and reading costs the engine nothing.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

namespace tw {

// Counts of observations by upper bound. `counts[i]` holds those in (bounds[i-1], bounds[i]], the last those above.
struct Histogram {
  explicit Histogram(std::vector<double> upper_bounds)
      : bounds(std::move(upper_bounds)), counts(bounds.size() + 1, 0) {}

  void observe(double value) {
    const auto place = std::lower_bound(bounds.begin(), bounds.end(), value);
    ++counts[static_cast<size_t>(place - bounds.begin())];
    sum += value;
  }

  std::vector<double> bounds;
  std::vector<int64_t> counts;
  double sum = 0;
};

// Events a second over the last ten seconds, or since the start if that is less.
class RateWindow {
 public:
  using Clock = std::chrono::steady_clock;

  void add(Clock::time_point now, int64_t count) {
    const int64_t second = second_of(now);
    Slot& slot = slots_[static_cast<size_t>(second % kSeconds)];
    if (slot.second != second) slot = {second, 0};
    slot.count += count;
  }

  double per_second(Clock::time_point now) const {
    const int64_t second = second_of(now);
    int64_t count = 0;
    for (const Slot& slot : slots_) {
      if (slot.second > second - kSeconds && slot.second <= second) count += slot.count;
    }
    const double since_start = std::chrono::duration<double>(now - start_).count();
    const double covered =
        std::chrono::duration<double>(now.time_since_epoch()).count() - static_cast<double>(second - kSeconds + 1);
    return static_cast<double>(count) / std::max(1.0, std::min(covered, since_start));
  }

 private:
  struct Slot {
    int64_t second = -1;
    int64_t count = 0;
  };

  static constexpr int64_t kSeconds = 10;
  static int64_t second_of(Clock::time_point time) {
    return std::chrono::duration_cast<std::chrono::seconds>(time.time_since_epoch()).count();
  }

  Clock::time_point start_ = Clock::now();
  std::array<Slot, static_cast<size_t>(kSeconds)> slots_;
};

// Bounds follow what was measured: a GPU steps in half a millisecond to ten, a small model on a CPU in ten to fifty,
// and a step with a chunk of a prompt takes up to some seconds.
inline std::vector<double> inter_token_bounds_s() {
  return {0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03,
          0.05,   0.075, 0.1,   0.15,  0.25,  0.5,    1,    2.5,   5,    10};
}
inline std::vector<double> batch_size_bounds() { return {1, 2, 3, 4, 5, 8, 12, 16, 20, 32, 64, 128}; }
// A cancel takes one step.
inline std::vector<double> cancel_bounds_s() { return {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5}; }

}  // namespace tw
