#include "gguf/parse.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "core/checked.h"
#include "core/error.h"
#include "gguf/cursor.h"
#include "gguf/text.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF files are little-endian and are read in place");

namespace tw::gguf {
namespace {

constexpr uint32_t kVersion = 3;

// The least that a key with its value, or a tensor's description, can take: what a declared count is held against.
constexpr uint64_t kMinKeyBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kMinTensorInfoBytes = 8 + 1 + 4 + 8 + 4 + 8;

// Types of the format that the engine does not read, so that a person learns which one a file has.
struct ForeignType {
  uint32_t number;
  const char* name;
};
constexpr ForeignType kForeignTypes[] = {
    {4, "Q4_2, removed from the format"},
    {5, "Q4_3, removed from the format"},
    {9, "Q8_1"},
    {10, "Q2_K"},
    {11, "Q3_K"},
    {15, "Q8_K"},
    {16, "IQ2_XXS"},
    {17, "IQ2_XS"},
    {18, "IQ3_XXS"},
    {19, "IQ1_S"},
    {20, "IQ4_NL"},
    {21, "IQ3_S"},
    {22, "IQ2_S"},
    {23, "IQ4_XS"},
    {24, "I8"},
    {25, "I16"},
    {26, "I32"},
    {27, "I64"},
    {28, "F64"},
    {29, "IQ1_M"},
    {31, "Q4_0_4_4, removed from the format"},
    {32, "Q4_0_4_8, removed from the format"},
    {33, "Q4_0_8_8, removed from the format"},
    {34, "TQ1_0"},
    {35, "TQ2_0"},
    {39, "MXFP4"},
};

bool is_printable_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

uint64_t read_count(Cursor& cursor, const char* what, uint64_t max, uint64_t min_bytes_each) {
  const uint64_t start = cursor.offset();
  const auto count = cursor.read<uint64_t>("the header");
  if (count > max) {
    fail_malformed(cursor.file(),
                   std::string("the file declares ") + std::to_string(count) + " " + what +
                       ", more than the limit of " + std::to_string(max),
                   start);
  }
  if (count * min_bytes_each > cursor.remaining()) {
    fail_malformed(
        cursor.file(),
        std::string("the file declares ") + std::to_string(count) + " " + what + " but is too short for them", start);
  }
  return count;
}

void check_magic(Cursor& cursor) {
  const auto* magic = reinterpret_cast<const char*>(cursor.take(4, "the header"));
  if (std::string_view(magic, 4) == "GGUF") return;
  fail_malformed(cursor.file(), "not a GGUF file: it begins with " + quoted({magic, 4}), 0);
}

void check_version(Cursor& cursor) {
  const uint64_t start = cursor.offset();
  const auto version = cursor.read<uint32_t>("the header");
  if (version == kVersion) return;
  // The format has no byte-order mark; a small version number in the other order has its low half empty.
  if (version != 0 && (version & 0xffffu) == 0) {
    fail(ErrorCode::kUnsupportedModel, cursor.file(), "big-endian GGUF files are not supported", start);
  }
  fail(ErrorCode::kUnsupportedModel, cursor.file(),
       "GGUF version " + std::to_string(version) + " is not supported, only version 3", start);
}

ValueType read_value_type(Cursor& cursor, const std::string& key) {
  const uint64_t start = cursor.offset();
  const auto type = cursor.read<uint32_t>("a value type");
  if (type < kNumValueTypes) return static_cast<ValueType>(type);
  fail_malformed(cursor.file(), "key " + quoted(key) + " has the unknown value type " + std::to_string(type), start);
}

void check_bools(const Cursor& cursor, const std::string& key, const Value& value) {
  const auto bad = std::find_if(value.payload.begin(), value.payload.end(), [](char c) { return c != 0 && c != 1; });
  if (bad == value.payload.end()) return;
  fail_malformed(cursor.file(), "key " + quoted(key) + " has a bool that is neither 0 nor 1",
                 value.offset + static_cast<uint64_t>(bad - value.payload.begin()));
}

void read_array(Cursor& cursor, const std::string& key, Value& value) {
  value.element_type = read_value_type(cursor, key);
  const uint64_t start = cursor.offset();
  if (value.element_type == ValueType::kArray) {
    fail_malformed(cursor.file(), "key " + quoted(key) + " is an array of arrays, which is not supported", start);
  }
  value.count = cursor.read<uint64_t>("an array's length");
  value.offset = cursor.offset();
  if (value.count > kMaxArrayElements) {
    fail_malformed(cursor.file(),
                   "key " + quoted(key) + " declares " + std::to_string(value.count) +
                       " elements, more than the limit of " + std::to_string(kMaxArrayElements),
                   start);
  }
  const uint64_t element_bytes = fixed_size(value.element_type);
  const uint64_t min_bytes = value.count * (element_bytes == 0 ? sizeof(uint64_t) : element_bytes);
  if (min_bytes > cursor.remaining()) {
    fail_malformed(cursor.file(),
                   "key " + quoted(key) + " declares " + std::to_string(value.count) +
                       " elements but the file is too short for them",
                   start);
  }
  const auto* begin = reinterpret_cast<const char*>(cursor.take(0, "an array"));
  if (element_bytes == 0) {
    for (uint64_t i = 0; i < value.count; ++i) cursor.read_string(kMaxStringBytes, "a string of an array");
  } else {
    cursor.take(min_bytes, "an array");
  }
  value.payload = {begin, cursor.offset() - value.offset};
  if (value.element_type == ValueType::kBool) check_bools(cursor, key, value);
}

Value read_value(Cursor& cursor, const std::string& key) {
  Value value;
  value.type = read_value_type(cursor, key);
  value.offset = cursor.offset();
  switch (value.type) {
    case ValueType::kString: value.payload = cursor.read_string(kMaxStringBytes, "a string value"); break;
    case ValueType::kArray: read_array(cursor, key, value); break;
    default: {
      const uint32_t num_bytes = fixed_size(value.type);
      value.payload = {reinterpret_cast<const char*>(cursor.take(num_bytes, "a value")), num_bytes};
      if (value.type == ValueType::kBool) check_bools(cursor, key, value);
    }
  }
  return value;
}

Metadata read_metadata(Cursor& cursor, uint64_t num_keys) {
  std::vector<Metadata::Entry> entries;
  entries.reserve(num_keys);
  for (uint64_t i = 0; i < num_keys; ++i) {
    const uint64_t start = cursor.offset();
    std::string key(cursor.read_string(kMaxKeyBytes, "a key"));
    if (key.empty()) fail_malformed(cursor.file(), "a key is empty", start);
    if (!is_printable_ascii(key)) {
      fail_malformed(cursor.file(), "key " + quoted(key) + " is not printable ASCII", start);
    }
    Value value = read_value(cursor, key);
    entries.push_back({std::move(key), value});
  }
  return Metadata(cursor.file(), std::move(entries));
}

uint64_t read_alignment(const Metadata& metadata) {
  constexpr std::string_view kKey = "general.alignment";
  const auto alignment = metadata.find_u32(kKey);
  if (!alignment) return kDefaultAlignment;
  if (*alignment == 0 || (*alignment & (*alignment - 1)) != 0 || *alignment > kMaxAlignment) {
    metadata.fail(kKey, "is " + std::to_string(*alignment) + ", not a power of two from 1 to 1048576");
  }
  return *alignment;
}

void check_not_split(const std::string& file, const Metadata& metadata) {
  const auto count = metadata.find<uint16_t>("split.count");
  if (!count || *count <= 1) return;
  fail(ErrorCode::kUnsupportedModel, file,
       "this is one of " + std::to_string(*count) + " parts of a split model; merge them into one file first",
       metadata.find_value("split.count")->offset);
}

void read_dims(Cursor& cursor, TensorInfo& tensor) {
  const uint64_t start = cursor.offset();
  tensor.n_dims = cursor.read<uint32_t>("a tensor's description");
  if (tensor.n_dims < 1 || tensor.n_dims > 4) {
    fail_malformed(
        cursor.file(),
        "tensor " + quoted(tensor.name) + " has " + std::to_string(tensor.n_dims) + " dimensions, not 1 to 4", start);
  }
  uint64_t num_values = 1;
  for (uint32_t i = 0; i < tensor.n_dims; ++i) {
    const uint64_t at = cursor.offset();
    const auto dim = cursor.read<uint64_t>("a tensor's description");
    const auto product = checked_mul(num_values, dim);
    if (dim == 0 || !product || *product > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      fail_malformed(cursor.file(),
                     "tensor " + quoted(tensor.name) + " has dimension " + std::to_string(dim) + ", which is " +
                         (dim == 0 ? "empty" : "too large"),
                     at);
    }
    num_values = *product;
    tensor.dims[i] = static_cast<int64_t>(dim);
  }
}

DType read_dtype(Cursor& cursor, const TensorInfo& tensor) {
  const uint64_t start = cursor.offset();
  const auto number = cursor.read<uint32_t>("a tensor's description");
  if (const DTypeInfo* info = find_dtype(number)) return info->dtype;
  std::string type = "unknown type " + std::to_string(number);
  for (const ForeignType& row : kForeignTypes) {
    if (row.number == number) type = "type " + std::to_string(number) + " (" + row.name + ")";
  }
  fail(ErrorCode::kUnsupportedModel, cursor.file(), "tensor " + quoted(tensor.name) + " has the unsupported " + type,
       start);
}

// Reads one description. `offset` is relative to the data section, whose place is not known yet.
TensorInfo read_tensor_info(Cursor& cursor, uint64_t alignment) {
  TensorInfo tensor;
  const uint64_t start = cursor.offset();
  tensor.name = cursor.read_string(kMaxTensorNameBytes, "a tensor's name");
  if (tensor.name.empty()) fail_malformed(cursor.file(), "a tensor's name is empty", start);
  if (!is_printable_ascii(tensor.name)) {
    fail_malformed(cursor.file(), "tensor name " + quoted(tensor.name) + " is not printable ASCII", start);
  }
  read_dims(cursor, tensor);
  tensor.dtype = read_dtype(cursor, tensor);
  const DTypeInfo& format = dtype_info(tensor.dtype);
  if (tensor.dims[0] % format.block_values != 0) {
    fail_malformed(cursor.file(),
                   "tensor " + quoted(tensor.name) + " has rows of " + std::to_string(tensor.dims[0]) +
                       " values, not a multiple of the " + std::to_string(format.block_values) + " in a block of " +
                       format.name,
                   start);
  }
  const auto num_blocks = static_cast<uint64_t>(tensor.num_values()) / format.block_values;
  const auto num_bytes = checked_mul(num_blocks, format.block_bytes);
  if (!num_bytes || *num_bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    fail_malformed(cursor.file(), "tensor " + quoted(tensor.name) + " is too large", start);
  }
  tensor.num_bytes = static_cast<int64_t>(*num_bytes);
  const uint64_t at = cursor.offset();
  tensor.offset = cursor.read<uint64_t>("a tensor's description");
  if (tensor.offset % alignment != 0) {
    fail_malformed(cursor.file(),
                   "tensor " + quoted(tensor.name) + " begins at " + std::to_string(tensor.offset) +
                       ", not a multiple of the alignment " + std::to_string(alignment),
                   at);
  }
  return tensor;
}

void check_names_differ(const std::string& file, const std::vector<TensorInfo>& tensors, uint64_t offset) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) fail_malformed(file, "tensor " + quoted(*twice) + " is there twice", offset);
}

// Turns relative offsets into places in the file. Data must follow in the order of the descriptions, as every writer
// lays it out, so each span need only be held against the one before it.
void place_tensors(const std::string& file, const uint8_t* data, uint64_t size, Contents& contents) {
  uint64_t previous_end = contents.data_offset;
  for (TensorInfo& tensor : contents.tensors) {
    const auto begin = checked_add(contents.data_offset, tensor.offset);
    const auto end = begin ? checked_add(*begin, static_cast<uint64_t>(tensor.num_bytes)) : std::nullopt;
    if (!end || *end > size) {
      fail_malformed(file, "tensor " + quoted(tensor.name) + " ends beyond the file", begin.value_or(tensor.offset));
    }
    if (*begin < previous_end) {
      fail_malformed(file, "tensor " + quoted(tensor.name) + " begins before the end of the tensor before it", *begin);
    }
    tensor.offset = *begin;
    tensor.data = data + *begin;
    previous_end = *end;
  }
  const auto padded_end = checked_align_up(previous_end, contents.alignment);
  contents.trailing_bytes = padded_end && *padded_end < size ? size - *padded_end : 0;
}

}  // namespace

std::string shape_text(const int64_t* dims, size_t n_dims) {
  std::string text = "[";
  for (size_t i = 0; i < n_dims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + "]";
}

Contents parse(const std::string& name, const uint8_t* data, uint64_t size) {
  Cursor cursor(name, data, size);
  check_magic(cursor);
  check_version(cursor);
  const uint64_t num_tensors = read_count(cursor, "tensors", kMaxTensors, kMinTensorInfoBytes);
  const uint64_t num_keys = read_count(cursor, "keys", kMaxKeys, kMinKeyBytes);

  Contents contents;
  contents.metadata = read_metadata(cursor, num_keys);
  contents.alignment = read_alignment(contents.metadata);
  check_not_split(name, contents.metadata);

  const uint64_t descriptions = cursor.offset();
  if (num_tensors * kMinTensorInfoBytes > cursor.remaining()) {
    fail_malformed(name, "the file ends inside the tensors' descriptions", descriptions);
  }
  contents.tensors.reserve(num_tensors);
  for (uint64_t i = 0; i < num_tensors; ++i) {
    contents.tensors.push_back(read_tensor_info(cursor, contents.alignment));
  }
  check_names_differ(name, contents.tensors, descriptions);

  const auto data_offset = checked_align_up(cursor.offset(), contents.alignment);
  if (!data_offset) fail_malformed(name, "the tensor data begins beyond the file", cursor.offset());
  contents.data_offset = *data_offset;
  place_tensors(name, data, size, contents);
  return contents;
}

}  // namespace tw::gguf
