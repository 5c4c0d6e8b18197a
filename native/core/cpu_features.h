// Which instruction set the CPU backend uses on this machine.
#pragma once

namespace tw {

enum class Isa { kPortable, kAvx2, kAvx512Vnni };

// The best one that both the processor and the build support. TOKENWIRE_CPU_ISA=portable|avx2|avx512-vnni lowers the
// choice; a value above what the processor has, or an unknown one, throws Error(kInvalidRequest).
Isa select_isa();

const char* to_string(Isa isa);

}  // namespace tw
