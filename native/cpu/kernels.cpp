// Compiled once an instruction set: the table of its kernels.
#include "cpu/ops.h"

namespace tw::cpu::TW_ISA {

const Kernels& kernels() {
#if defined(TW_ISA_AVX512)
  constexpr Isa kIsa = Isa::kAvx512Vnni;
#elif defined(TW_ISA_AVX2)
  constexpr Isa kIsa = Isa::kAvx2;
#else
  constexpr Isa kIsa = Isa::kPortable;
#endif
  static const Kernels table = {kIsa,     quantize_rows, rms_norm,       matmul,           dequantize_row, rope_heads,
                                store_kv, attend_split,  combine_splits, finish_attention, max_value,      exp_runs};
  return table;
}

}  // namespace tw::cpu::TW_ISA
