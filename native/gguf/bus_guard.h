// Survives a mapped file that is shortened, or cannot be read, while it is mapped.
//
// Reading a page that the file no longer has raises SIGBUS, which would end the process and every stream it serves.
// While a range is guarded, such a page is replaced by zeros and the range is marked damaged; whoever reads the range
// asks `damaged()` afterwards. Faults at other addresses go to the handler that was there before.
#pragma once

#include <cstddef>

namespace tw::gguf {

class BusGuard {
 public:
  BusGuard() = default;
  // Guards [begin, begin + num_bytes), a mapping. Throws Error if too many ranges are guarded.
  BusGuard(const void* begin, size_t num_bytes);
  ~BusGuard();
  BusGuard(BusGuard&& other) noexcept;
  BusGuard& operator=(BusGuard&& other) noexcept;

  bool damaged() const;

 private:
  int slot_ = -1;
};

}  // namespace tw::gguf
