// Bounds-checked reading of a span of a file. Internal to native/gguf.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "core/error.h"

namespace tw::gguf {

// Throws a load error that names the place: "<file>: <message> (offset <offset>)".
[[noreturn]] inline void fail(ErrorCode code, const std::string& file, const std::string& message, uint64_t offset) {
  throw Error(code, file + ": " + message + " (offset " + std::to_string(offset) + ")");
}

[[noreturn]] inline void fail_malformed(const std::string& file, const std::string& message, uint64_t offset) {
  fail(ErrorCode::kModelLoadFailed, file, message, offset);
}

// A position in the file's bytes. No read, skip or declared length takes it past the end. `what` names the field.
class Cursor {
 public:
  Cursor(const std::string& file, const uint8_t* data, uint64_t size, uint64_t offset = 0)
      : file_(file), data_(data), size_(size), offset_(offset) {}

  uint64_t offset() const { return offset_; }
  uint64_t remaining() const { return size_ - offset_; }
  const std::string& file() const { return file_; }

  template <class T>
  T read(const char* what) {
    T value;
    std::memcpy(&value, take(sizeof value, what), sizeof value);
    return value;
  }

  // The next `num_bytes` bytes.
  const uint8_t* take(uint64_t num_bytes, const char* what) {
    if (num_bytes > remaining()) fail_malformed(file_, std::string("the file ends inside ") + what, offset_);
    const uint8_t* bytes = data_ + offset_;
    offset_ += num_bytes;
    return bytes;
  }

  // A string with its length before it. The view points into the file.
  std::string_view read_string(uint64_t max_bytes, const char* what) {
    const uint64_t start = offset_;
    const auto length = read<uint64_t>(what);
    if (length > max_bytes) {
      fail_malformed(file_,
                     std::string(what) + " has " + std::to_string(length) + " bytes, more than the limit of " +
                         std::to_string(max_bytes),
                     start);
    }
    return {reinterpret_cast<const char*>(take(length, what)), length};
  }

 private:
  const std::string& file_;
  const uint8_t* data_;
  uint64_t size_;
  uint64_t offset_;
};

}  // namespace tw::gguf
