// One connection of HTTP/2 on which `grpc.health.v1.Health` answers: bytes in, bytes out, no socket.
//
// It is a server of this one service and no more: unary Check, and Watch, whose reader sees the latest status alone.
// What a peer can make it hold is bounded: streams, headers, a message, and what waits to be sent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "health/endings.h"
#include "health/hpack.h"
#include "health/http2.h"
#include "health/serving_table.h"

namespace tw::health {

struct ConnectionLimits {
  uint32_t most_streams = 100;       // open at a time
  size_t most_header_bytes = 16384;  // of a call, packed and unfolded
};

class Connection {
 public:
  // The largest question, bytes: names of services are short.
  static constexpr size_t kMostMessageBytes = 4096;
  // Watchers wait, and whoever reads the socket should, while more than this waits to be sent.
  static constexpr size_t kMostUnsentBytes = 65536;

  // Both outlive the connection.
  Connection(const ServingTable& table, Endings& endings, const ConnectionLimits& limits);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Takes what came from the peer. Never throws for what it holds: a broken rule ends the connection.
  void receive(std::string_view bytes, Clock::time_point now);
  // Tells watchers what changed and answers what waited for room. To be called when the table changed, when time made
  // it stale, and when the output was sent.
  void advance(Clock::time_point now);
  // Asks the peer to go elsewhere: this end closes.
  void go_away(Http2Code code);

  // What is to be sent; the caller takes from its front.
  std::string& output() { return output_; }
  // Nothing is read any more: close once the output was sent.
  bool is_over() const { return is_over_; }
  // The peer has spoken HTTP/2.
  bool has_begun() const { return state_ != State::kPreface; }
  bool has_watchers() const { return num_watchers_ != 0; }

 private:
  enum class State : uint8_t { kPreface, kFirstSettings, kFrames, kContinuation };
  enum class Method : uint8_t { kCheck, kWatch };

  struct Stream {
    Method method;
    std::string body;                    // of the request, while it comes
    std::optional<std::string> service;  // what was asked about, once the request is whole
    std::optional<ServingStatus> sent;   // of a watch: what its reader was told last
    int64_t credit_bytes = 0;  // that the peer takes of this stream beyond `first_window_bytes_`, less what was sent
  };
  using Streams = std::map<uint32_t, Stream>;

  void read(Clock::time_point now);
  void handle(const FrameHeader& frame, std::string_view payload, Clock::time_point now);
  void on_headers(const FrameHeader& frame, std::string_view payload);
  void on_header_block(Clock::time_point now);
  void on_data(const FrameHeader& frame, std::string_view payload, Clock::time_point now);
  void on_settings(const FrameHeader& frame, std::string_view payload);
  void on_window_update(const FrameHeader& frame, std::string_view payload, Clock::time_point now);
  void on_reset(const FrameHeader& frame, std::string_view payload);

  // The stream of a new call, or none where the call was refused.
  void open(uint32_t id, const std::vector<HeaderField>& fields, bool is_whole, Clock::time_point now);
  void on_request(Streams::iterator stream, Clock::time_point now);
  // Sends what this stream waits for, if there is room. A check's stream is gone afterwards.
  void advance(Streams::iterator stream, Clock::time_point now);
  void refuse(Streams::iterator stream, int grpc_status, std::string_view message, bool is_whole);
  void erase(Streams::iterator stream);

  void send_headers(uint32_t id, std::string_view block, bool ends_stream);
  void send_refusal(uint32_t id, int grpc_status, std::string_view message, bool is_whole);
  void send_reset(uint32_t id, Http2Code code);

  const ServingTable& table_;
  Endings& endings_;
  const ConnectionLimits limits_;

  State state_ = State::kPreface;
  bool is_over_ = false;
  std::string received_;  // what is not a whole frame yet
  std::string output_;
  HpackDecoder hpack_;
  Streams streams_;
  size_t num_watchers_ = 0;
  uint32_t last_stream_ = 0;

  uint32_t block_stream_ = 0;  // whose header block is coming
  bool block_ends_stream_ = false;
  std::string block_;

  int64_t window_bytes_ = kFirstWindowBytes;        // that the peer takes of the connection
  int64_t first_window_bytes_ = kFirstWindowBytes;  // of each stream
  bool has_more_room_ = false;                      // since all streams were looked at last
  size_t uncredited_bytes_ = 0;                     // that came, and the peer was not told to send again

  // A peer that takes less than the usual table must hear that we keep to it, though we use none (RFC 7541 §4.2).
  bool must_shrink_table_ = false;
};

}  // namespace tw::health
