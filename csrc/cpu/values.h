// Element types of the tensors, rows of matrices, and threads: what does not depend on the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

#define AP_INLINE inline __attribute__((always_inline))

namespace adapt_pruner::cpu {

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
// scalars or vectors. It does not depend on the denormals-are-zero flag.
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

AP_INLINE float load1(const float* p) { return *p; }
AP_INLINE float load1(const BFloat16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }
AP_INLINE float load1(const Half* p) { return half_to_float<float, uint32_t>(p->bits); }

template <class T>
AP_INLINE const T* element_of(const Matrix& matrix, int64_t row, int64_t col) {
  if constexpr (std::is_same_v<T, Absent>) {
    return nullptr;
  } else {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + col;
  }
}

constexpr int64_t kLineBytes = 64;  // of a cache line

// Memory that is read once is asked for this many bytes ahead: the hardware's own prefetching stops at the
// end of each page and follows several rows at a time less well.
constexpr int64_t kAheadBytes = 1024;

// How many bytes behind element i of a row of `width` its reader will be kAheadBytes later: behind the end of
// the row it goes on with the one `next_row` elements further.
template <class T>
AP_INLINE int64_t bytes_ahead(int64_t i, int64_t width, int64_t next_row) {
  constexpr int64_t kAhead = kAheadBytes / int64_t(sizeof(T));
  return int64_t(sizeof(T)) * (i + kAhead < width ? kAhead : kAhead + next_row - width);
}

// An address, because nothing need be there.
AP_INLINE void prefetch(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)));
}

// ---- threads --------------------------------------------------------------------------------------------

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
