#include "health/connection.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace tw::health {
namespace {

constexpr std::string_view kServicePath = "/grpc.health.v1.Health/";
constexpr std::string_view kContentType = "application/grpc";
// In front of a header block: the table that it is read with has no room from now on (RFC 7541 §6.3).
constexpr char kNoTable = '\x20';
// Half of what a peer may send before it must be told that there is room again.
constexpr size_t kCreditBytes = kFirstWindowBytes / 2;
// Each frame of a message has a byte that says whether it is compressed, and four with its length.
constexpr size_t kMessagePrefixBytes = 5;
constexpr int64_t kAnswerBytes = kMessagePrefixBytes + 2;

namespace grpc_status {
constexpr int kOk = 0;
constexpr int kInvalidArgument = 3;
constexpr int kNotFound = 5;
constexpr int kUnimplemented = 12;
}  // namespace grpc_status

// Literals that are not remembered, uncompressed (RFC 7541 §6.2.2). Of fewer than 127 bytes each.
void append_literal(std::string& block, std::string_view name, std::string_view value) {
  assert(name.size() < 127 && value.size() < 127);
  block.push_back(0);
  block.push_back(static_cast<char>(name.size()));
  block.append(name);
  block.push_back(static_cast<char>(value.size()));
  block.append(value);
}

std::string response_headers() {
  std::string block(1, '\x88');  // `:status: 200` of the static table
  append_literal(block, "content-type", kContentType);
  return block;
}

std::string answer(ServingStatus status) {
  std::string message(kMessagePrefixBytes - 1, '\0');
  message.push_back(2);     // bytes that follow
  message.push_back(0x08);  // field 1, a number
  message.push_back(static_cast<char>(status));
  return message;
}

std::string trailers(int status, std::string_view message) {
  std::string block;
  append_literal(block, "grpc-status", std::to_string(status));
  if (!message.empty()) append_literal(block, "grpc-message", message);
  return block;
}

// Reads a number of a protobuf message from its front; nothing if there is none.
std::optional<uint64_t> take_varint(std::string_view& bytes) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64 && !bytes.empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(bytes.front());
    bytes.remove_prefix(1);
    value |= uint64_t{byte & 0x7fU} << shift;
    if ((byte & 0x80) == 0) return value;
  }
  return std::nullopt;
}

// The `service` of a serialised HealthCheckRequest; nothing if it is none.
std::optional<std::string> service_of(std::string_view message) {
  std::string service;
  while (!message.empty()) {
    const auto tag = take_varint(message);
    if (!tag || *tag >> 3 == 0) return std::nullopt;
    std::optional<uint64_t> size;
    switch (*tag & 7) {
      case 0:
        if (!take_varint(message)) return std::nullopt;
        size = 0;
        break;
      case 1: size = 8; break;
      case 2: size = take_varint(message); break;
      case 5: size = 4; break;
      default: break;
    }
    if (!size || *size > message.size()) return std::nullopt;
    if (*tag == (1 << 3 | 2)) service = message.substr(0, *size);
    message.remove_prefix(*size);
  }
  return service;
}

}  // namespace

Connection::Connection(const ServingTable& table, Endings& endings, const ConnectionLimits& limits)
    : table_(table), endings_(endings), limits_(limits), hpack_(limits.most_header_bytes) {
  std::string settings;
  append_setting(settings, setting::kMaxConcurrentStreams, limits.most_streams);
  append_setting(settings, setting::kMaxHeaderListSize, static_cast<uint32_t>(limits.most_header_bytes));
  append_frame(output_, FrameType::kSettings, 0, 0, settings);
}

Connection::~Connection() {
  while (!streams_.empty()) erase(streams_.begin());
}

void Connection::receive(std::string_view bytes, Clock::time_point now) {
  if (is_over_) return;
  received_.append(bytes);
  try {
    read(now);
  } catch (const Http2Error& error) {
    go_away(error.code());
  }
  // Once, however many frames made room: a peer must not buy a look at all of its streams with each few bytes.
  if (std::exchange(has_more_room_, false)) advance(now);
}

void Connection::advance(Clock::time_point now) {
  if (is_over_) return;
  for (auto stream = streams_.begin(); stream != streams_.end();) advance(stream++, now);
}

void Connection::go_away(Http2Code code) {
  if (is_over_) return;
  is_over_ = true;
  received_.clear();
  std::string payload;
  append_u32(payload, last_stream_);
  append_u32(payload, static_cast<uint32_t>(code));
  append_frame(output_, FrameType::kGoAway, 0, 0, payload);
}

void Connection::read(Clock::time_point now) {
  size_t at = 0;
  if (state_ == State::kPreface) {
    const size_t size = std::min(received_.size(), kPreface.size());
    if (kPreface.substr(0, size) != std::string_view(received_).substr(0, size))
      throw Http2Error(Http2Code::kProtocolError, "this is no HTTP/2");
    if (size < kPreface.size()) return;
    at = size;
    state_ = State::kFirstSettings;
  }
  while (received_.size() - at >= kFrameHeaderBytes) {
    const auto left = std::string_view(received_).substr(at);
    const FrameHeader frame = read_frame_header(left);
    if (frame.length > kMostFrameBytes) throw Http2Error(Http2Code::kFrameSizeError, "a frame that is too large");
    if (left.size() < kFrameHeaderBytes + frame.length) break;
    handle(frame, left.substr(kFrameHeaderBytes, frame.length), now);
    at += kFrameHeaderBytes + frame.length;
  }
  received_.erase(0, at);
}

void Connection::handle(const FrameHeader& frame, std::string_view payload, Clock::time_point now) {
  if (state_ == State::kFirstSettings) {
    if (frame.type != FrameType::kSettings || frame.has(flag::kAck))
      throw Http2Error(Http2Code::kProtocolError, "the first frame is not SETTINGS");
    state_ = State::kFrames;
  }
  const bool continues = frame.type == FrameType::kContinuation && frame.stream == block_stream_;
  if ((state_ == State::kContinuation) != continues || (frame.type == FrameType::kContinuation && !continues))
    throw Http2Error(Http2Code::kProtocolError, "a header block is not in one piece");

  switch (frame.type) {
    case FrameType::kHeaders: on_headers(frame, payload); [[fallthrough]];
    case FrameType::kContinuation:
      if (continues) block_.append(payload);
      if (block_.size() > limits_.most_header_bytes) throw Http2Error(Http2Code::kEnhanceYourCalm, "too many headers");
      state_ = frame.has(flag::kEndHeaders) ? State::kFrames : State::kContinuation;
      if (state_ == State::kFrames) on_header_block(now);
      break;
    case FrameType::kData: on_data(frame, payload, now); break;
    case FrameType::kSettings: on_settings(frame, payload); break;
    case FrameType::kWindowUpdate: on_window_update(frame, payload, now); break;
    case FrameType::kRstStream: on_reset(frame, payload); break;
    case FrameType::kPing:
      if (frame.stream != 0) throw Http2Error(Http2Code::kProtocolError, "a ping of a stream");
      if (payload.size() != 8) throw Http2Error(Http2Code::kFrameSizeError, "a ping that is not 8 bytes long");
      if (!frame.has(flag::kAck)) append_frame(output_, FrameType::kPing, flag::kAck, 0, payload);
      break;
    case FrameType::kPriority:
      if (frame.stream == 0) throw Http2Error(Http2Code::kProtocolError, "a priority of no stream");
      break;
    case FrameType::kGoAway:
      if (frame.stream != 0) throw Http2Error(Http2Code::kProtocolError, "a farewell to a stream");
      break;
    case FrameType::kPushPromise: throw Http2Error(Http2Code::kProtocolError, "clients do not push");
    default: break;  // what is not known is ignored (RFC 9113 §4.1)
  }
}

void Connection::on_headers(const FrameHeader& frame, std::string_view payload) {
  if (frame.stream % 2 == 0) throw Http2Error(Http2Code::kProtocolError, "a client's streams have odd numbers");
  payload = without_padding(frame, payload);
  if (frame.has(flag::kPriority)) {
    if (payload.size() < 5) throw Http2Error(Http2Code::kFrameSizeError, "a priority that is cut short");
    payload.remove_prefix(5);
  }
  block_stream_ = frame.stream;
  block_ends_stream_ = frame.has(flag::kEndStream);
  block_ = payload;
}

void Connection::on_header_block(Clock::time_point now) {
  // Also of a stream that is gone: the next block builds on this one.
  const auto fields = hpack_.decode(std::exchange(block_, {}));
  const auto stream = streams_.find(block_stream_);
  if (stream != streams_.end()) {  // trailers
    if (!block_ends_stream_ || stream->second.service)
      throw Http2Error(Http2Code::kProtocolError, "headers within a stream");
    on_request(stream, now);
  } else if (block_stream_ > last_stream_) {
    last_stream_ = block_stream_;
    open(block_stream_, fields, block_ends_stream_, now);
  }
}

void Connection::open(uint32_t id, const std::vector<HeaderField>& fields, bool is_whole, Clock::time_point now) {
  std::string_view method, path, content_type;
  for (const HeaderField& field : fields) {
    if (field.name == ":method") method = field.value;
    if (field.name == ":path") path = field.value;
    if (field.name == "content-type") content_type = field.value;
  }
  if (method.empty() || path.empty()) return send_reset(id, Http2Code::kProtocolError);
  if (method != "POST" || content_type.substr(0, kContentType.size()) != kContentType) {
    // `:status`, the eighth name of the static table: no gRPC, so the answer is none either.
    send_headers(id, std::string("\x08\x03", 2) + (method != "POST" ? "405" : "415"), true);
    if (!is_whole) send_reset(id, Http2Code::kNoError);
    return;
  }
  if (streams_.size() >= limits_.most_streams) return send_reset(id, Http2Code::kRefusedStream);
  const bool is_ours = path.substr(0, kServicePath.size()) == kServicePath;
  const std::string_view name = is_ours ? path.substr(kServicePath.size()) : std::string_view();
  if (name != "Check" && name != "Watch")
    return send_refusal(id, grpc_status::kUnimplemented, "there is health alone on this port", is_whole);
  const Method which = name == "Watch" ? Method::kWatch : Method::kCheck;
  num_watchers_ += which == Method::kWatch;
  const auto stream = streams_.emplace(id, Stream{which, {}, {}, {}, 0}).first;
  if (is_whole) on_request(stream, now);
}

void Connection::on_data(const FrameHeader& frame, std::string_view payload, Clock::time_point now) {
  if (frame.stream == 0 || frame.stream > last_stream_)
    throw Http2Error(Http2Code::kProtocolError, "data of no stream");
  uncredited_bytes_ += payload.size();
  if (uncredited_bytes_ >= kCreditBytes) {
    std::string credit;
    append_u32(credit, static_cast<uint32_t>(std::exchange(uncredited_bytes_, 0)));
    append_frame(output_, FrameType::kWindowUpdate, 0, 0, credit);
  }
  payload = without_padding(frame, payload);
  const auto stream = streams_.find(frame.stream);
  if (stream == streams_.end()) return;  // answered before it was whole
  if (stream->second.service) throw Http2Error(Http2Code::kStreamClosed, "data behind the end of a stream");
  std::string& body = stream->second.body;
  body.append(payload);
  const bool is_whole = frame.has(flag::kEndStream);
  if (body.size() > kMessagePrefixBytes + kMostMessageBytes)
    return refuse(stream, grpc_status::kInvalidArgument, "the message is too large", is_whole);
  if (is_whole) on_request(stream, now);
}

void Connection::on_request(Streams::iterator stream, Clock::time_point now) {
  const std::string body = std::exchange(stream->second.body, {});
  if (body.size() >= kMessagePrefixBytes && body[0] == 1)
    return refuse(stream, grpc_status::kUnimplemented, "compressed messages are not taken", true);
  const bool is_framed = body.size() >= kMessagePrefixBytes && body[0] == 0 &&
                         read_u32(std::string_view(body).substr(1)) == body.size() - kMessagePrefixBytes;
  auto service = is_framed ? service_of(std::string_view(body).substr(kMessagePrefixBytes)) : std::nullopt;
  if (!service) return refuse(stream, grpc_status::kInvalidArgument, "this is no HealthCheckRequest", true);
  stream->second.service = std::move(service);
  advance(stream, now);
}

void Connection::advance(Streams::iterator at, Clock::time_point now) {
  Stream& stream = at->second;
  if (!stream.service) return;
  const ServingStatus status = table_.status(*stream.service, now);
  const bool is_watch = stream.method == Method::kWatch;
  if (!is_watch && status == ServingStatus::kServiceUnknown)
    return refuse(at, grpc_status::kNotFound, "no such service", true);
  if (stream.sent == status || output_.size() > kMostUnsentBytes) return;
  if (std::min(window_bytes_, first_window_bytes_ + stream.credit_bytes) < kAnswerBytes) return;

  static const std::string headers = response_headers();
  static const std::string ok = trailers(grpc_status::kOk, {});
  if (!stream.sent) send_headers(at->first, headers, false);
  append_frame(output_, FrameType::kData, 0, at->first, answer(status));
  window_bytes_ -= kAnswerBytes;
  stream.credit_bytes -= kAnswerBytes;
  stream.sent = status;
  if (is_watch) return;
  send_headers(at->first, ok, true);
  endings_.count(Ending::kCheckOk);
  erase(at);
}

void Connection::on_settings(const FrameHeader& frame, std::string_view payload) {
  if (frame.stream != 0) throw Http2Error(Http2Code::kProtocolError, "settings of a stream");
  if (payload.size() % 6 != 0 || (frame.has(flag::kAck) && !payload.empty()))
    throw Http2Error(Http2Code::kFrameSizeError, "settings that are cut short");
  if (frame.has(flag::kAck)) return;
  for (; !payload.empty(); payload.remove_prefix(6)) {
    const uint16_t id = read_u16(payload);  // those that are not looked at are about what we never send
    const uint32_t value = read_u32(payload.substr(2));
    if (id == setting::kHeaderTableSize && value < HpackDecoder::kTableBytes) must_shrink_table_ = true;
    if (id != setting::kInitialWindowSize) continue;
    if (value > kMostWindowBytes) throw Http2Error(Http2Code::kFlowControlError, "a window that is too large");
    first_window_bytes_ = value;  // with it some stream's may be too large, which costs us nothing
  }
  append_frame(output_, FrameType::kSettings, flag::kAck, 0, {});
  has_more_room_ = true;
}

void Connection::on_window_update(const FrameHeader& frame, std::string_view payload, Clock::time_point now) {
  if (payload.size() != 4) throw Http2Error(Http2Code::kFrameSizeError, "a window's update that is not 4 bytes long");
  const int64_t bytes = read_u32(payload) & 0x7fffffff;
  if (frame.stream == 0) {
    window_bytes_ += bytes;
    if (bytes == 0) throw Http2Error(Http2Code::kProtocolError, "a window's update of nothing");
    if (window_bytes_ > kMostWindowBytes) throw Http2Error(Http2Code::kFlowControlError, "a window that is too large");
    has_more_room_ = true;
    return;
  }
  if (frame.stream > last_stream_) throw Http2Error(Http2Code::kProtocolError, "a window of no stream");
  const auto stream = streams_.find(frame.stream);
  if (stream == streams_.end()) return;
  int64_t& credit_bytes = stream->second.credit_bytes;
  credit_bytes += bytes;
  if (bytes != 0 && first_window_bytes_ + credit_bytes <= kMostWindowBytes) {
    advance(stream, now);
    return;
  }
  send_reset(frame.stream, bytes == 0 ? Http2Code::kProtocolError : Http2Code::kFlowControlError);
  erase(stream);
}

void Connection::on_reset(const FrameHeader& frame, std::string_view payload) {
  if (payload.size() != 4) throw Http2Error(Http2Code::kFrameSizeError, "a reset that is not 4 bytes long");
  if (frame.stream == 0 || frame.stream > last_stream_)
    throw Http2Error(Http2Code::kProtocolError, "a reset of no stream");
  const auto stream = streams_.find(frame.stream);
  if (stream != streams_.end()) erase(stream);
}

void Connection::refuse(Streams::iterator stream, int grpc_status, std::string_view message, bool is_whole) {
  send_refusal(stream->first, grpc_status, message, is_whole);
  if (stream->second.method == Method::kWatch) {
    endings_.count(Ending::kWatchInvalid);
    --num_watchers_;
  } else {
    endings_.count(grpc_status == grpc_status::kNotFound ? Ending::kCheckNotFound : Ending::kCheckInvalid);
  }
  streams_.erase(stream);
}

void Connection::erase(Streams::iterator stream) {
  if (stream->second.method == Method::kWatch) {
    endings_.count(Ending::kWatchLeft);
    --num_watchers_;
  }
  streams_.erase(stream);
}

void Connection::send_refusal(uint32_t id, int grpc_status, std::string_view message, bool is_whole) {
  send_headers(id, response_headers() + trailers(grpc_status, message), true);
  // The rest of the request is not wanted (RFC 9113 §8.1).
  if (!is_whole) send_reset(id, Http2Code::kNoError);
}

void Connection::send_headers(uint32_t id, std::string_view block, bool ends_stream) {
  const uint8_t flags = flag::kEndHeaders | (ends_stream ? flag::kEndStream : uint8_t{0});
  std::string start(std::exchange(must_shrink_table_, false) ? 1 : 0, kNoTable);
  append_frame(output_, FrameType::kHeaders, flags, id, start.append(block));
}

void Connection::send_reset(uint32_t id, Http2Code code) {
  std::string payload;
  append_u32(payload, static_cast<uint32_t>(code));
  append_frame(output_, FrameType::kRstStream, 0, id, payload);
}

}  // namespace tw::health
