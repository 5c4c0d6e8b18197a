#include "engine/text_output.h"

#include <algorithm>

namespace tw {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";

// Length of the sequence that a lead byte announces (0: not a lead byte) and the bounds of its second byte.
struct Lead {
  size_t length;
  uint8_t low;
  uint8_t high;
};

Lead lead_of(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte >= 0xC2 && byte <= 0xDF) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

size_t decode_utf8(const std::string& bytes, bool at_end, std::string* text) {
  size_t i = 0;
  while (i < bytes.size()) {
    const Lead lead = lead_of(static_cast<uint8_t>(bytes[i]));
    size_t valid = lead.length == 0 ? 0 : 1;
    while (valid != 0 && valid < lead.length && i + valid < bytes.size()) {
      const auto byte = static_cast<uint8_t>(bytes[i + valid]);
      const bool fits = valid == 1 ? byte >= lead.low && byte <= lead.high : byte >= 0x80 && byte <= 0xBF;
      if (!fits) break;
      ++valid;
    }
    if (valid != 0 && valid == lead.length) {
      text->append(bytes, i, valid);
      i += valid;
    } else if (valid != 0 && i + valid == bytes.size() && !at_end) {
      break;
    } else {
      text->append(kReplacement);
      i += std::max<size_t>(valid, 1);
    }
  }
  return i;
}

void TextOutput::find_stop() {
  size_t first = std::string::npos;
  for (size_t i = 0; i < stops_.size(); ++i) {
    const size_t place = held_.find(stops_[i]);
    if (place < first) {
      first = place;
      matched_ = static_cast<int>(i);
    }
  }
  if (matched_ >= 0) held_.resize(first);
}

bool TextOutput::may_begin_stop() const {
  for (const std::string& stop : stops_) {
    for (size_t length = std::min(stop.size() - 1, held_.size()); length > 0; --length) {
      if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) return true;
    }
  }
  return false;
}

std::string TextOutput::push(const std::string& bytes) {
  if (stopped()) return "";
  bytes_ += bytes;
  bytes_.erase(0, decode_utf8(bytes_, false, &held_));
  find_stop();
  std::string out;
  if (stopped() || (bytes_.empty() && !may_begin_stop())) out.swap(held_);
  return out;
}

std::string TextOutput::finish() {
  if (stopped()) return "";
  decode_utf8(bytes_, true, &held_);
  bytes_.clear();
  find_stop();
  std::string out;
  out.swap(held_);
  return out;
}

}  // namespace tw
