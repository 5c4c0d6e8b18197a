#include "health/serving_table.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace tw::health {

ServingTable::ServingTable(std::vector<std::string> services, Clock::duration stale_after)
    : services_(std::move(services)),
      stale_after_(stale_after),
      published_at_(Clock::now().time_since_epoch().count()) {
  if (services_.size() > kMostServices)
    throw Error(ErrorCode::kInvalidRequest, "too many services to tell the health of");
}

bool ServingTable::publish(const std::vector<bool>& is_serving, Clock::time_point now) {
  if (is_serving.size() != services_.size())
    throw Error(ErrorCode::kInvalidRequest, "one answer is needed for each service");
  uint32_t serving = 0;
  for (size_t i = 0; i < is_serving.size(); ++i) serving |= uint32_t{is_serving[i]} << i;
  // In this order: the time must not make believed again what stood there before.
  const bool has_changed = serving_.exchange(serving) != serving;
  published_at_.store(now.time_since_epoch().count());
  return has_changed;
}

ServingStatus ServingTable::status(std::string_view service, Clock::time_point now) const {
  const auto found = std::find(services_.begin(), services_.end(), service);
  if (found == services_.end()) return ServingStatus::kServiceUnknown;
  const Clock::time_point published_at{Clock::duration{published_at_.load()}};
  const bool is_serving = (serving_.load() >> (found - services_.begin()) & 1) != 0;
  return is_serving && now - published_at <= stale_after_ ? ServingStatus::kServing : ServingStatus::kNotServing;
}

}  // namespace tw::health
