// The key-value part of a GGUF file. Values stay in the mapped file and are decoded when they are asked for.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tw::gguf {

// Numbers are the format's own (ggml docs/gguf.md).
enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

constexpr uint32_t kNumValueTypes = 13;

// "uint32", "string", …
const char* to_string(ValueType type);

// Bytes a value of the type occupies, or 0 for strings and arrays, whose length the file gives.
uint32_t fixed_size(ValueType type);

// A value as it lies in the file; its bounds were checked when the file was parsed.
struct Value {
  ValueType type = ValueType::kUint8;
  ValueType element_type = ValueType::kUint8;  // of an array
  uint64_t count = 1;                          // elements of an array
  uint64_t offset = 0;                         // of the payload in the file
  std::string_view payload;                    // scalar: its bytes; string: its characters; array: its elements
};

// Typed access. Each `get` throws Error(kModelLoadFailed) if the key is missing, each `find` returns nullopt then; both
// throw if the value has another type, which is never converted. T is a sized integer, bool, float, double or
// std::string_view; views live as long as the file. Floats are finite.
class Metadata {
 public:
  struct Entry {
    std::string key;
    Value value;
  };

  Metadata() = default;
  // `file` names the file in messages. Throws if two entries have the same key.
  Metadata(std::string file, std::vector<Entry> entries);

  // In the file's order.
  const std::vector<Entry>& entries() const { return entries_; }
  // nullptr if there is no such key.
  const Value* find_value(std::string_view key) const;
  bool contains(std::string_view key) const { return find_value(key) != nullptr; }

  template <class T>
  T get(std::string_view key) const;
  template <class T>
  std::optional<T> find(std::string_view key) const;
  // An array. `get_array` with a count also throws if the array has another number of elements.
  template <class T>
  std::vector<T> get_array(std::string_view key) const;
  template <class T>
  std::vector<T> get_array(std::string_view key, uint64_t expected_count) const;
  template <class T>
  std::optional<std::vector<T>> find_array(std::string_view key) const;

  uint32_t get_u32(std::string_view key) const { return get<uint32_t>(key); }
  float get_f32(std::string_view key) const { return get<float>(key); }
  bool get_bool(std::string_view key) const { return get<bool>(key); }
  std::string_view get_string(std::string_view key) const { return get<std::string_view>(key); }
  std::optional<uint32_t> find_u32(std::string_view key) const { return find<uint32_t>(key); }
  std::optional<float> find_f32(std::string_view key) const { return find<float>(key); }
  std::optional<bool> find_bool(std::string_view key) const { return find<bool>(key); }
  std::optional<std::string_view> find_string(std::string_view key) const { return find<std::string_view>(key); }

  // The same, and throws unless min ≤ value ≤ max.
  uint32_t get_u32(std::string_view key, uint32_t min, uint32_t max) const;
  std::optional<uint32_t> find_u32(std::string_view key, uint32_t min, uint32_t max) const;
  float get_f32(std::string_view key, float min, float max) const;
  std::optional<float> find_f32(std::string_view key, float min, float max) const;

  // Throws a load error about the value of `key`: "<file>: key `<key>` <problem> (offset …)".
  [[noreturn]] void fail(std::string_view key, const std::string& problem) const;

 private:
  const Value& require(std::string_view key) const;

  std::string file_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> by_key_;  // indexes of entries_, sorted by key
};

// Decoding without a key, for code that handles every type. `value` must have the type.
template <class T>
T decode_scalar(const Value& value);
template <class T>
std::vector<T> decode_array(const Value& value);
// Calls `visit` with each element of an array of strings.
void for_each_string(const Value& value, const std::function<void(std::string_view)>& visit);

}  // namespace tw::gguf
