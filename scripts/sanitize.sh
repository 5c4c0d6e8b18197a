#!/bin/sh
# Builds the native tests with ThreadSanitizer and with AddressSanitizer and UndefinedBehaviorSanitizer, and runs them.
# Usage: scripts/sanitize.sh [build folder]. Builds are kept, so a second run compiles only what changed.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
builds=${1:-$root/build}
# CMake, Ninja and CTest of the development environment come first.
PATH=$root/.venv/bin:$PATH
export PATH
export TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
# Not detect_stack_use_after_return: GCC misaligns AVX-512 spills on its second stack (GCC bug 110027).
export ASAN_OPTIONS="detect_leaks=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"

for sanitizer in thread address,undefined; do
  build=$builds/sanitize-$(echo "$sanitizer" | tr , -)
  echo "== $sanitizer =="
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTOKENWIRE_SANITIZE="$sanitizer" \
    -DTOKENWIRE_TESTS=ON -DTOKENWIRE_PYTHON=OFF -DTOKENWIRE_CUDA=OFF >/dev/null
  cmake --build "$build"
  ctest --test-dir "$build" --output-on-failure --timeout 900
done
