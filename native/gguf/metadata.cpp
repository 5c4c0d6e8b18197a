#include "gguf/metadata.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

#include "gguf/cursor.h"
#include "gguf/text.h"

namespace tw::gguf {
namespace {

struct TypeRow {
  const char* name;
  uint32_t size;
};

constexpr TypeRow kTypes[kNumValueTypes] = {
    {"uint8", 1}, {"int8", 1},   {"uint16", 2}, {"int16", 2},  {"uint32", 4}, {"int32", 4},   {"float32", 4},
    {"bool", 1},  {"string", 0}, {"array", 0},  {"uint64", 8}, {"int64", 8},  {"float64", 8},
};

template <class T>
constexpr ValueType value_type() {
  if constexpr (std::is_same_v<T, uint8_t>) return ValueType::kUint8;
  if constexpr (std::is_same_v<T, int8_t>) return ValueType::kInt8;
  if constexpr (std::is_same_v<T, uint16_t>) return ValueType::kUint16;
  if constexpr (std::is_same_v<T, int16_t>) return ValueType::kInt16;
  if constexpr (std::is_same_v<T, uint32_t>) return ValueType::kUint32;
  if constexpr (std::is_same_v<T, int32_t>) return ValueType::kInt32;
  if constexpr (std::is_same_v<T, float>) return ValueType::kFloat32;
  if constexpr (std::is_same_v<T, bool>) return ValueType::kBool;
  if constexpr (std::is_same_v<T, std::string_view>) return ValueType::kString;
  if constexpr (std::is_same_v<T, uint64_t>) return ValueType::kUint64;
  if constexpr (std::is_same_v<T, int64_t>) return ValueType::kInt64;
  if constexpr (std::is_same_v<T, double>) return ValueType::kFloat64;
}

std::string describe(const Value& value) {
  if (value.type != ValueType::kArray) return to_string(value.type);
  return std::string("array of ") + to_string(value.element_type);
}

template <class T>
bool is_finite_value(T value) {
  if constexpr (std::is_floating_point_v<T>) return std::isfinite(value);
  return true;
}

template <class T>
T checked_scalar(const Metadata& metadata, std::string_view key, const Value& value) {
  constexpr ValueType expected = value_type<T>();
  if (value.type != expected) {
    metadata.fail(key, "has type " + describe(value) + ", " + to_string(expected) + " expected");
  }
  const T result = decode_scalar<T>(value);
  if (!is_finite_value(result)) metadata.fail(key, "is not a finite number");
  return result;
}

template <class T>
std::vector<T> checked_array(const Metadata& metadata, std::string_view key, const Value& value) {
  constexpr ValueType expected = value_type<T>();
  if (value.type != ValueType::kArray || value.element_type != expected) {
    metadata.fail(key, "has type " + describe(value) + ", array of " + to_string(expected) + " expected");
  }
  std::vector<T> result = decode_array<T>(value);
  if (!std::all_of(result.begin(), result.end(), is_finite_value<T>)) {
    metadata.fail(key, "holds a number that is not finite");
  }
  return result;
}

std::string number_text(uint32_t value) { return std::to_string(value); }

std::string number_text(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
  return text;
}

template <class T>
T checked_range(const Metadata& metadata, std::string_view key, T value, T min, T max) {
  if (value < min || value > max) {
    metadata.fail(key, "is " + number_text(value) + ", outside " + number_text(min) + " to " + number_text(max));
  }
  return value;
}

}  // namespace

const char* to_string(ValueType type) { return kTypes[static_cast<uint32_t>(type)].name; }

uint32_t fixed_size(ValueType type) { return kTypes[static_cast<uint32_t>(type)].size; }

template <class T>
T decode_scalar(const Value& value) {
  if constexpr (std::is_same_v<T, std::string_view>) {
    return value.payload;
  } else if constexpr (std::is_same_v<T, bool>) {
    return value.payload[0] != 0;
  } else {
    T result;
    std::memcpy(&result, value.payload.data(), sizeof result);
    return result;
  }
}

template <class T>
std::vector<T> decode_array(const Value& value) {
  std::vector<T> result;
  if constexpr (std::is_same_v<T, std::string_view>) {
    result.reserve(value.count);
    for_each_string(value, [&](std::string_view element) { result.push_back(element); });
  } else if constexpr (std::is_same_v<T, bool>) {
    for (const char byte : value.payload) result.push_back(byte != 0);
  } else {
    result.resize(value.count);
    if (value.count > 0) std::memcpy(result.data(), value.payload.data(), value.count * sizeof(T));
  }
  return result;
}

// Lengths are checked again here, so a file that another program rewrites while it is mapped cannot send us outside.
void for_each_string(const Value& value, const std::function<void(std::string_view)>& visit) {
  const std::string file = "model file";
  Cursor cursor(file, reinterpret_cast<const uint8_t*>(value.payload.data()), value.payload.size());
  for (uint64_t i = 0; i < value.count; ++i)
    visit(cursor.read_string(value.payload.size(), "a string that was changed"));
}

Metadata::Metadata(std::string file, std::vector<Entry> entries)
    : file_(std::move(file)), entries_(std::move(entries)), by_key_(entries_.size()) {
  std::iota(by_key_.begin(), by_key_.end(), 0u);
  std::sort(by_key_.begin(), by_key_.end(), [this](uint32_t a, uint32_t b) {
    const int order = entries_[a].key.compare(entries_[b].key);
    return order != 0 ? order < 0 : a < b;
  });
  for (size_t i = 1; i < by_key_.size(); ++i) {
    const Entry& entry = entries_[by_key_[i]];
    if (entries_[by_key_[i - 1]].key != entry.key) continue;
    fail_malformed(file_, "key " + quoted(entry.key) + " is there twice", entry.value.offset);
  }
}

const Value* Metadata::find_value(std::string_view key) const {
  const auto at = std::lower_bound(by_key_.begin(), by_key_.end(), key,
                                   [this](uint32_t index, std::string_view k) { return entries_[index].key < k; });
  if (at == by_key_.end() || entries_[*at].key != key) return nullptr;
  return &entries_[*at].value;
}

const Value& Metadata::require(std::string_view key) const {
  const Value* value = find_value(key);
  if (value == nullptr) throw Error(ErrorCode::kModelLoadFailed, file_ + ": key " + quoted(key) + " is missing");
  return *value;
}

void Metadata::fail(std::string_view key, const std::string& problem) const {
  const Value* value = find_value(key);
  fail_malformed(file_, "key " + quoted(key) + " " + problem, value == nullptr ? 0 : value->offset);
}

template <class T>
T Metadata::get(std::string_view key) const {
  return checked_scalar<T>(*this, key, require(key));
}

template <class T>
std::optional<T> Metadata::find(std::string_view key) const {
  const Value* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  return checked_scalar<T>(*this, key, *value);
}

template <class T>
std::vector<T> Metadata::get_array(std::string_view key) const {
  return checked_array<T>(*this, key, require(key));
}

template <class T>
std::vector<T> Metadata::get_array(std::string_view key, uint64_t expected_count) const {
  const Value& value = require(key);
  if (value.type == ValueType::kArray && value.count != expected_count) {
    fail(key, "has " + std::to_string(value.count) + " elements, " + std::to_string(expected_count) + " expected");
  }
  return checked_array<T>(*this, key, value);
}

template <class T>
std::optional<std::vector<T>> Metadata::find_array(std::string_view key) const {
  const Value* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  return checked_array<T>(*this, key, *value);
}

uint32_t Metadata::get_u32(std::string_view key, uint32_t min, uint32_t max) const {
  return checked_range(*this, key, get_u32(key), min, max);
}

std::optional<uint32_t> Metadata::find_u32(std::string_view key, uint32_t min, uint32_t max) const {
  if (!contains(key)) return std::nullopt;
  return get_u32(key, min, max);
}

float Metadata::get_f32(std::string_view key, float min, float max) const {
  return checked_range(*this, key, get_f32(key), min, max);
}

std::optional<float> Metadata::find_f32(std::string_view key, float min, float max) const {
  if (!contains(key)) return std::nullopt;
  return get_f32(key, min, max);
}

#define TW_INSTANTIATE(T)                                                           \
  template T decode_scalar<T>(const Value&);                                        \
  template std::vector<T> decode_array<T>(const Value&);                            \
  template T Metadata::get<T>(std::string_view) const;                              \
  template std::optional<T> Metadata::find<T>(std::string_view) const;              \
  template std::vector<T> Metadata::get_array<T>(std::string_view) const;           \
  template std::vector<T> Metadata::get_array<T>(std::string_view, uint64_t) const; \
  template std::optional<std::vector<T>> Metadata::find_array<T>(std::string_view) const;

TW_INSTANTIATE(uint8_t)
TW_INSTANTIATE(int8_t)
TW_INSTANTIATE(uint16_t)
TW_INSTANTIATE(int16_t)
TW_INSTANTIATE(uint32_t)
TW_INSTANTIATE(int32_t)
TW_INSTANTIATE(uint64_t)
TW_INSTANTIATE(int64_t)
TW_INSTANTIATE(float)
TW_INSTANTIATE(double)
TW_INSTANTIATE(bool)
TW_INSTANTIATE(std::string_view)
#undef TW_INSTANTIATE

}  // namespace tw::gguf
