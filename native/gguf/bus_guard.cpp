#include "gguf/bus_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <utility>

#include "core/error.h"

namespace tw::gguf {
namespace {

constexpr int kMaxRanges = 256;
constexpr uintptr_t kReserved = 1;  // a slot that is being filled; no address is that low

// Read by the signal handler, so: lock-free atomics, no allocation, never freed.
struct Range {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> damaged{false};
};

Range ranges[kMaxRanges];
struct sigaction previous_action;
uintptr_t page_bytes = 0;

Range* find_range(uintptr_t address) {
  for (Range& range : ranges) {
    const uintptr_t begin = range.begin.load(std::memory_order_acquire);
    if (begin > kReserved && address >= begin && address < range.end.load(std::memory_order_acquire)) return &range;
  }
  return nullptr;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
    // Returning repeats the access, which then ends the process as if we had never been there.
    sigaction(SIGBUS, &previous_action, nullptr);
  } else {
    previous_action.sa_handler(signal);
  }
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  Range* range = find_range(address);
  if (range != nullptr) {
    void* page = reinterpret_cast<void*>(address & ~(page_bytes - 1));
    if (mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
      range->damaged.store(true, std::memory_order_release);
      errno = saved_errno;
      return;
    }
  }
  errno = saved_errno;
  pass_on(signal, info, context);
}

// Installed once and never removed: another library may have put its own handler above ours in the meantime.
void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous_action);
  });
}

}  // namespace

BusGuard::BusGuard(const void* begin, size_t num_bytes) {
  install_handler();
  const auto address = reinterpret_cast<uintptr_t>(begin);
  for (int i = 0; i < kMaxRanges; ++i) {
    uintptr_t empty = 0;
    if (!ranges[i].begin.compare_exchange_strong(empty, kReserved)) continue;
    ranges[i].damaged.store(false, std::memory_order_relaxed);
    ranges[i].end.store(address + num_bytes, std::memory_order_release);
    ranges[i].begin.store(address, std::memory_order_release);
    slot_ = i;
    return;
  }
  throw Error(ErrorCode::kModelLoadFailed, "more than " + std::to_string(kMaxRanges) + " model files are open at once");
}

BusGuard::~BusGuard() {
  if (slot_ < 0) return;
  ranges[slot_].end.store(0, std::memory_order_release);
  ranges[slot_].begin.store(0, std::memory_order_release);
}

BusGuard::BusGuard(BusGuard&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}

BusGuard& BusGuard::operator=(BusGuard&& other) noexcept {
  std::swap(slot_, other.slot_);
  return *this;
}

bool BusGuard::damaged() const { return slot_ >= 0 && ranges[slot_].damaged.load(std::memory_order_acquire); }

}  // namespace tw::gguf
