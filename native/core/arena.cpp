#include "core/arena.h"

#include <algorithm>

namespace tw {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kFirstMapping = size_t{2} << 20;
constexpr size_t kLargestMapping = size_t{64} << 20;

}  // namespace

// Mappings double in size; what is never used of one is never touched, so it takes addresses but no memory.
uint8_t* Arena::allocate(size_t num_bytes) {
  if (mappings_.empty() || mappings_.back().size() - used_ < num_bytes) {
    const size_t next = mappings_.empty() ? kFirstMapping : std::min(2 * mappings_.back().size(), kLargestMapping);
    mappings_.emplace_back(std::max(next, num_bytes), purpose_);
    used_ = 0;
  }
  uint8_t* start = mappings_.back().data() + used_;
  used_ = std::min(mappings_.back().size(), used_ + (num_bytes + kLine - 1) / kLine * kLine);
  return start;
}

}  // namespace tw
