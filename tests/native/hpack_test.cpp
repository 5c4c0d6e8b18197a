// Header compression as a peer may send it: RFC 7541's examples, its limits, and blocks that break it.
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "health/hpack.h"
#include "health/http2.h"

namespace {

using namespace tw::health;

std::string from_hex(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16)));
  return bytes;
}

std::string shown(const std::vector<HeaderField>& fields) {
  std::string text;
  for (const HeaderField& field : fields) text += field.name + "=" + field.value + ";";
  return text;
}

Http2Code refusal_of(std::string_view block, size_t most_list_bytes = 8192) {
  try {
    HpackDecoder(most_list_bytes).decode(block);
  } catch (const Http2Error& error) {
    return error.code();
  }
  return Http2Code::kNoError;
}

}  // namespace

TEST(header_blocks_read_as_in_rfc_7541_appendix_c) {
  HpackDecoder plain(8192);
  CHECK_EQ(shown(plain.decode(from_hex("828684410f7777772e6578616d706c652e636f6d"))),
           ":method=GET;:scheme=http;:path=/;:authority=www.example.com;");
  CHECK_EQ(shown(plain.decode(from_hex("828684be58086e6f2d6361636865"))),
           ":method=GET;:scheme=http;:path=/;:authority=www.example.com;cache-control=no-cache;");
  HpackDecoder packed(8192);
  packed.decode(from_hex("828684418cf1e3c2e5f23a6ba0ab90f4ff"));
  CHECK_EQ(shown(packed.decode(from_hex("828684be5886a8eb10649cbf"))),
           ":method=GET;:scheme=http;:path=/;:authority=www.example.com;cache-control=no-cache;");
  CHECK_EQ(shown(packed.decode(from_hex("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"))),
           ":method=GET;:scheme=https;:path=/index.html;:authority=www.example.com;custom-key=custom-value;");
}

TEST(the_oldest_headers_leave_a_full_table) {
  HpackDecoder decoder(1 << 16);
  const std::string value(100, 'v');  // a field of 1 + 100 + 32 bytes: 30 of them fit
  std::string block;
  for (char name = 'A'; name < 'A' + 31; ++name)
    block += std::string("\x40\x01") + name + static_cast<char>(value.size()) + value;
  decoder.decode(block);
  CHECK_EQ(decoder.decode("\xbe")[0].name, std::string(1, 'A' + 30));  // index 62, the newest
  CHECK_EQ(decoder.decode("\xdb")[0].name, std::string("B"));          // index 91, the oldest
  CHECK(refusal_of("\xdc") == Http2Code::kCompressionError);
  decoder.decode(std::string("\x20"));  // no table any more, and then one again
  decoder.decode(std::string("\x3f\xe1\x1f") + block.substr(0, 104));
  CHECK_EQ(decoder.decode("\xbe")[0].name, std::string("A"));
}

TEST(a_field_larger_than_the_table_empties_it) {
  HpackDecoder decoder(1 << 16);
  decoder.decode(std::string("\x40\x01") + "a" + "\x01" + "b");
  CHECK_EQ(decoder.decode("\xbe")[0].value, std::string("b"));
  decoder.decode(std::string("\x40\x01") + "c" + "\x7f\x81\x1f" + std::string(4096, 'x'));
  try {
    decoder.decode("\xbe");
    CHECK(false);
  } catch (const Http2Error& error) {
    CHECK(error.code() == Http2Code::kCompressionError);
  }
}

TEST(header_blocks_that_are_not_well_formed_are_refused) {
  for (const char* hex : {
           "80",                  // index 0
           "be",                  // of an empty table
           "ff",                  // a number that goes on
           "ffffffffffffffffff",  // and is too large
           "00",                  // a name that is missing
           "000161",              // a value that is
           "00ff",                // a length that is
           "00056162",            // a string that ends behind its block
           "0001610584ffffff",    // of which there are 4 bytes
           "00016181fe",          // Huffman padded with a zero
           "00016182ffff",        // with more than seven bits
           "00016184fffffffc",    // the end of the string within it
           "8220",                // a new size of the table after a field
           "3fe21f",              // of 4,097 bytes
       })
    CHECK(refusal_of(from_hex(hex)) == Http2Code::kCompressionError);
  CHECK(refusal_of(from_hex("000161") + std::string("\x00", 1)) == Http2Code::kNoError);
}

TEST(a_small_block_cannot_unfold_to_a_large_list) {
  HpackDecoder decoder(8192);
  decoder.decode(std::string("\x40\x01") + "a" + "\x7f\x81\x17" + std::string(3072, 'x'));
  try {
    decoder.decode(std::string(1000, '\xbe'));
    CHECK(false);
  } catch (const Http2Error& error) {
    CHECK(error.code() == Http2Code::kEnhanceYourCalm);
  }
}
