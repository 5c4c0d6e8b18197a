// A GGUF v3 model file: mapped, validated, with its metadata and tensors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/mapped_file.h"
#include "gguf/metadata.h"
#include "gguf/parse.h"

namespace tw::gguf {

// Move-only. Immutable after construction, so any number of threads may read it. Views and data pointers live as long
// as the object, also after a move.
class File {
 public:
  // Maps and validates the file. Throws Error(kModelLoadFailed) for an unreadable or malformed file and
  // Error(kUnsupportedModel) for a version, byte order, type or split file that is not supported; the message is one
  // line that names the file, the check and the byte offset.
  explicit File(const std::string& path);
  // Validates bytes that the caller owns and keeps; `name` stands for the path.
  static File from_bytes(const std::string& name, const uint8_t* data, uint64_t size);

  const std::string& path() const { return path_; }
  uint64_t num_bytes() const { return num_bytes_; }
  uint64_t alignment() const { return contents_.alignment; }
  uint64_t data_offset() const { return contents_.data_offset; }
  // Bytes after the last tensor and its padding. They are ignored.
  uint64_t trailing_bytes() const { return contents_.trailing_bytes; }

  const Metadata& metadata() const { return contents_.metadata; }
  // In the file's order.
  const std::vector<TensorInfo>& tensors() const { return contents_.tensors; }
  // nullptr if there is no such tensor.
  const TensorInfo* find_tensor(std::string_view name) const;
  // Throws Error(kModelLoadFailed) if there is no such tensor, or if its shape is another.
  const TensorInfo& tensor(std::string_view name) const;
  const TensorInfo& tensor(std::string_view name, std::initializer_list<int64_t> shape) const;

  // Gives back the memory that reading a tensor's data made resident; reading it again works. For loaders that pack
  // tensor by tensor, so that a model is never in memory twice.
  void release_pages(const TensorInfo& tensor) const;
  // Throws Error(kModelLoadFailed) if the file was shortened or written to since it was opened, or if a part of it
  // could not be read (such pages read as zeros, see BusGuard). Whoever copied tensor data calls it before using the
  // copy.
  void check_unchanged() const;

 private:
  File() = default;
  void index_tensors();

  std::string path_;
  std::string name_;  // the path as it appears in messages
  uint64_t num_bytes_ = 0;
  MappedFile map_;  // empty if the caller owns the bytes
  Contents contents_;
  std::vector<uint32_t> by_name_;  // indexes of contents_.tensors, sorted by name
};

}  // namespace tw::gguf
