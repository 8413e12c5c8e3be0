// Eight fp32 lanes as a compiler vector, dtype conversion, run-time choice of the instruction set, and
// threads.
//
// A kernel is written once, as an AP_INLINE template, and instantiated in two functions: one for the
// baseline of the architecture and one marked AP_AVX2. Both do the same operations in the same order (no
// fused multiply-add: -ffp-contract=off), so the instruction set does not change a single bit. Where compiler
// vectors cannot say it (permutations, stores around the caches), a primitive takes the instruction set as a
// tag, Baseline or Avx2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define AP_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define AP_AVX2 __attribute__((target("avx2")))
#else
#define AP_AVX2
#endif

namespace adapt_pruner::cpu {

bool use_avx2();

struct Baseline {};
struct Avx2 {};

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));
typedef uint16_t Uint16x8 __attribute__((vector_size(16)));
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
AP_INLINE Uint16x8 load8_bits(const void* p) {
  Uint16x8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// Interleaving with zeros is two unpack instructions; GCC spells a conversion of the vector out at length.
AP_INLINE Uint8x32 low_halves(Uint16x8 v) {
  return bit_cast<Uint8x32>(
      __builtin_shufflevector(v, Uint16x8{}, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}
AP_INLINE Uint8x32 high_halves(Uint16x8 v) {
  return bit_cast<Uint8x32>(
      __builtin_shufflevector(Uint16x8{}, v, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}
AP_INLINE Float8 load8(const BFloat16* p) { return bit_cast<Float8>(high_halves(load8_bits(p))); }
AP_INLINE Float8 load8(const Half* p) { return half_to_float<Float8, Uint8x32>(low_halves(load8_bits(p))); }
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

// ---- moving data ----------------------------------------------------------------------------------------

constexpr int64_t kLineBytes = 64;  // of a cache line

// For each set of kept elements among eight, which ones they are: in front and in order, then zeros.
struct KeptOfEight {
  uint8_t index[256][8];
};
constexpr KeptOfEight kept_of_eight() {
  KeptOfEight table = {};
  for (int mask = 0; mask < 256; ++mask) {
    int kept = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (mask >> bit & 1) table.index[mask][kept++] = uint8_t(bit);
    }
  }
  return table;
}
inline constexpr KeptOfEight kKeptOfEight = kept_of_eight();

// Moves the kept elements of `blocks` blocks of eight to `target`, a mask per block, and returns their end.
// A block is stored whole: up to eight elements behind the end are overwritten with anything.
template <class Isa, class Word>
struct Compress {
  static Word* blocks(const Word* source, const uint8_t* masks, int64_t blocks, Word* target) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int i = 0; i < 8; ++i) target[i] = source[8 * b + kKeptOfEight.index[masks[b]][i]];
      target += __builtin_popcount(masks[b]);
    }
    return target;
  }
};

// Copies whole lines to a target that is aligned to a line.
template <class Isa>
struct Stream {
  static void lines(char* target, const char* source, int64_t bytes) {
    std::memcpy(target, source, size_t(bytes));
  }
  static void fence() {}
};

#if defined(__x86_64__)

AP_AVX2 inline __m128i kept_bytes(uint8_t mask) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kKeptOfEight.index[mask]));
}

AP_AVX2 inline void compress8(const uint8_t* source, uint8_t mask, uint8_t* target) {
  const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_shuffle_epi8(values, kept_bytes(mask)));
}

AP_AVX2 inline void compress8(const uint16_t* source, uint8_t mask, uint16_t* target) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  const __m128i index = kept_bytes(mask);
  const __m128i low = _mm_add_epi8(index, index);  // element i is in bytes 2 * i and 2 * i + 1
  const __m128i bytes = _mm_unpacklo_epi8(low, _mm_add_epi8(low, _mm_set1_epi8(1)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm_shuffle_epi8(values, bytes));
}

AP_AVX2 inline void compress8(const uint32_t* source, uint8_t mask, uint32_t* target) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  const __m256i index = _mm256_cvtepu8_epi32(kept_bytes(mask));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permutevar8x32_epi32(values, index));
}

AP_AVX2 inline void compress8(const uint64_t* source, uint8_t mask, uint64_t* target) {
  for (int i = 0; i < 8; ++i) target[i] = source[kKeptOfEight.index[mask][i]];
}

template <class Word>
struct Compress<Avx2, Word> {
  AP_AVX2 static Word* blocks(const Word* source, const uint8_t* masks, int64_t blocks, Word* target) {
    for (int64_t b = 0; b < blocks; ++b) {
      compress8(source + 8 * b, masks[b], target);
      target += __builtin_popcount(masks[b]);
    }
    return target;
  }
};

// Around the caches: no line is read only to be overwritten, and nothing useful is driven out.
template <>
struct Stream<Avx2> {
  AP_AVX2 static void lines(char* target, const char* source, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLineBytes) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + 32));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), low);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + 32), high);
    }
  }
  static void fence() { _mm_sfence(); }  // streaming stores are not ordered with others
};

#endif  // __x86_64__

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
