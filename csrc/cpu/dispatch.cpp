// Which instruction set the kernels use. ADAPT_PRUNER_CPU_ISA=baseline|avx2|avx512 is there for tests.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace adapt_pruner::cpu {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

Isa best_isa() {
#if AP_HAS_X86_ISAS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("bmi2")) {
    return kBaseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi2");
  return avx512 ? kAvx512 : kAvx2;
#else
  return kBaseline;
#endif
}

}  // namespace

Isa chosen_isa() {
  static const Isa chosen = [] {
    const Isa best = best_isa();
    const char* wanted = std::getenv("ADAPT_PRUNER_CPU_ISA");
    for (int isa = kBaseline; wanted != nullptr && isa <= best; ++isa) {
      if (std::strcmp(wanted, kNames[isa]) == 0) return Isa(isa);
    }
    return best;
  }();
  return chosen;
}

}  // namespace adapt_pruner::cpu

const char* ap_cpu_isa() { return adapt_pruner::cpu::kNames[adapt_pruner::cpu::chosen_isa()]; }
