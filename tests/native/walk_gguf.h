// Reads everything a GGUF file holds, as the fuzzer and the corpus test do.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tw::test {

// Parses the bytes, decodes every value, and dequantises the first and last block of every tensor. Returns whether the
// file was accepted; a refused one has thrown tw::Error with a one-line message, anything else ends the process.
bool walk_gguf(const uint8_t* data, size_t size);

}  // namespace tw::test
