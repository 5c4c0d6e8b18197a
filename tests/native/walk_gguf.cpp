#include "walk_gguf.h"

#include <cstdlib>
#include <iostream>
#include <limits>
#include <string>

#include "core/error.h"
#include "gguf/file.h"
#include "quant/formats.h"

namespace tw::test {
namespace {

using gguf::Metadata;
using gguf::ValueType;

void require(bool condition, const char* what) {
  if (condition) return;
  std::cerr << "broken promise: " << what << "\n";
  std::abort();
}

void require_good_error(const Error& error) {
  const std::string message = error.what();
  require(message.find('\n') == std::string::npos, "a message is one line");
  require(message.size() < 1000, "a message is short");
  require(error.code() == ErrorCode::kModelLoadFailed || error.code() == ErrorCode::kUnsupportedModel,
          "a refused file has one of two codes");
}

// Asks for a value as T whatever it is: it comes, or a good error does.
template <class T>
void read_as(const Metadata& metadata, const std::string& key, uint64_t& sum) {
  try {
    sum += sizeof(metadata.get<T>(key));
  } catch (const Error& error) {
    require_good_error(error);
  }
  try {
    sum += metadata.get_array<T>(key).size();
  } catch (const Error& error) {
    require_good_error(error);
  }
}

void read_value(const Metadata& metadata, const Metadata::Entry& entry, uint64_t& sum) {
  read_as<uint8_t>(metadata, entry.key, sum);
  read_as<int8_t>(metadata, entry.key, sum);
  read_as<uint16_t>(metadata, entry.key, sum);
  read_as<int16_t>(metadata, entry.key, sum);
  read_as<uint32_t>(metadata, entry.key, sum);
  read_as<int32_t>(metadata, entry.key, sum);
  read_as<uint64_t>(metadata, entry.key, sum);
  read_as<int64_t>(metadata, entry.key, sum);
  read_as<float>(metadata, entry.key, sum);
  read_as<double>(metadata, entry.key, sum);
  read_as<bool>(metadata, entry.key, sum);
  read_as<std::string_view>(metadata, entry.key, sum);
  if (entry.value.type == ValueType::kString) {
    for (const char c : metadata.get_string(entry.key)) sum += static_cast<uint8_t>(c);
  }
  if (entry.value.type == ValueType::kArray && entry.value.element_type == ValueType::kString) {
    for (const auto text : metadata.get_array<std::string_view>(entry.key)) {
      for (const char c : text) sum += static_cast<uint8_t>(c);
    }
  }
}

void read_tensor(const gguf::File& file, const uint8_t* data, const gguf::TensorInfo& tensor, uint64_t& sum) {
  const DTypeInfo& format = dtype_info(tensor.dtype);
  require(tensor.num_bytes > 0 && tensor.num_values() > 0, "a tensor is not empty");
  require(static_cast<uint64_t>(tensor.data - data) == tensor.offset, "data lies at its offset");
  require(tensor.offset + static_cast<uint64_t>(tensor.num_bytes) <= file.num_bytes(), "data lies inside the file");
  require(tensor.num_blocks() * format.block_values == tensor.num_values(), "a tensor is whole blocks");
  require(file.find_tensor(tensor.name) == &tensor, "a tensor is found by its name");
  float values[256];
  const uint8_t* last = tensor.data + tensor.num_bytes - format.block_bytes;
  for (const uint8_t* block : {tensor.data, last}) {
    quant::dequantize_row(tensor.dtype, block, values, format.block_values);
    for (uint32_t i = 0; i < format.block_values; ++i) sum += values[i] > 0 ? 1 : 0;
  }
  sum += quant::all_scales_finite(tensor.dtype, tensor.data, tensor.num_blocks()) ? 1 : 0;
}

}  // namespace

bool walk_gguf(const uint8_t* data, size_t size) {
  try {
    const gguf::File file = gguf::File::from_bytes("fuzz.gguf", data, size);
    uint64_t sum = file.trailing_bytes();
    for (const auto& entry : file.metadata().entries()) read_value(file.metadata(), entry, sum);
    for (const auto& tensor : file.tensors()) read_tensor(file, data, tensor, sum);
    require(sum != std::numeric_limits<uint64_t>::max(), "the compiler keeps the reads");
    return true;
  } catch (const Error& error) {
    require_good_error(error);
    return false;
  }
}

}  // namespace tw::test
