// How calls ended, counted where they end and taken by whoever keeps the metrics.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tw::health {

enum class Ending : uint8_t { kCheckOk, kCheckNotFound, kCheckInvalid, kWatchLeft, kWatchInvalid };

struct EndingName {
  const char* method;
  const char* code;  // as in errors.py, or of the metrics' own
};

inline constexpr std::array<EndingName, 5> kEndingNames = {{
    {"Check", "OK"},
    {"Check", "NOT_FOUND"},
    {"Check", "INVALID_REQUEST"},
    {"Watch", "DISCONNECTED"},
    {"Watch", "INVALID_REQUEST"},
}};

class Endings {
 public:
  void count(Ending ending) { counts_[static_cast<size_t>(ending)].fetch_add(1, std::memory_order_relaxed); }

  // How many there were since the last take, by Ending.
  std::array<uint64_t, kEndingNames.size()> take() {
    std::array<uint64_t, kEndingNames.size()> taken{};
    for (size_t i = 0; i < taken.size(); ++i) taken[i] = counts_[i].exchange(0, std::memory_order_relaxed);
    return taken;
  }

 private:
  std::array<std::atomic<uint64_t>, kEndingNames.size()> counts_{};
};

}  // namespace tw::health
