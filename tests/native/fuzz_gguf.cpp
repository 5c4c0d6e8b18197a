// libFuzzer target: any bytes are either a valid model file or refused with one clear line.
#include "walk_gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tw::test::walk_gguf(data, size);
  return 0;
}
