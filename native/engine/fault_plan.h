// Faults that a test asks for, and the steps at which the device is to suffer them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.h"

namespace tw {

class FaultPlan {
 public:
  FaultPlan() = default;
  // `text` is empty or `kind@step` entries between commas; kinds are `oom`, `device-error` and `host-memory`, steps
  // count from 0. Throws Error(kInvalidRequest) for anything else.
  explicit FaultPlan(const std::string& text);

  bool empty() const { return faults_.empty(); }
  // Injects what step number `step` is to suffer; throws what the backend throws.
  void apply(int64_t step, Backend* backend) const;

 private:
  std::vector<std::pair<int64_t, Fault>> faults_;
};

}  // namespace tw
