// Compiles the file named by AP_KERNELS once for each instruction set, into a namespace of its own; include
// it inside namespace adapt_pruner::cpu. No guard: each .cpp with kernels includes it once.
//
// All versions do the same operations in the same order (no fused multiply-add: -ffp-contract=off), so the
// instruction set does not change a single bit.

#define AP_ISA 0
namespace baseline {
#include "simd.h"
//
#include AP_KERNELS
}  // namespace baseline
#undef AP_ISA

#if AP_HAS_X86_ISAS

#pragma GCC push_options
#pragma GCC target("avx2,f16c,popcnt,bmi2")
#define AP_ISA 1
namespace avx2 {
#include "simd.h"
//
#include AP_KERNELS
}  // namespace avx2
#undef AP_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx2,f16c,popcnt,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,prefer-vector-width=512")
#define AP_ISA 2
namespace avx512 {
#include "simd.h"
//
#include AP_KERNELS
}  // namespace avx512
#undef AP_ISA
#pragma GCC pop_options

#endif
