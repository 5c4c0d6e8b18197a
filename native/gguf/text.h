// Text from a file or a path, made fit for a one-line message. Internal to native/gguf.
#pragma once

#include <string>
#include <string_view>

namespace tw::gguf {

// `text` with control characters and whatever is not UTF-8 as \xNN, cut after `max_bytes` bytes of input. The result is
// one line of valid UTF-8.
std::string printable(std::string_view text, size_t max_bytes = 4096);

// `name` in backquotes, cut to a readable length.
std::string quoted(std::string_view name);

}  // namespace tw::gguf
