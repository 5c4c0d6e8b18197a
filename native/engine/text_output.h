// From token bytes to text that may be sent: whole UTF-8, held back where a stop string may have begun (W-5, W-23).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tw {

// Replaces bytes that are not UTF-8 by U+FFFD, one for each maximal invalid subsequence (Unicode 15, §3.9). Returns how
// many leading bytes of `bytes` were consumed: without `at_end`, an incomplete character at the end is left.
size_t decode_utf8(const std::string& bytes, bool at_end, std::string* text);

class TextOutput {
 public:
  explicit TextOutput(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // Adds a token's bytes. Returns all text that waits, or nothing if its end is part of a character or may begin a stop
  // string: a token's text is sent whole or waits whole, so that ids and text travel together. Once a stop string is
  // complete, `stopped()` is true and the text returned was the last.
  std::string push(const std::string& bytes);
  // The rest, when no token follows.
  std::string finish();

  bool stopped() const { return matched_ >= 0; }
  const std::string& stop_sequence() const { return stops_[static_cast<size_t>(matched_)]; }

 private:
  // Cuts held_ at the first stop string, if one is complete in it.
  void find_stop();
  // Whether the end of held_ is the beginning of a stop string.
  bool may_begin_stop() const;

  std::vector<std::string> stops_;
  std::string bytes_;  // not yet a whole character
  std::string held_;   // text not yet sent
  int matched_ = -1;
};

}  // namespace tw
