// The health port: frames, flow control, what a hostile peer sends, and the thread with its sockets.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "check.h"
#include "health/connection.h"
#include "health/hpack.h"
#include "health/http2.h"
#include "health/server.h"
#include "health/serving_table.h"

namespace {

using namespace tw::health;
using std::chrono::seconds;

const Clock::time_point kNow = Clock::now();

std::string frame(FrameType type, uint8_t flags, uint32_t stream, std::string_view payload = {}) {
  std::string bytes;
  append_frame(bytes, type, flags, stream, payload);
  return bytes;
}

std::string u32(uint32_t value) {
  std::string bytes;
  append_u32(bytes, value);
  return bytes;
}

std::string literal(std::string_view name, std::string_view value) {
  std::string block(1, '\0');
  block.push_back(static_cast<char>(name.size()));
  block.append(name);
  block.push_back(static_cast<char>(value.size()));
  return block.append(value);
}

std::string request_headers(std::string_view method, std::string_view verb = "POST",
                            std::string_view type = "application/grpc") {
  return literal(":method", verb) + literal(":path", "/grpc.health.v1.Health/" + std::string(method)) +
         literal("content-type", type);
}

std::string message(std::string_view service, char flag = 0) {
  const std::string body =
      service.empty() ? "" : std::string("\x0a") + static_cast<char>(service.size()) + std::string(service);
  return std::string(1, flag) + u32(static_cast<uint32_t>(body.size())) + body;
}

std::string call(uint32_t stream, std::string_view method, std::string_view service) {
  return frame(FrameType::kHeaders, flag::kEndHeaders, stream, request_headers(method)) +
         frame(FrameType::kData, flag::kEndStream, stream, message(service));
}

const std::string kOpening = std::string(kPreface) + frame(FrameType::kSettings, 0, 0);

// What a connection sent, frame by frame in words, such as "HEADERS 1" or "GOAWAY 1": the stream, or the code.
struct Reader {
  HpackDecoder hpack{1 << 16};

  std::string words(std::string& output) {
    std::string text;
    std::string_view left = output;
    while (left.size() >= kFrameHeaderBytes) {
      const FrameHeader header = read_frame_header(left);
      const std::string_view payload = left.substr(kFrameHeaderBytes, header.length);
      left.remove_prefix(kFrameHeaderBytes + header.length);
      if (!text.empty()) text += ", ";
      text += describe(header, payload);
    }
    CHECK_EQ(left.size(), size_t{0});
    output.clear();
    return text;
  }

  std::string describe(const FrameHeader& header, std::string_view payload) {
    const std::string stream = std::to_string(header.stream);
    switch (header.type) {
      case FrameType::kSettings: return header.has(flag::kAck) ? "ACK" : "SETTINGS";
      case FrameType::kPing: return "PING " + std::string(payload);
      case FrameType::kData: return stream + " status " + std::to_string(static_cast<int>(payload.back()));
      case FrameType::kRstStream: return stream + " reset " + std::to_string(read_u32(payload));
      case FrameType::kGoAway: return "GOAWAY " + std::to_string(read_u32(payload.substr(4)));
      case FrameType::kWindowUpdate: return "WINDOW " + std::to_string(read_u32(payload));
      case FrameType::kHeaders: {
        std::string text = stream + (header.has(flag::kEndStream) ? " ends" : " begins");
        for (const HeaderField& field : hpack.decode(payload))
          if (field.name == ":status" ? field.value != "200" : field.name == "grpc-status") text += " " + field.value;
        return text;
      }
      default: return "?";
    }
  }
};

// A connection with three services, of which the first serves.
struct Fixture {
  ServingTable table{{"", "liveness", "readiness"}, seconds(30)};
  Endings endings;
  Connection connection{table, endings, {}};
  Reader reader;

  explicit Fixture(bool is_open = true) {
    table.publish({true, false, false}, kNow);
    if (is_open) CHECK_EQ(send(kOpening), "SETTINGS, ACK");
  }

  std::string send(std::string_view bytes) {
    connection.receive(bytes, kNow);
    return reader.words(connection.output());
  }
  std::string publish(const std::vector<bool>& is_serving) {
    table.publish(is_serving, kNow);
    connection.advance(kNow);
    return reader.words(connection.output());
  }
  // What a connection answers that was just opened.
  static std::string fresh(std::string_view bytes) { return Fixture().send(bytes); }
};

std::string ended(Endings& endings) {
  std::string text;
  const auto counts = endings.take();
  for (size_t i = 0; i < counts.size(); ++i)
    if (counts[i] != 0)
      text += std::string(kEndingNames[i].method) + " " + kEndingNames[i].code + " " + std::to_string(counts[i]) + ";";
  return text;
}

}  // namespace

TEST(a_check_is_answered_and_ends) {
  Fixture fixture;
  CHECK_EQ(fixture.send(call(1, "Check", "")), "1 begins, 1 status 1, 1 ends 0");
  CHECK_EQ(fixture.send(call(3, "Check", "liveness")), "3 begins, 3 status 2, 3 ends 0");
  CHECK_EQ(fixture.send(call(5, "Check", "nothing")), "5 ends 5");
  CHECK_EQ(ended(fixture.endings), "Check OK 2;Check NOT_FOUND 1;");
}

TEST(a_watch_hears_the_status_and_each_change) {
  Fixture fixture;
  CHECK_EQ(fixture.send(call(1, "Watch", "readiness")), "1 begins, 1 status 2");
  CHECK_EQ(fixture.send(call(3, "Watch", "nothing")), "3 begins, 3 status 3");
  CHECK(fixture.connection.has_watchers());
  CHECK_EQ(fixture.publish({true, true, false}), "");
  CHECK_EQ(fixture.publish({true, true, true}), "1 status 1");
  CHECK_EQ(fixture.send(frame(FrameType::kRstStream, 0, 1, u32(8))), "");
  CHECK_EQ(fixture.publish({true, true, false}), "");
  CHECK_EQ(ended(fixture.endings), "Watch DISCONNECTED 1;");
  fixture.send(frame(FrameType::kRstStream, 0, 3, u32(8)));
  CHECK(!fixture.connection.has_watchers());
}

TEST(nothing_serves_once_what_was_published_is_stale) {
  Fixture fixture;
  CHECK_EQ(fixture.send(call(1, "Watch", "")), "1 begins, 1 status 1");
  fixture.connection.advance(kNow + seconds(30));
  CHECK_EQ(fixture.reader.words(fixture.connection.output()), "");
  fixture.connection.advance(kNow + seconds(31));
  CHECK_EQ(fixture.reader.words(fixture.connection.output()), "1 status 2");
  fixture.connection.receive(call(3, "Check", ""), kNow + seconds(31));
  CHECK_EQ(fixture.reader.words(fixture.connection.output()), "3 begins, 3 status 2, 3 ends 0");
}

TEST(a_reader_with_no_room_hears_the_latest_status_once_there_is_some) {
  Fixture fixture;
  const std::string none = std::string("\x00\x04", 2) + u32(0);
  CHECK_EQ(fixture.send(frame(FrameType::kSettings, 0, 0, none)), "ACK");
  CHECK_EQ(fixture.send(call(1, "Watch", "") + call(3, "Check", "")), "");
  CHECK_EQ(fixture.publish({false, false, false}), "");
  CHECK_EQ(fixture.send(frame(FrameType::kWindowUpdate, 0, 1, u32(6))), "");
  CHECK_EQ(fixture.send(frame(FrameType::kWindowUpdate, 0, 1, u32(1))), "1 begins, 1 status 2");
  const std::string some = std::string("\x00\x04", 2) + u32(14);
  CHECK_EQ(fixture.send(frame(FrameType::kSettings, 0, 0, some)), "ACK, 3 begins, 3 status 2, 3 ends 0");
  CHECK_EQ(fixture.publish({true, false, false}), "1 status 1");
  CHECK_EQ(fixture.publish({false, false, false}), "1 status 2");
  CHECK_EQ(fixture.publish({true, false, false}), "");  // the 14 are spent
}

TEST(the_window_of_the_connection_bounds_all_of_its_streams) {
  Fixture fixture;
  uint32_t stream = 1, answered = 0;
  for (; stream < 40'000; stream += 2) {
    const std::string words = fixture.send(call(stream, "Check", ""));
    if (words.find("status") == std::string::npos) break;
    ++answered;
  }
  CHECK_EQ(answered, uint32_t{65535 / 7});
  CHECK(fixture.send(frame(FrameType::kWindowUpdate, 0, 0, u32(100))).find("status 1") != std::string::npos);
}

TEST(the_peer_is_told_that_it_may_send_more) {
  Fixture fixture;
  std::string words;
  for (uint32_t stream = 1; stream < 6'000; stream += 2) words += fixture.send(call(stream, "Check", "readiness"));
  CHECK(words.find("WINDOW 32") != std::string::npos);
}

TEST(a_peer_that_takes_no_header_table_hears_that_there_is_none) {  // RFC 7541 §4.2; others break off
  Fixture fixture;
  CHECK_EQ(fixture.send(frame(FrameType::kSettings, 0, 0, std::string("\x00\x01", 2) + u32(0))), "ACK");
  for (const char first : {'\x20', '\x88'}) {  // before the first header, and once
    fixture.connection.receive(call(first == '\x20' ? 1 : 3, "Check", ""), kNow);
    CHECK_EQ(fixture.connection.output()[kFrameHeaderBytes], first);
    CHECK(fixture.reader.words(fixture.connection.output()).find("ends 0") != std::string::npos);
  }
}

// Seconds of the processor that this thread has used.
double used_s() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

TEST(frames_that_concern_all_streams_cost_one_look_at_them_however_many_come) {
  ServingTable table{{""}, seconds(30)};
  Endings endings;
  Connection connection(table, endings, {10'000, 8192});
  connection.receive(kOpening, kNow);
  for (uint32_t stream = 1; stream < 20'000; stream += 2) {
    connection.receive(call(stream, "Watch", ""), kNow);
    connection.output().clear();
  }
  std::string window, windows;
  append_setting(window, setting::kInitialWindowSize, 65535);
  for (int i = 0; i < 1000; ++i) windows += window;
  std::string empties, updates;
  for (int i = 0; i < 1000; ++i) {
    empties += frame(FrameType::kSettings, 0, 0);
    updates += frame(FrameType::kWindowUpdate, 0, 0, u32(1));
  }
  const auto cost_s = [&](const std::string& bytes) {
    const double began = used_s();
    connection.receive(bytes, kNow);
    return used_s() - began;
  };
  const double one_s = cost_s(frame(FrameType::kSettings, 0, 0));
  for (const std::string& thousand : {empties, updates, frame(FrameType::kSettings, 0, 0, windows)})
    CHECK(cost_s(thousand) < 50 * one_s);
  CHECK(!connection.is_over());
}

TEST(bytes_may_come_in_any_pieces) {
  const std::string padded = std::string(1, '\3') + message("liveness") + std::string(3, '\0');
  const std::string with_priority = std::string(5, '\0') + request_headers("Check");
  const std::string sent =
      kOpening + call(1, "Check", "") +
      frame(FrameType::kHeaders, flag::kEndHeaders | flag::kPriority, 3, with_priority) +
      frame(FrameType::kData, flag::kEndStream | flag::kPadded, 3, padded) +
      frame(FrameType::kHeaders, 0, 5, request_headers("Watch").substr(0, 7)) +
      frame(FrameType::kContinuation, flag::kEndHeaders, 5, request_headers("Watch").substr(7)) +
      frame(FrameType::kData, 0, 5, message("").substr(0, 2)) + frame(FrameType::kData, 0, 5, message("").substr(2)) +
      frame(FrameType::kHeaders, flag::kEndHeaders | flag::kEndStream, 5, literal("x", "y")) +
      frame(FrameType::kPing, 0, 0, "12345678") + frame(static_cast<FrameType>(99), 7, 3, "unknown");
  const std::string expected =
      "SETTINGS, ACK, 1 begins, 1 status 1, 1 ends 0, 3 begins, 3 status 2, 3 ends 0, 5 begins, 5 status 1, PING "
      "12345678";
  for (size_t piece = 1; piece <= sent.size(); ++piece) {
    Fixture fixture(false);
    for (size_t at = 0; at < sent.size(); at += piece)
      fixture.connection.receive(std::string_view(sent).substr(at, piece), kNow);
    CHECK_EQ(fixture.reader.words(fixture.connection.output()), expected);
  }
}

TEST(calls_that_are_no_questions_get_their_status) {
  const auto with_body = [](std::string_view body) {
    return frame(FrameType::kHeaders, flag::kEndHeaders, 1, request_headers("Check")) +
           frame(FrameType::kData, flag::kEndStream, 1, body);
  };
  CHECK_EQ(Fixture::fresh(with_body("")), "1 ends 3");
  CHECK_EQ(Fixture::fresh(with_body("\x08\x01")), "1 ends 3");
  CHECK_EQ(Fixture::fresh(with_body(message("") + message(""))), "1 ends 3");
  CHECK_EQ(Fixture::fresh(with_body(message("", 1))), "1 ends 12");
  CHECK_EQ(Fixture::fresh(with_body(std::string(1, '\0') + u32(2) + "\x0a\x05")), "1 ends 3");
  CHECK_EQ(Fixture::fresh(with_body(std::string(1, '\0') + u32(1) + "\x0b")), "1 ends 3");
  // Fields that are not known are passed over: a number, 8 bytes, 4 bytes, a string.
  const std::string unknown("\x10\x01\x19\0\0\0\0\0\0\0\0\x25\0\0\0\0\x2a\x01x", 19);
  CHECK_EQ(Fixture::fresh(with_body(std::string(1, '\0') + u32(static_cast<uint32_t>(unknown.size())) + unknown)),
           "1 begins, 1 status 1, 1 ends 0");
  CHECK_EQ(Fixture::fresh(call(1, "Nothing", "")), "1 ends 12, 1 reset 0");
  CHECK_EQ(
      Fixture::fresh(frame(FrameType::kHeaders, flag::kEndHeaders | flag::kEndStream, 1, request_headers("Check"))),
      "1 ends 3");
  const std::string get = request_headers("Check", "GET"), json = request_headers("Check", "POST", "application/json");
  CHECK_EQ(Fixture::fresh(frame(FrameType::kHeaders, flag::kEndHeaders | flag::kEndStream, 1, get)), "1 ends 405");
  CHECK_EQ(Fixture::fresh(frame(FrameType::kHeaders, flag::kEndHeaders, 1, json)), "1 ends 415, 1 reset 0");
  CHECK_EQ(Fixture::fresh(frame(FrameType::kHeaders, flag::kEndHeaders, 1, literal(":method", "POST"))), "1 reset 1");
  const std::string large = std::string(1, '\0') + u32(10'000) + std::string(5'000, 'x');
  CHECK_EQ(Fixture::fresh(frame(FrameType::kHeaders, flag::kEndHeaders, 1, request_headers("Watch")) +
                          frame(FrameType::kData, 0, 1, large) + frame(FrameType::kData, flag::kEndStream, 1, large)),
           "1 ends 3, 1 reset 0");
}

TEST(a_broken_rule_ends_the_connection_with_its_code) {
  const std::string headers = request_headers("Check");
  const std::string open = frame(FrameType::kHeaders, flag::kEndHeaders, 1, headers);
  const struct {
    std::string bytes;
    const char* code;
  } cases[] = {
      {frame(FrameType::kData, 0, 0, "x"), "1"},
      {frame(FrameType::kData, 0, 1, "x"), "1"},
      {frame(FrameType::kHeaders, flag::kEndHeaders, 2, headers), "1"},
      {frame(FrameType::kHeaders, flag::kEndHeaders, 0, headers), "1"},
      {frame(FrameType::kHeaders, 0, 1, headers) + frame(FrameType::kPing, 0, 0, "12345678"), "1"},
      {frame(FrameType::kHeaders, 0, 1, headers) + frame(FrameType::kContinuation, 4, 3, ""), "1"},
      {frame(FrameType::kContinuation, flag::kEndHeaders, 1, headers), "1"},
      {open + frame(FrameType::kContinuation, flag::kEndHeaders, 1, headers), "1"},
      {open + open, "1"},
      {frame(FrameType::kHeaders, flag::kPadded | flag::kEndHeaders, 1, ""), "6"},
      {frame(FrameType::kHeaders, flag::kPadded | flag::kEndHeaders, 1, "\xff"), "1"},
      {frame(FrameType::kHeaders, flag::kPriority | flag::kEndHeaders, 1, "1234"), "6"},
      {frame(FrameType::kHeaders, flag::kEndHeaders, 1, "\x80"), "9"},
      {open + frame(FrameType::kData, flag::kPadded, 1,
                    "\x05"
                    "abc"),
       "1"},
      {frame(FrameType::kSettings, 0, 1), "1"},
      {frame(FrameType::kSettings, 0, 0, "12345"), "6"},
      {frame(FrameType::kSettings, flag::kAck, 0, "123456"), "6"},
      {frame(FrameType::kSettings, 0, 0, std::string("\x00\x04\x80\x00\x00\x00", 6)), "3"},
      {frame(FrameType::kPing, 0, 0, "1234567"), "6"},
      {frame(FrameType::kPing, 0, 1, "12345678"), "1"},
      {frame(FrameType::kRstStream, 0, 1, u32(0)), "1"},
      {frame(FrameType::kRstStream, 0, 0, u32(0)), "1"},
      {frame(FrameType::kRstStream, 0, 0, "123"), "6"},
      {frame(FrameType::kWindowUpdate, 0, 0, u32(0)), "1"},
      {frame(FrameType::kWindowUpdate, 0, 0, u32(0x7fffffff)), "3"},
      {frame(FrameType::kWindowUpdate, 0, 1, u32(1)), "1"},
      {frame(FrameType::kWindowUpdate, 0, 0, "123"), "6"},
      {frame(FrameType::kPushPromise, 0, 1), "1"},
      {frame(FrameType::kPriority, 0, 0, "12345"), "1"},
      {frame(FrameType::kGoAway, 0, 1, u32(0) + u32(0)), "1"},
      {frame(FrameType::kData, 0, 1, std::string(kMostFrameBytes + 1, 'x')), "6"},
      {frame(FrameType::kHeaders, 0, 1, std::string(kMostFrameBytes, '\x82')) +
           frame(FrameType::kContinuation, 0, 1, "\x82"),
       "11"},
  };
  for (const auto& broken : cases) {
    Fixture fixture;
    CHECK_EQ(fixture.send(broken.bytes), std::string("GOAWAY ") + broken.code);
    CHECK(fixture.connection.is_over());
    CHECK_EQ(fixture.send(call(1, "Check", "")), "");
    CHECK_EQ(fixture.publish({false, true, true}), "");
  }
  for (const char* first : {"GET / HTTP/1.1\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r"}) {
    Fixture fixture(false);
    CHECK_EQ(fixture.send(first), "SETTINGS, GOAWAY 1");
  }
  Fixture fixture(false);
  CHECK_EQ(fixture.send(std::string(kPreface) + frame(FrameType::kPing, 0, 0, "12345678")), "SETTINGS, GOAWAY 1");
}

TEST(a_window_that_breaks_a_rule_ends_its_stream_alone) {
  Fixture fixture;
  fixture.send(call(1, "Watch", "") + call(3, "Watch", ""));
  CHECK_EQ(fixture.send(frame(FrameType::kWindowUpdate, 0, 1, u32(0))), "1 reset 1");
  CHECK_EQ(fixture.send(frame(FrameType::kWindowUpdate, 0, 3, u32(0x7fffffff))), "3 reset 3");
  CHECK_EQ(fixture.send(frame(FrameType::kWindowUpdate, 0, 1, u32(1))), "");  // it is closed, which may cross
  CHECK_EQ(fixture.send(call(5, "Check", "")), "5 begins, 5 status 1, 5 ends 0");
}

TEST(more_streams_than_announced_are_refused) {
  ServingTable table{{""}, seconds(30)};
  table.publish({true}, kNow);
  Endings endings;
  Connection connection(table, endings, {2, 8192});
  Reader reader;
  connection.receive(kOpening + call(1, "Watch", "") + call(3, "Watch", "") + call(5, "Check", ""), kNow);
  CHECK_EQ(reader.words(connection.output()), "SETTINGS, ACK, 1 begins, 1 status 1, 3 begins, 3 status 1, 5 reset 7");
  connection.receive(frame(FrameType::kRstStream, 0, 1, u32(8)) + call(7, "Check", ""), kNow);
  CHECK_EQ(reader.words(connection.output()), "7 begins, 7 status 1, 7 ends 0");
}

TEST(watchers_of_a_reader_that_does_not_read_cost_no_memory) {
  Fixture fixture;
  fixture.connection.receive(call(1, "Watch", ""), kNow);
  for (int i = 0; i < 20'000; ++i) {
    fixture.table.publish({i % 2 == 0, false, false}, kNow);
    fixture.connection.advance(kNow);
  }
  CHECK(fixture.connection.output().size() < Connection::kMostUnsentBytes + 100);
}

TEST(what_is_asked_of_the_table_is_what_was_published) {
  ServingTable table({"a", "b"}, seconds(1));
  CHECK(table.status("a", Clock::now()) == ServingStatus::kNotServing);
  CHECK(table.publish({false, true}, kNow));
  CHECK(!table.publish({false, true}, kNow));
  CHECK(table.status("a", kNow) == ServingStatus::kNotServing);
  CHECK(table.status("b", kNow) == ServingStatus::kServing);
  CHECK(table.status("c", kNow) == ServingStatus::kServiceUnknown);
  CHECK_THROWS(tw::ErrorCode::kInvalidRequest, "one answer", table.publish({true}, kNow));
  CHECK_THROWS(tw::ErrorCode::kInvalidRequest, "too many", ServingTable(std::vector<std::string>(33), seconds(1)));
}

TEST(a_stuck_publisher_that_comes_back_with_no_is_never_heard_as_yes) {
  ServingTable table({""}, seconds(30));
  std::atomic<int> hour{0};  // odd: nothing may serve, as what said so is an hour old or was taken back
  const auto at = [](int hours) { return kNow + std::chrono::hours(hours); };
  std::atomic<bool> is_over{false};
  int num_wrong = 0;
  std::thread reader([&] {
    while (!is_over) {
      const int before = hour;
      const ServingStatus heard = table.status("", at(before));
      num_wrong += before % 2 == 1 && hour == before && heard == ServingStatus::kServing;
    }
  });
  for (int turn = 0; turn < 1'000'000; ++turn) {
    table.publish({hour % 2 == 0}, at(hour));
    ++hour;
  }
  is_over = true;
  reader.join();
  CHECK_EQ(num_wrong, 0);
}

// Valid traffic with random damage: nothing but typed ends, and nothing that a sanitizer minds.
TEST(damaged_traffic_breaks_nothing) {
  std::mt19937 random(7);
  const auto pick = [&](size_t count) { return std::uniform_int_distribution<size_t>(0, count - 1)(random); };
  size_t num_over = 0;
  for (int turn = 0; turn < 20'000; ++turn) {
    std::string bytes = kOpening;
    for (uint32_t stream = 1; stream < 12; stream += 2)
      bytes += call(stream, pick(2) ? "Check" : "Watch", pick(2) ? "" : "readiness") +
               frame(static_cast<FrameType>(pick(11)), static_cast<uint8_t>(pick(256)), static_cast<uint32_t>(pick(12)),
                     std::string(pick(40), static_cast<char>(pick(256))));
    for (size_t damage = pick(6); damage > 0; --damage)
      bytes[kPreface.size() + pick(bytes.size() - kPreface.size())] = static_cast<char>(pick(256));
    Fixture fixture(false);
    for (size_t at = 0, piece; at < bytes.size(); at += piece) {
      piece = 1 + pick(200);
      fixture.connection.receive(std::string_view(bytes).substr(at, piece), kNow);
      if (pick(4) == 0) fixture.publish({pick(2) == 0, true, pick(2) == 0});
    }
    num_over += fixture.connection.is_over();
  }
  CHECK(num_over > 1'000);
  CHECK(num_over < 20'000);
}

// A port of the loopback address that listens.
struct Listening {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  socklen_t size = sizeof address;

  Listening() {
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK_EQ(bind(fd, generic(), size), 0);
    CHECK_EQ(listen(fd, 16), 0);
    CHECK_EQ(getsockname(fd, generic(), &size), 0);
  }
  sockaddr* generic() { return reinterpret_cast<sockaddr*>(&address); }
  int dial() {
    const int peer = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQ(connect(peer, generic(), size), 0);
    return peer;
  }
};

TEST(clients_are_served_by_a_thread_while_another_publishes) {
  Listening listening;
  HealthServer server({listening.fd}, {"", "readiness"}, {});
  std::atomic<int> answered{0};
  const auto ask = [&] {
    const int peer = listening.dial();
    const auto send_all = [peer](const std::string& bytes) {
      CHECK_EQ(send(peer, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
    };
    send_all(kOpening + call(1, "Watch", ""));
    const std::string end = frame(FrameType::kHeaders, flag::kEndHeaders | flag::kEndStream, 0).substr(3, 2);
    std::string received;
    for (uint32_t stream = 3; stream < 203; stream += 2) {
      send_all(call(stream, "Check", "readiness"));
      const std::string wanted = end + u32(stream);
      for (size_t found = std::string::npos; found == std::string::npos; found = received.find(wanted)) {
        char bytes[4096];
        const ssize_t came = recv(peer, bytes, sizeof bytes, 0);
        if (came <= 0) {
          CHECK(false);
          break;
        }
        received.append(bytes, static_cast<size_t>(came));
      }
      received.clear();
      ++answered;
    }
    close(peer);
  };
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) clients.emplace_back(ask);
  for (int i = 0; answered < 400; ++i) {
    server.publish({i % 2 == 0, i % 3 == 0});
    std::this_thread::yield();
  }
  for (std::thread& client : clients) client.join();
  server.stop();
  server.stop();
  CHECK_EQ(server.endings().take()[static_cast<size_t>(Ending::kCheckOk)], uint64_t{400});
}

TEST(a_closed_socket_that_a_child_still_has_keeps_nobody_busy) {
  Listening listening;
  HealthServer server({listening.fd}, {""}, {});
  const int client = listening.dial();
  char bytes[256];
  CHECK(recv(client, bytes, sizeof bytes, 0) > 0);  // the settings: the server has accepted
  const pid_t child = fork();                       // which has all sockets, until it would call exec
  if (child == 0) _exit(sleep(60) == 0 ? 0 : 1);
  CHECK(child > 0);
  shutdown(client, SHUT_WR);
  CHECK(recv(client, bytes, sizeof bytes, 0) > 0);  // the farewell: the server closes its end
  const std::clock_t began = std::clock();
  std::this_thread::sleep_for(seconds(1));
  CHECK(std::clock() - began < CLOCKS_PER_SEC / 20);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(client);
}
