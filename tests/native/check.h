// A small test harness. A program has TESTs and check_main.cpp; it prints one summary line and returns the number of
// failures. With an argument it runs only the tests whose name contains it.
#pragma once

#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace tw::test {

struct Case {
  const char* name;
  void (*body)();
};

std::vector<Case>& cases();
// Counts a failed check of the running test and says where it is.
void report(const char* file, int line, const std::string& message);

struct Registration {
  Registration(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

template <class A, class B>
void check_equal(const A& actual, const B& expected, const char* text, const char* file, int line) {
  if (actual == expected) return;
  std::ostringstream message;
  message << text << " is " << actual << ", " << expected << " expected";
  report(file, line, message.str());
}

template <class Body>
void check_throws(ErrorCode code, const std::string& part, const Body& body, const char* text, const char* file,
                  int line) {
  try {
    body();
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.code() != code)
      report(file, line, std::string(text) + " throws " + to_string(error.code()) + ": " + message);
    if (message.find(part) == std::string::npos) report(file, line, "`" + message + "` does not say `" + part + "`");
    if (message.find('\n') != std::string::npos) report(file, line, "the message has more than one line");
    return;
  }
  report(file, line, std::string(text) + " throws nothing");
}

}  // namespace tw::test

#define TEST(name)                                                             \
  static void test_##name();                                                   \
  static const tw::test::Registration registration_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) tw::test::report(__FILE__, __LINE__, #condition " is false"); \
  } while (false)

#define CHECK_EQ(actual, expected) tw::test::check_equal((actual), (expected), #actual, __FILE__, __LINE__)

// `expression` must throw tw::Error with this code and a one-line message that contains `part`.
#define CHECK_THROWS(code, part, expression) \
  tw::test::check_throws((code), (part), [&] { (void)(expression); }, #expression, __FILE__, __LINE__)
