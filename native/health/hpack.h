// Header compression of HTTP/2 (RFC 7541), the reading half: our own headers are sent as literals, which need no state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace tw::health {

struct HeaderField {
  std::string name;
  std::string value;
};

// One direction of one connection: each block is read with what those before it left in the table.
class HpackDecoder {
 public:
  // The size that a peer may use until it is told another (RFC 9113 §6.5.2), which we never do.
  static constexpr size_t kTableBytes = 4096;

  // `most_list_bytes` bounds what a block unfolds to, counted as the table counts: names, values, 32 bytes a field.
  explicit HpackDecoder(size_t most_list_bytes) : most_list_bytes_(most_list_bytes) {}

  // The fields of a whole block, in order. Throws Http2Error: COMPRESSION_ERROR for a block that is not well-formed,
  // ENHANCE_YOUR_CALM for one that unfolds to too much. The table is of no use afterwards.
  std::vector<HeaderField> decode(std::string_view block);

 private:
  HeaderField entry(uint64_t index) const;
  void insert(const HeaderField& field);
  void set_table_limit(uint64_t bytes);
  void evict();

  const size_t most_list_bytes_;
  std::deque<HeaderField> table_;  // the newest first
  size_t table_bytes_ = 0;
  size_t table_limit_ = kTableBytes;
};

}  // namespace tw::health
