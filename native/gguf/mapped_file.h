// A regular file mapped read-only.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>

#include "gguf/bus_guard.h"

namespace tw::gguf {

class MappedFile {
 public:
  MappedFile() = default;
  // Throws Error(kModelLoadFailed) for what is not a readable, regular, non-empty file; never blocks on a FIFO or
  // touches a device. `name` names the file in messages.
  MappedFile(const std::string& path, const std::string& name);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

  // Gives back the resident pages that hold the range; they are read again if they are needed again.
  void release(const uint8_t* begin, uint64_t num_bytes) const;
  // Whether the file still has the size and time of change it had when it was opened, and every page could be read.
  bool unchanged() const;

 private:
  int fd_ = -1;
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
  timespec modified_{};
  BusGuard guard_;
};

}  // namespace tw::gguf
