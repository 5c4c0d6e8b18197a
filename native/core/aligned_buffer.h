// Owned, zeroed memory for weights, KV and activations; on Linux large buffers ask for huge pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tw {

// Move-only. The address is 64-byte aligned, and 2 MiB aligned for buffers of at least that size.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws Error(kInsufficientVram) naming `purpose` and the size if the memory cannot be had.
  AlignedBuffer(size_t num_bytes, const char* purpose);
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer();

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_bytes_ = 0;
};

}  // namespace tw
