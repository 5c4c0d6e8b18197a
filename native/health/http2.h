// The frames of HTTP/2 (RFC 9113): their numbers, how they are laid out, and what a broken one does to its connection.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tw::health {

inline constexpr std::string_view kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
inline constexpr size_t kFrameHeaderBytes = 9;
// The largest payload that a peer may send (RFC 9113 §4.2): we never announce more.
inline constexpr size_t kMostFrameBytes = 16384;
// Of a connection and of each stream, until SETTINGS say otherwise.
inline constexpr int64_t kFirstWindowBytes = 65535;
inline constexpr int64_t kMostWindowBytes = 0x7fffffff;

enum class FrameType : uint8_t {
  kData = 0,
  kHeaders = 1,
  kPriority = 2,
  kRstStream = 3,
  kSettings = 4,
  kPushPromise = 5,
  kPing = 6,
  kGoAway = 7,
  kWindowUpdate = 8,
  kContinuation = 9,
};

namespace flag {
inline constexpr uint8_t kEndStream = 0x1;
inline constexpr uint8_t kAck = 0x1;
inline constexpr uint8_t kEndHeaders = 0x4;
inline constexpr uint8_t kPadded = 0x8;
inline constexpr uint8_t kPriority = 0x20;
}  // namespace flag

namespace setting {
inline constexpr uint16_t kHeaderTableSize = 1;
inline constexpr uint16_t kMaxConcurrentStreams = 3;
inline constexpr uint16_t kInitialWindowSize = 4;
inline constexpr uint16_t kMaxHeaderListSize = 6;
}  // namespace setting

enum class Http2Code : uint32_t {
  kNoError = 0,
  kProtocolError = 1,
  kFlowControlError = 3,
  kStreamClosed = 5,
  kFrameSizeError = 6,
  kRefusedStream = 7,
  kCompressionError = 9,
  kEnhanceYourCalm = 11,
};

// A peer broke a rule that ends the whole connection. Thrown and caught within this room.
class Http2Error : public std::runtime_error {
 public:
  Http2Error(Http2Code code, const char* rule) : std::runtime_error(rule), code_(code) {}
  Http2Code code() const { return code_; }

 private:
  Http2Code code_;
};

struct FrameHeader {
  uint32_t length;
  FrameType type;
  uint8_t flags;
  uint32_t stream;

  bool has(uint8_t which) const { return (flags & which) != 0; }
};

// Of at least kFrameHeaderBytes bytes.
FrameHeader read_frame_header(std::string_view bytes);
// A big-endian number of 4 bytes at the beginning of `bytes`.
uint32_t read_u32(std::string_view bytes);
uint16_t read_u16(std::string_view bytes);
void append_u32(std::string& out, uint32_t value);
void append_setting(std::string& out, uint16_t id, uint32_t value);
void append_frame(std::string& out, FrameType type, uint8_t flags, uint32_t stream, std::string_view payload);

// A payload without its padding (RFC 9113 §6.1). Throws Http2Error if there is more padding than payload.
std::string_view without_padding(const FrameHeader& frame, std::string_view payload);

}  // namespace tw::health
