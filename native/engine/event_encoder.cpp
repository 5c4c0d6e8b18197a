#include "engine/event_encoder.h"

#include <cstring>

#include "engine/text_output.h"

namespace tw {
namespace {

// Protobuf's wire format (protobuf.dev, "Encoding"): proto3 leaves out fields that hold their default.
class Message {
 public:
  void integer(uint32_t field, uint64_t value) {
    if (value == 0) return;
    tag(field, 0);
    varint(value);
  }
  void real(uint32_t field, double value) {
    if (value == 0) return;
    tag(field, 1);
    fixed(value);
  }
  void real(uint32_t field, float value) {
    if (value == 0) return;
    tag(field, 5);
    fixed(value);
  }
  void bytes(uint32_t field, const std::string& value) {
    if (!value.empty()) nested(field, value);
  }
  // A sub-message or string, also if empty.
  void nested(uint32_t field, const std::string& value) {
    tag(field, 2);
    varint(value.size());
    out_ += value;
  }
  void packed(uint32_t field, const std::vector<uint32_t>& values) {
    if (values.empty()) return;
    Message inner;
    for (const uint32_t value : values) inner.varint(value);
    nested(field, inner.out_);
  }
  std::string take() { return std::move(out_); }

 private:
  void tag(uint32_t field, uint32_t wire_type) { varint(field << 3 | wire_type); }
  void varint(uint64_t value) {
    while (value >= 0x80) {
      out_ += static_cast<char>(value | 0x80);
      value >>= 7;
    }
    out_ += static_cast<char>(value);
  }
  template <class T>
  void fixed(T value) {
    char raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);  // little-endian, as every machine we build for
    out_.append(raw, sizeof value);
  }

  std::string out_;
};

// Numbers of ExecuteEvent's oneof.
enum : uint32_t { kStarted = 1, kToken = 2, kMetrics = 3, kEnd = 4 };

// Of the stream's digest, a token event carries this many leading characters: 64 bits, beside the 256 of `end`.
constexpr size_t kTokenDigestChars = 16;

std::string wrap(uint32_t kind, Message* inner) {
  Message event;
  event.nested(kind, inner->take());
  return event.take();
}

void token_score(Message* message, int32_t id, float logprob, const std::vector<std::string>& vocabulary) {
  const std::string& raw = vocabulary[static_cast<size_t>(id)];
  std::string text;
  decode_utf8(raw, true, &text);
  message->integer(1, static_cast<uint64_t>(id));
  message->bytes(2, text);
  message->bytes(3, raw);
  message->real(4, logprob);
}

}  // namespace

std::string encode(const StartedEvent& event) {
  Message time;
  time.integer(1, static_cast<uint64_t>(event.unix_seconds));
  time.integer(2, static_cast<uint64_t>(event.nanos));
  Message message;
  message.bytes(1, event.job_id);
  message.bytes(2, event.model);
  message.nested(3, time.take());
  message.integer(4, event.seed);
  message.integer(5, event.prompt_tokens);
  message.integer(6, event.cached_tokens);
  return wrap(kStarted, &message);
}

std::string encode(const TokenEvent& event, const std::vector<std::string>& vocabulary) {
  Message message;
  message.bytes(1, event.text);
  message.integer(2, event.first_index);
  message.packed(3, event.ids);
  for (const SampleResult& result : event.logprobs) {
    Message entry;
    token_score(&entry, result.id, result.logprob, vocabulary);
    for (const TokenScore& score : result.top) {
      Message top;
      token_score(&top, score.id, score.logprob, vocabulary);
      entry.nested(5, top.take());
    }
    message.nested(4, entry.take());
  }
  message.bytes(5, event.stream_hash.hex().substr(0, kTokenDigestChars));
  return wrap(kToken, &message);
}

std::string encode(const MetricsEvent& event) {
  Message message;
  message.integer(1, event.tokens_in);
  message.integer(2, event.tokens_out);
  message.integer(3, event.cached_tokens);
  message.real(4, event.queue_ms);
  message.real(5, event.prefill_ms);
  message.real(6, event.first_token_ms);
  message.real(7, event.decode_ms);
  message.real(8, event.tokens_per_second);
  return wrap(kMetrics, &message);
}

std::string encode(const EndEvent& event) {
  Message message;
  message.integer(1, event.tokens_out);
  message.integer(2, event.decode_time_ms);
  message.integer(3, static_cast<uint64_t>(event.stop_reason));
  message.bytes(4, event.stop_sequence);
  message.bytes(5, event.digest);
  return wrap(kEnd, &message);
}

}  // namespace tw
