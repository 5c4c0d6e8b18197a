#include "health/hpack.h"

#include <algorithm>
#include <array>

#include "health/http2.h"

namespace tw::health {
namespace {

struct StaticField {
  const char* name;
  const char* value;
};

// RFC 7541 appendix A; the first has index 1.
constexpr StaticField kStaticTable[] = {
    {":authority", ""},
    {":method", "GET"},
    {":method", "POST"},
    {":path", "/"},
    {":path", "/index.html"},
    {":scheme", "http"},
    {":scheme", "https"},
    {":status", "200"},
    {":status", "204"},
    {":status", "206"},
    {":status", "304"},
    {":status", "400"},
    {":status", "404"},
    {":status", "500"},
    {"accept-charset", ""},
    {"accept-encoding", "gzip, deflate"},
    {"accept-language", ""},
    {"accept-ranges", ""},
    {"accept", ""},
    {"access-control-allow-origin", ""},
    {"age", ""},
    {"allow", ""},
    {"authorization", ""},
    {"cache-control", ""},
    {"content-disposition", ""},
    {"content-encoding", ""},
    {"content-language", ""},
    {"content-length", ""},
    {"content-location", ""},
    {"content-range", ""},
    {"content-type", ""},
    {"cookie", ""},
    {"date", ""},
    {"etag", ""},
    {"expect", ""},
    {"expires", ""},
    {"from", ""},
    {"host", ""},
    {"if-match", ""},
    {"if-modified-since", ""},
    {"if-none-match", ""},
    {"if-range", ""},
    {"if-unmodified-since", ""},
    {"last-modified", ""},
    {"link", ""},
    {"location", ""},
    {"max-forwards", ""},
    {"proxy-authenticate", ""},
    {"proxy-authorization", ""},
    {"range", ""},
    {"referer", ""},
    {"refresh", ""},
    {"retry-after", ""},
    {"server", ""},
    {"set-cookie", ""},
    {"strict-transport-security", ""},
    {"transfer-encoding", ""},
    {"user-agent", ""},
    {"vary", ""},
    {"via", ""},
    {"www-authenticate", ""},
};
constexpr size_t kNumStatic = sizeof kStaticTable / sizeof kStaticTable[0];
static_assert(kNumStatic == 61);

// What a field counts beside its letters (RFC 7541 §4.1).
constexpr size_t kFieldOverheadBytes = 32;

// Bits of each symbol's code, RFC 7541 appendix B. The code is canonical: codes of one length follow one another in the
// order of their symbols, and the first of a length follows the last of the one before. So the lengths say it all.
constexpr int kNumSymbols = 257;
constexpr int kEndOfString = 256;
constexpr int kMostCodeBits = 30;
constexpr std::array<uint8_t, kNumSymbols> kCodeBits = {
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6,  10, 10, 12, 13, 6,  8,  11, 10, 10, 8,  11, 8,  6,  6,  6,  5,  5,  5,  6,  6,  6,  6,  6,  6,  6,
    7,  8,  15, 6,  12, 10, 13, 6,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,
    7,  8,  7,  8,  13, 19, 13, 14, 6,  15, 5,  6,  5,  6,  5,  6,  6,  6,  5,  7,  7,  6,  6,  6,  5,  6,  7,  6,  5,
    5,  6,  7,  7,  7,  7,  7,  15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24,
    24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22,
    23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26,
    27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23,
    22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
};

class HuffmanCode {
 public:
  HuffmanCode() {
    for (const uint8_t bits : kCodeBits) ++count_[bits];
    uint32_t code = 0, index = 0;
    for (int bits = 1; bits <= kMostCodeBits; ++bits) {
      code <<= 1;
      first_code_[static_cast<size_t>(bits)] = code;
      first_index_[static_cast<size_t>(bits)] = index;
      code += count_[static_cast<size_t>(bits)];
      index += count_[static_cast<size_t>(bits)];
    }
    auto next = first_index_;
    for (int symbol = 0; symbol < kNumSymbols; ++symbol)
      symbols_[next[kCodeBits[static_cast<size_t>(symbol)]]++] = static_cast<uint16_t>(symbol);
  }

  std::string decode(std::string_view bytes) const {
    std::string text;
    uint32_t code = 0;
    size_t bits = 0;
    for (const char byte : bytes) {
      for (int shift = 7; shift >= 0; --shift) {
        code = code << 1 | (static_cast<uint32_t>(byte) >> shift & 1);
        ++bits;
        // Wraps for a code that is before the first of its length: such a number is above every count. The code is
        // complete, so that no more than kMostCodeBits bits go by without a symbol.
        const uint32_t place = code - first_code_[bits];
        if (place < count_[bits]) {
          const int symbol = symbols_[first_index_[bits] + place];
          if (symbol == kEndOfString) throw Http2Error(Http2Code::kCompressionError, "a string holds its own end");
          text.push_back(static_cast<char>(symbol));
          code = 0;
          bits = 0;
        }
      }
    }
    // What is left over fills the last byte up with ones, the beginning of the end's code (RFC 7541 §5.2).
    if (bits > 7 || code != (uint32_t{1} << bits) - 1)
      throw Http2Error(Http2Code::kCompressionError, "a string that is padded with something else");
    return text;
  }

 private:
  std::array<uint32_t, kMostCodeBits + 1> count_{};
  std::array<uint32_t, kMostCodeBits + 1> first_code_{};
  std::array<uint32_t, kMostCodeBits + 1> first_index_{};
  std::array<uint16_t, kNumSymbols> symbols_{};
};

const HuffmanCode& huffman() {
  static const HuffmanCode code;
  return code;
}

// Reads the parts of a block from its front. Everything throws Http2Error where the block ends too early.
class Reader {
 public:
  explicit Reader(std::string_view block) : left_(block) {}

  bool is_done() const { return left_.empty(); }
  uint8_t peek() const {
    if (left_.empty()) throw Http2Error(Http2Code::kCompressionError, "a header block ends too early");
    return static_cast<uint8_t>(left_.front());
  }

  // RFC 7541 §5.1, with the first `prefix_bits` bits in the byte at the front.
  uint64_t integer(int prefix_bits) {
    const uint8_t mask = static_cast<uint8_t>((1 << prefix_bits) - 1);
    uint64_t value = take() & mask;
    if (value < mask) return value;
    for (int shift = 0;; shift += 7) {
      if (shift > kMostShift) throw Http2Error(Http2Code::kCompressionError, "a number that is too large");
      const uint8_t byte = take();
      value += uint64_t{byte & 0x7fU} << shift;
      if ((byte & 0x80) == 0) return value;
    }
  }

  // RFC 7541 §5.2.
  std::string string() {
    const bool is_huffman = (peek() & 0x80) != 0;
    const uint64_t size = integer(7);
    if (size > left_.size()) throw Http2Error(Http2Code::kCompressionError, "a string ends behind its block");
    const std::string_view bytes = left_.substr(0, size);
    left_.remove_prefix(size);
    return is_huffman ? huffman().decode(bytes) : std::string(bytes);
  }

 private:
  static constexpr int kMostShift = 28;

  uint8_t take() {
    const uint8_t byte = peek();
    left_.remove_prefix(1);
    return byte;
  }

  std::string_view left_;
};

size_t size_of(const HeaderField& field) { return field.name.size() + field.value.size() + kFieldOverheadBytes; }

}  // namespace

std::vector<HeaderField> HpackDecoder::decode(std::string_view block) {
  std::vector<HeaderField> fields;
  size_t list_bytes = 0;
  for (Reader reader(block); !reader.is_done();) {
    const uint8_t first = reader.peek();
    HeaderField field;
    if ((first & 0x80) != 0) {  // indexed
      field = entry(reader.integer(7));
    } else if ((first & 0xe0) == 0x20) {  // a new size of the table, which stands before any field
      if (!fields.empty()) throw Http2Error(Http2Code::kCompressionError, "the table's size changes after a field");
      set_table_limit(reader.integer(5));
      continue;
    } else {  // a literal, to be remembered or not
      const bool is_remembered = (first & 0x40) != 0;
      const uint64_t name = reader.integer(is_remembered ? 6 : 4);
      field.name = name != 0 ? entry(name).name : reader.string();
      field.value = reader.string();
      if (is_remembered) insert(field);
    }
    list_bytes += size_of(field);
    if (list_bytes > most_list_bytes_) throw Http2Error(Http2Code::kEnhanceYourCalm, "too many headers");
    fields.push_back(std::move(field));
  }
  return fields;
}

HeaderField HpackDecoder::entry(uint64_t index) const {
  if (index >= 1 && index <= kNumStatic) return {kStaticTable[index - 1].name, kStaticTable[index - 1].value};
  if (index == 0 || index - kNumStatic > table_.size())
    throw Http2Error(Http2Code::kCompressionError, "there is no header of this index");
  return table_[index - kNumStatic - 1];
}

void HpackDecoder::insert(const HeaderField& field) {
  table_.push_front(field);
  table_bytes_ += size_of(field);
  evict();  // of a field larger than the table nothing stays, not even itself (RFC 7541 §4.4)
}

void HpackDecoder::set_table_limit(uint64_t bytes) {
  if (bytes > kTableBytes) throw Http2Error(Http2Code::kCompressionError, "a larger table than we have");
  table_limit_ = bytes;
  evict();
}

void HpackDecoder::evict() {
  while (table_bytes_ > table_limit_) {
    table_bytes_ -= size_of(table_.back());
    table_.pop_back();
  }
}

}  // namespace tw::health
