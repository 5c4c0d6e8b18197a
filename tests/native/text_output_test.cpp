// Text that may be sent: whole characters, nothing that may begin a stop string (W-5, W-23).
#include "engine/text_output.h"

#include <random>

#include "check.h"
#include "core/philox.h"
#include "core/sha256.h"

using tw::TextOutput;

namespace {

std::string all_of(TextOutput* output, const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += output->push(piece);
  return text + output->finish();
}

}  // namespace

// U4
TEST(a_character_split_over_tokens_waits) {
  TextOutput output({});
  CHECK_EQ(output.push("a\xF0\x9F"), std::string());
  CHECK_EQ(output.push("\x8E"), std::string());
  CHECK_EQ(output.push("\x89"), std::string("a\xF0\x9F\x8E\x89"));
}

TEST(random_splits_give_the_same_text) {
  const std::string text = "naïve 漢字 مرحبا 👩‍👩‍👧‍👦 end\xE2\x80\xA8.";
  std::mt19937 random(1);
  for (int run = 0; run < 2000; ++run) {
    TextOutput output({});
    std::vector<std::string> pieces;
    for (size_t i = 0; i < text.size();) {
      const size_t length = 1 + random() % 4;
      pieces.push_back(text.substr(i, length));
      i += length;
    }
    CHECK_EQ(all_of(&output, pieces), text);
  }
}

TEST(invalid_bytes_become_replacement_characters_one_a_maximal_part) {
  const std::string r = "\xEF\xBF\xBD";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\xFFz", r + "z"},
      {"\xC0\xAF", r + r},
      {"\xE2\x82z", r + "z"},
      {"\xED\xA0\x80", r + r + r},
      {"\xF0\x80\x80\x41", r + r + r + "A"},
      {"\xF4\x90\x80\x80", r + r + r + r},
      {"\x80", r},
  };
  for (const auto& [bytes, expected] : cases) {
    TextOutput output({});
    CHECK_EQ(all_of(&output, {bytes}), expected);
  }
}

TEST(an_unfinished_character_at_the_end_is_one_replacement_character) {
  TextOutput output({});
  CHECK_EQ(output.push("ok\xF0\x9F\x8E"), std::string());
  CHECK_EQ(output.finish(), std::string("ok\xEF\xBF\xBD"));
}

TEST(a_stop_string_over_token_borders_is_found_and_not_sent) {
  TextOutput output({"END", "\n\n"});
  CHECK_EQ(output.push("go "), std::string("go "));
  CHECK_EQ(output.push("E"), std::string());
  CHECK_EQ(output.push("N"), std::string());
  CHECK_EQ(output.push("D of it"), std::string());
  CHECK(output.stopped());
  CHECK_EQ(output.stop_sequence(), std::string("END"));
  CHECK_EQ(output.finish(), std::string());
}

TEST(what_only_looked_like_a_stop_is_sent) {
  TextOutput output({"END"});
  CHECK_EQ(output.push("EN"), std::string());
  CHECK_EQ(output.push("ERGY"), std::string("ENERGY"));
  CHECK(!output.stopped());
}

TEST(the_earliest_of_several_stops_wins) {
  TextOutput output({"late", "ear"});
  CHECK_EQ(output.push("an early late one"), std::string("an "));
  CHECK_EQ(output.stop_sequence(), std::string("ear"));
}

TEST(a_stop_of_multibyte_text_is_found_across_bytes) {
  TextOutput output({"終"});
  CHECK_EQ(output.push("x\xE7"), std::string());
  CHECK_EQ(output.push("\xB5\x82y"), std::string("x"));
  CHECK(output.stopped());
}

TEST(held_text_is_flushed_at_the_end) {
  TextOutput output({"stop"});
  CHECK_EQ(output.push("a st"), std::string());
  CHECK_EQ(output.finish(), std::string("a st"));
}

// FIPS 180-4 examples.
TEST(sha256_of_known_messages) {
  tw::Sha256 empty;
  CHECK_EQ(empty.hex(), std::string("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
  tw::Sha256 abc;
  abc.update("abc", 3);
  CHECK_EQ(abc.hex(), std::string("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
  tw::Sha256 million;
  for (int i = 0; i < 1000; ++i) million.update(std::string(1000, 'a').data(), 1000);
  CHECK_EQ(million.hex(), std::string("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"));
}

// Random123's known answers for philox4x32-10.
TEST(philox_known_answers) {
  const auto zero = tw::philox4x32({0, 0, 0, 0}, {0, 0});
  CHECK_EQ(zero[0], 0x6627e8d5u);
  CHECK_EQ(zero[1], 0xe169c58du);
  CHECK_EQ(zero[2], 0xbc57ac4cu);
  CHECK_EQ(zero[3], 0x9b00dbd8u);
  const uint32_t f = 0xffffffffu;
  const auto ones = tw::philox4x32({f, f, f, f}, {f, f});
  CHECK_EQ(ones[0], 0x408f276du);
  const auto pi = tw::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0});
  CHECK_EQ(pi[0], 0xd16cfe09u);
}

TEST(draws_are_uniform_and_depend_on_seed_and_index_only) {
  double total = 0;
  for (uint64_t i = 0; i < 10000; ++i) total += tw::uniform_draw(42, i);
  CHECK(total / 10000 > 0.49 && total / 10000 < 0.51);
  CHECK(tw::uniform_draw(42, 7) == tw::uniform_draw(42, 7));
  CHECK(tw::uniform_draw(42, 7) != tw::uniform_draw(43, 7));
}
