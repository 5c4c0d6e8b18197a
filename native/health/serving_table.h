// What `grpc.health.v1` answers now, kept where any thread can read it at no cost.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tw::health {

using Clock = std::chrono::steady_clock;

// `HealthCheckResponse.ServingStatus`.
enum class ServingStatus : uint8_t { kServing = 1, kNotServing = 2, kServiceUnknown = 3 };

class ServingTable {
 public:
  static constexpr size_t kMostServices = 32;

  // `services` are the names that can be asked about; none serves before the first publish. What was published longer
  // than `stale_after` ago is not believed any more: whoever publishes is stuck, and nothing serves.
  // Throws Error, kInvalidRequest, for more than kMostServices.
  ServingTable(std::vector<std::string> services, Clock::duration stale_after);

  // `is_serving` in the order of the names, as long as those. True if an answer is now another.
  bool publish(const std::vector<bool>& is_serving, Clock::time_point now);

  ServingStatus status(std::string_view service, Clock::time_point now) const;

 private:
  const std::vector<std::string> services_;
  const Clock::duration stale_after_;
  std::atomic<uint32_t> serving_{0};  // one bit a service
  std::atomic<Clock::rep> published_at_;
};

}  // namespace tw::health
