// Which instruction set the kernels use, decided once. ADAPT_PRUNER_CPU_ISA=baseline is there for tests.
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace adapt_pruner::cpu {

bool use_avx2() {
  static const bool chosen = [] {
    const char* wanted = std::getenv("ADAPT_PRUNER_CPU_ISA");
    if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
#else
    return false;
#endif
  }();
  return chosen;
}

}  // namespace adapt_pruner::cpu

const char* ap_cpu_isa() { return adapt_pruner::cpu::use_avx2() ? "avx2" : "baseline"; }
