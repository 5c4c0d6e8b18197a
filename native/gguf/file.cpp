#include "gguf/file.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "gguf/cursor.h"
#include "gguf/text.h"

namespace tw::gguf {

File::File(const std::string& path) : path_(path), name_(printable(path)) {
  if (path.find('\0') != std::string::npos) {
    throw Error(ErrorCode::kModelLoadFailed, name_ + ": the path contains a NUL character");
  }
  map_ = MappedFile(path, name_);
  num_bytes_ = map_.size();
  contents_ = parse(name_, map_.data(), map_.size());
  check_unchanged();
  index_tensors();
}

File File::from_bytes(const std::string& name, const uint8_t* data, uint64_t size) {
  File file;
  file.path_ = name;
  file.name_ = printable(name);
  file.num_bytes_ = size;
  file.contents_ = parse(file.name_, data, size);
  file.index_tensors();
  return file;
}

void File::index_tensors() {
  by_name_.resize(tensors().size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(),
            [this](uint32_t a, uint32_t b) { return tensors()[a].name < tensors()[b].name; });
}

const TensorInfo* File::find_tensor(std::string_view name) const {
  const auto at = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                   [this](uint32_t index, std::string_view n) { return tensors()[index].name < n; });
  if (at == by_name_.end() || tensors()[*at].name != name) return nullptr;
  return &tensors()[*at];
}

const TensorInfo& File::tensor(std::string_view name) const {
  const TensorInfo* found = find_tensor(name);
  if (found == nullptr) throw Error(ErrorCode::kModelLoadFailed, name_ + ": tensor " + quoted(name) + " is missing");
  return *found;
}

const TensorInfo& File::tensor(std::string_view name, std::initializer_list<int64_t> shape) const {
  const TensorInfo& found = tensor(name);
  if (found.n_dims != shape.size() || !std::equal(shape.begin(), shape.end(), found.dims.begin())) {
    fail_malformed(name_,
                   "tensor " + quoted(name) + " has shape " + shape_text(found.dims.data(), found.n_dims) + ", " +
                       shape_text(shape.begin(), shape.size()) + " expected",
                   found.offset);
  }
  return found;
}

void File::release_pages(const TensorInfo& tensor) const {
  map_.release(tensor.data, static_cast<uint64_t>(tensor.num_bytes));
}

void File::check_unchanged() const {
  if (map_.unchanged()) return;
  throw Error(ErrorCode::kModelLoadFailed, name_ + ": the file changed, or could not be read, while it was loaded");
}

}  // namespace tw::gguf
