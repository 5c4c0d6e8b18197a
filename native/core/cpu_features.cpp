#include "core/cpu_features.h"

#include <cstdlib>
#include <string>

#include "core/error.h"

namespace tw {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return Isa::kAvx512Vnni;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

}  // namespace

Isa select_isa() {
  const Isa best = detect();
  const char* wanted = std::getenv("TOKENWIRE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Vnni}) {
    if (std::string(wanted) != to_string(isa)) continue;
    if (isa > best) {
      throw Error(ErrorCode::kInvalidRequest,
                  std::string("TOKENWIRE_CPU_ISA=") + wanted + ": this processor has only " + to_string(best));
    }
    return isa;
  }
  throw Error(ErrorCode::kInvalidRequest,
              std::string("TOKENWIRE_CPU_ISA=") + wanted + ": use portable, avx2 or avx512-vnni");
}

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512Vnni: return "avx512-vnni";
  }
  return "portable";
}

}  // namespace tw
