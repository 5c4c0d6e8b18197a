#include "core/thread_priority.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace tw {
namespace {

// As the kernel has it; not every C library declares it.
struct SchedulingAttributes {
  uint32_t size;
  uint32_t policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime_ns;
  uint64_t deadline_ns;
  uint64_t period_ns;
};

constexpr uint32_t kOrdinaryPolicy = 0;  // SCHED_OTHER
constexpr int kMostNice = 19;
// The longest that the kernel takes. A thread that asks for nothing has 1 to 3 ms.
constexpr uint64_t kLongTurnNs = 100'000'000;

}  // namespace

void let_others_preempt(int nice) {
  SchedulingAttributes attributes{};
  attributes.size = sizeof attributes;
  attributes.policy = kOrdinaryPolicy;
  attributes.nice = std::min(getpriority(PRIO_PROCESS, 0) + nice, kMostNice);
  attributes.runtime_ns = kLongTurnNs;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace tw
