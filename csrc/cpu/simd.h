// Eight fp32 lanes as a compiler vector, dtype conversion, run-time choice of the instruction set, and
// threads.
//
// A kernel is written once, as an AP_INLINE template, and instantiated in two functions: one for the
// baseline of the architecture and one marked AP_AVX2. Both do the same operations in the same order (no
// fused multiply-add: -ffp-contract=off), so the instruction set does not change a single bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#define AP_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define AP_AVX2 __attribute__((target("avx2")))
#else
#define AP_AVX2
#endif

namespace adapt_pruner::cpu {

bool use_avx2();

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));
typedef uint16_t Uint8x16 __attribute__((vector_size(16)));
constexpr int kWidth = 8;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Absent {};  // a tensor that the mode does not read

template <class To, class From>
AP_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// fp16 -> fp32 with integer arithmetic only, exact for subnormals, infinities and NaN; F and U are either
// scalars or vectors. Without F16C this vectorises, and it does not depend on the denormals-are-zero flag.
template <class F, class U>
AP_INLINE F half_to_float(U half) {
  const U sign = (half & 0x8000u) << 16;
  const U shifted = (half & 0x7fffu) << 13;
  const U exponent = shifted & 0x0f800000u;
  const U normal = shifted + 0x38000000u;  // rebias: 127 - 15
  const U special = normal + 0x38000000u;  // infinity, NaN
  const U subnormal =
      bit_cast<U>(bit_cast<F>(normal + 0x00800000u) - 0x1p-14f);  // 0x1p-14 * (1 + m) - 0x1p-14
  const U magnitude = exponent == 0x0f800000u ? special : (exponent == 0u ? subnormal : normal);
  return bit_cast<F>(magnitude | sign);
}

AP_INLINE Float8 load8(const float* p) {
  Float8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
AP_INLINE Uint8x32 load8_widened(const void* p) {
  Uint8x16 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Uint8x32);
}
AP_INLINE Float8 load8(const BFloat16* p) { return bit_cast<Float8>(load8_widened(p) << 16); }
AP_INLINE Float8 load8(const Half* p) { return half_to_float<Float8, Uint8x32>(load8_widened(p)); }
AP_INLINE Float8 load8(const Absent*) { return Float8{}; }

AP_INLINE float load1(const float* p) { return *p; }
AP_INLINE float load1(const BFloat16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }
AP_INLINE float load1(const Half* p) { return half_to_float<float, uint32_t>(p->bits); }
AP_INLINE float load1(const Absent*) { return 0.0f; }

AP_INLINE void store8(float* p, Float8 v) { std::memcpy(p, &v, sizeof(v)); }

AP_INLINE float absolute(float v) { return std::fabs(v); }
AP_INLINE Float8 absolute(Float8 v) { return bit_cast<Float8>(bit_cast<Uint8x32>(v) & 0x7fffffffu); }

// The eight lanes added up in double, always in the same order.
AP_INLINE double sum_lanes(Float8 v) {
  double sum = 0.0;
  for (int lane = 0; lane < kWidth; ++lane) sum += double(v[lane]);
  return sum;
}

template <class T>
AP_INLINE const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}
template <>
AP_INLINE const Absent* row_of<Absent>(const Matrix&, int64_t) {
  return nullptr;
}

constexpr int64_t kGrainElements = 32768;  // less work than this is not worth a thread

inline int64_t grain_for(int64_t elements_per_item) {
  return elements_per_item >= kGrainElements
             ? 1
             : kGrainElements / (elements_per_item > 0 ? elements_per_item : 1);
}

template <class Body>
void run_parallel(ApParallelFor parallel_for, int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace adapt_pruner::cpu
