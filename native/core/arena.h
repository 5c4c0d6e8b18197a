// Memory for many buffers that live as long as each other, in few large mappings: small ones lie on huge pages too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/aligned_buffer.h"

namespace tw {

class Arena {
 public:
  explicit Arena(const char* purpose) : purpose_(purpose) {}

  // `num_bytes` zeroed bytes at a 64-byte aligned address, until the arena goes. Throws Error(kInsufficientVram) as
  // AlignedBuffer does.
  uint8_t* allocate(size_t num_bytes);

 private:
  const char* purpose_;
  std::vector<AlignedBuffer> mappings_;
  size_t used_ = 0;  // of the last mapping
};

}  // namespace tw
