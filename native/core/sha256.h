// SHA-256 (FIPS 180-4), for the stream digest and the prefix cache's hash chain.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace tw {

class Sha256 {
 public:
  using Digest = std::array<uint8_t, 32>;

  void update(const void* data, size_t num_bytes);
  // The digest of everything so far; more may be added afterwards.
  Digest digest() const;
  // The digest in lower-case hexadecimal.
  std::string hex() const;

 private:
  void compress(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_{};
  uint64_t num_bytes_ = 0;
};

}  // namespace tw
