#include <algorithm>
#include <exception>

#include "check.h"

namespace tw::test {

static int num_failed_checks = 0;

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void report(const char* file, int line, const std::string& message) {
  ++num_failed_checks;
  std::cerr << file << ":" << line << ": " << message << "\n";
}

static bool run(const Case& test) {
  num_failed_checks = 0;
  try {
    test.body();
  } catch (const std::exception& error) {
    report(test.name, 0, std::string("ended by an exception: ") + error.what());
  }
  if (num_failed_checks > 0) std::cerr << test.name << ": " << num_failed_checks << " failed checks\n";
  return num_failed_checks == 0;
}

}  // namespace tw::test

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  int num_passed = 0;
  int num_failed = 0;
  for (const auto& test : tw::test::cases()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    ++(tw::test::run(test) ? num_passed : num_failed);
  }
  std::cout << num_passed << " passed, " << num_failed << " failed\n";
  if (num_passed + num_failed == 0) return 1;  // a filter that matches nothing proves nothing
  return std::min(num_failed, 100);
}
