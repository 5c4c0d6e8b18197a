// Serialises tokenwire.v1.ExecuteEvent messages, so that a token's bytes are built once and outside Python's lock.
// Field numbers follow protos/tokenwire/v1/inference.proto; a test parses everything back with protobuf's own runtime.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/sampling.h"
#include "core/sha256.h"

namespace tw {

struct StartedEvent {
  std::string job_id;
  std::string model;
  int64_t unix_seconds = 0;
  int32_t nanos = 0;
  uint64_t seed = 0;
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;
};

// Tokens of one stream whose text is sent together.
struct TokenEvent {
  std::string text;
  uint32_t first_index = 0;
  std::vector<uint32_t> ids;
  std::vector<SampleResult> logprobs;  // one an id, or empty
  Sha256 stream_hash;                  // over all ids of the stream, to the end of this event
};

struct MetricsEvent {
  uint32_t tokens_in = 0;
  uint32_t tokens_out = 0;
  uint32_t cached_tokens = 0;
  double queue_ms = 0;
  double prefill_ms = 0;
  double first_token_ms = 0;
  double decode_ms = 0;
  double tokens_per_second = 0;
};

enum class StopReason { kNone = 0, kEos = 1, kMaxTokens = 2, kStopSequence = 3 };

struct EndEvent {
  uint32_t tokens_out = 0;
  uint64_t decode_time_ms = 0;
  StopReason stop_reason = StopReason::kNone;
  std::string stop_sequence;
  std::string digest;
};

std::string encode(const StartedEvent& event);
// `vocabulary` gives the bytes of the ids in `logprobs`.
std::string encode(const TokenEvent& event, const std::vector<std::string>& vocabulary);
std::string encode(const MetricsEvent& event);
std::string encode(const EndEvent& event);

}  // namespace tw
