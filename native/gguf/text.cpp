#include "gguf/text.h"

#include <cstdint>

namespace tw::gguf {
namespace {

constexpr size_t kMaxQuotedBytes = 80;

// Bytes of the well-formed UTF-8 character that starts at `i`, or 0 (RFC 3629: no overlong forms, no surrogates).
size_t utf8_length(std::string_view text, size_t i) {
  const auto at = [&](size_t k) -> uint32_t { return k < text.size() ? static_cast<uint8_t>(text[k]) : 0u; };
  const auto tail = [&](size_t k) { return (at(k) & 0xc0u) == 0x80u; };
  const uint32_t lead = at(i);
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return tail(i + 1) ? 2 : 0;
  if (lead >= 0xe0 && lead <= 0xef) {
    if (lead == 0xe0 && at(i + 1) < 0xa0) return 0;
    if (lead == 0xed && at(i + 1) > 0x9f) return 0;
    return tail(i + 1) && tail(i + 2) ? 3 : 0;
  }
  if (lead >= 0xf0 && lead <= 0xf4) {
    if (lead == 0xf0 && at(i + 1) < 0x90) return 0;
    if (lead == 0xf4 && at(i + 1) > 0x8f) return 0;
    return tail(i + 1) && tail(i + 2) && tail(i + 3) ? 4 : 0;
  }
  return 0;
}

// C1 controls and the two Unicode separators also start a new line for some readers.
bool breaks_lines(std::string_view character) {
  if (character.size() == 1) return static_cast<uint8_t>(character[0]) < 0x20 || character[0] == 0x7f;
  if (character.size() == 2) return character[0] == '\xc2' && static_cast<uint8_t>(character[1]) < 0xa0;
  return character == "\xe2\x80\xa8" || character == "\xe2\x80\xa9";
}

}  // namespace

std::string printable(std::string_view text, size_t max_bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  size_t i = 0;
  while (i < text.size()) {
    const size_t length = utf8_length(text, i);
    const std::string_view character = text.substr(i, length == 0 ? 1 : length);
    if (i + character.size() > max_bytes) return out + "…";
    if (length == 0 || breaks_lines(character)) {
      for (const char c : character) {
        const auto byte = static_cast<uint8_t>(c);
        out += "\\x";
        out += kDigits[byte >> 4];
        out += kDigits[byte & 15];
      }
    } else {
      out += character;
    }
    i += character.size();
  }
  return out;
}

std::string quoted(std::string_view name) { return "`" + printable(name, kMaxQuotedBytes) + "`"; }

}  // namespace tw::gguf
