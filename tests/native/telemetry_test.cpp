// What the engine counts: histograms with closed upper bounds, and a rate that forgets.
#include "engine/telemetry.h"

#include "check.h"

using std::chrono::milliseconds;
using std::chrono::seconds;
using tw::Histogram;
using tw::RateWindow;

TEST(an_observation_counts_in_the_first_bucket_that_holds_it) {
  Histogram histogram({1, 2, 5});
  for (const double value : {0.5, 1.0, 1.5, 5.0, 5.1, 100.0}) histogram.observe(value);
  CHECK(histogram.counts == std::vector<int64_t>({2, 1, 1, 2}));
  CHECK(histogram.sum > 113.0 && histogram.sum < 113.2);
}

TEST(bounds_rise) {
  for (const auto& bounds : {tw::inter_token_bounds_s(), tw::batch_size_bounds(), tw::cancel_bounds_s()}) {
    CHECK(!bounds.empty() && bounds.front() > 0);
    for (size_t i = 1; i < bounds.size(); ++i) CHECK(bounds[i - 1] < bounds[i]);
  }
}

TEST(a_rate_is_that_of_the_last_ten_seconds) {
  RateWindow window;
  const auto start = RateWindow::Clock::now();
  for (int32_t i = 0; i < 200; ++i) window.add(start + milliseconds(100 * i), 5);
  const auto end = start + seconds(20);
  // 50 a second, up to the part of a second at the window's older end.
  CHECK(window.per_second(end) > 40 && window.per_second(end) <= 50.1);
  CHECK(window.per_second(end + seconds(5)) < 30);
  CHECK_EQ(window.per_second(end + seconds(11)), 0.0);
}

TEST(a_rate_at_the_start_is_over_the_time_there_was) {
  RateWindow window;
  const auto start = RateWindow::Clock::now();
  window.add(start, 30);
  CHECK(window.per_second(start + milliseconds(10)) <= 30.0);
  CHECK(window.per_second(start + seconds(3)) > 9.0);
}

TEST(a_slot_is_not_counted_again_when_its_second_comes_round) {
  RateWindow window;
  const auto start = RateWindow::Clock::now();
  window.add(start, 1000);
  window.add(start + seconds(10), 1);  // the same slot, ten seconds later
  CHECK(window.per_second(start + seconds(10)) < 1.2);
}
