#include "health/http2.h"

namespace tw::health {
namespace {

constexpr uint32_t kStreamMask = 0x7fffffff;  // the highest bit is reserved

uint8_t byte_at(std::string_view bytes, size_t index) { return static_cast<uint8_t>(bytes[index]); }

}  // namespace

uint32_t read_u32(std::string_view bytes) {
  return uint32_t{byte_at(bytes, 0)} << 24 | uint32_t{byte_at(bytes, 1)} << 16 | uint32_t{byte_at(bytes, 2)} << 8 |
         uint32_t{byte_at(bytes, 3)};
}

uint16_t read_u16(std::string_view bytes) { return static_cast<uint16_t>(byte_at(bytes, 0) << 8 | byte_at(bytes, 1)); }

FrameHeader read_frame_header(std::string_view bytes) {
  return {read_u32(bytes) >> 8, static_cast<FrameType>(byte_at(bytes, 3)), byte_at(bytes, 4),
          read_u32(bytes.substr(5)) & kStreamMask};
}

void append_u32(std::string& out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift & 0xff));
}

void append_setting(std::string& out, uint16_t id, uint32_t value) {
  out.push_back(static_cast<char>(id >> 8));
  out.push_back(static_cast<char>(id & 0xff));
  append_u32(out, value);
}

void append_frame(std::string& out, FrameType type, uint8_t flags, uint32_t stream, std::string_view payload) {
  append_u32(out, static_cast<uint32_t>(payload.size()) << 8 | static_cast<uint32_t>(type));
  out.push_back(static_cast<char>(flags));
  append_u32(out, stream);
  out.append(payload);
}

std::string_view without_padding(const FrameHeader& frame, std::string_view payload) {
  if (!frame.has(flag::kPadded)) return payload;
  if (payload.empty()) throw Http2Error(Http2Code::kFrameSizeError, "a padded frame without its length of padding");
  const size_t padding = byte_at(payload, 0);
  payload.remove_prefix(1);
  if (padding > payload.size()) throw Http2Error(Http2Code::kProtocolError, "more padding than payload");
  payload.remove_suffix(padding);
  return payload;
}

}  // namespace tw::health
