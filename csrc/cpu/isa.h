// Instruction sets. Kernels are written once, in a file that each_isa.h compiles for every one of them; which
// one runs is decided once per process.
#pragma once

#include "../kernels.h"

namespace adapt_pruner::cpu {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one of this machine, or the one that ADAPT_PRUNER_CPU_ISA names, if the machine has it.
Isa chosen_isa();

}  // namespace adapt_pruner::cpu

// GCC's target pragma reaches templates and lambdas; other compilers get the baseline alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AP_HAS_X86_ISAS 1
#define AP_CHOOSE(...)                           \
  (chosen_isa() == kAvx512 ? avx512::__VA_ARGS__ \
                           : (chosen_isa() == kAvx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__))
#else
#define AP_HAS_X86_ISAS 0
#define AP_CHOOSE(...) (baseline::__VA_ARGS__)
#endif
