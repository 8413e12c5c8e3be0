// Sixteen fp32 lanes of one instruction set (AP_ISA: 0 baseline, 1 AVX2, 2 AVX-512), as compiler vectors.
// Included by each_isa.h, once per instruction set and inside its namespace; hence no guard and no includes.

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));

#if AP_ISA == 2

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Uints __attribute__((vector_size(64)));

AP_INLINE Floats absolute(Floats v) { return bit_cast<Floats>(bit_cast<Uints>(v) & 0x7fffffffu); }
AP_INLINE Float8 add_halves(Floats v) {
  return bit_cast<Float8>(_mm512_extractf32x8_ps(v, 0)) + bit_cast<Float8>(_mm512_extractf32x8_ps(v, 1));
}

#else

struct Floats {
  Float8 low, high;
};
AP_INLINE Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
AP_INLINE Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
AP_INLINE Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
AP_INLINE Floats operator*(float a, Floats b) { return {a * b.low, a * b.high}; }
AP_INLINE Floats& operator+=(Floats& a, Floats b) { return a = a + b; }

AP_INLINE Float8 absolute(Float8 v) { return bit_cast<Float8>(bit_cast<Uint8x32>(v) & 0x7fffffffu); }
AP_INLINE Floats absolute(Floats v) { return {absolute(v.low), absolute(v.high)}; }
AP_INLINE Float8 add_halves(Floats v) { return v.low + v.high; }

#endif

AP_INLINE float absolute(float v) { return std::fabs(v); }

constexpr int kLanes = 16;
constexpr int kStep = 2 * kLanes;  // elements that are loaded at once

// The sixteen lanes added up, always in the same order.
AP_INLINE double sum_lanes(Floats v) {
  const Float8 sums = add_halves(v);
  double total = 0.0;
  for (int lane = 0; lane < 8; ++lane) total += double(sums[lane]);
  return total;
}

// A copy of whole vectors: GCC keeps structures of them in registers only if each is loaded by itself.
template <class Vector>
AP_INLINE Vector load_as(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

#if AP_ISA == 2

AP_INLINE __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
AP_INLINE Floats load(const float* p) { return load_as<Floats>(p); }
AP_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
AP_INLINE Floats load(const Half* p) { return bit_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, load_bits(p))); }
AP_INLINE Floats load(const BFloat16* p) {
  return bit_cast<Floats>(bit_cast<Uints>(_mm512_maskz_cvtepu16_epi32(0xffff, load_bits(p))) << 16);
}

#elif AP_ISA == 1

AP_INLINE __m128i load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
AP_INLINE Float8 load8(const Half* p) { return bit_cast<Float8>(_mm256_cvtph_ps(load_bits(p))); }
AP_INLINE Float8 load8(const BFloat16* p) {
  return bit_cast<Float8>(bit_cast<Uint8x32>(_mm256_cvtepu16_epi32(load_bits(p))) << 16);
}

#else

typedef uint16_t Uint16x8 __attribute__((vector_size(16)));

AP_INLINE Uint8x32 load_widened(const void* p) {
  const Uint16x8 v = load_as<Uint16x8>(p);
  // interleaving with zeros is two unpack instructions; GCC spells a conversion of the vector out at length
  return bit_cast<Uint8x32>(
      __builtin_shufflevector(v, Uint16x8{}, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}
AP_INLINE Float8 load8(const Half* p) { return half_to_float<Float8, Uint8x32>(load_widened(p)); }
AP_INLINE Float8 load8(const BFloat16* p) { return bit_cast<Float8>(load_widened(p) << 16); }

#endif

#if AP_ISA != 2
AP_INLINE Floats load(const float* p) { return {load_as<Float8>(p), load_as<Float8>(p + 8)}; }
AP_INLINE void store(float* p, Floats v) {
  std::memcpy(p, &v.low, sizeof(v.low));
  std::memcpy(p + 8, &v.high, sizeof(v.high));
}
AP_INLINE Floats load(const Half* p) { return {load8(p), load8(p + 8)}; }
AP_INLINE Floats load(const BFloat16* p) { return {load8(p), load8(p + 8)}; }
#endif

// kStep elements: in their order, or the even ones first, then the odd ones.
struct Pair {
  Floats first, second;
};

// bf16 is the upper half of fp32: without its order, widening is a shift and a mask of whole registers.
AP_INLINE Pair load_split(const BFloat16* p) {
#if AP_ISA == 2
  const Uints v = load_as<Uints>(p);
  return {bit_cast<Floats>(v << 16), bit_cast<Floats>(v & 0xffff0000u)};
#else
  const Uint8x32 v = load_as<Uint8x32>(p), w = load_as<Uint8x32>(p + kLanes);
  return {{bit_cast<Float8>(v << 16), bit_cast<Float8>(w << 16)},
          {bit_cast<Float8>(v & 0xffff0000u), bit_cast<Float8>(w & 0xffff0000u)}};
#endif
}

// Elements [i, i + kStep) of a row.
template <bool split, class T>
AP_INLINE Pair load_pair(const T* row, int64_t i) {
  if constexpr (std::is_same_v<T, Absent>) {
    const Pair zeros = {};
    return zeros;
  } else if constexpr (split) {
    return load_split(row + i);
  } else {
    return {load(row + i), load(row + i + kLanes)};
  }
}

// The same, of a row that is read once; asks for the memory `ahead` bytes behind.
template <bool split, class T>
AP_INLINE Pair stream_pair(const T* row, int64_t i, int64_t ahead) {
  if constexpr (!std::is_same_v<T, Absent>) {
    for (int64_t byte = 0; byte < kStep * int64_t(sizeof(T)); byte += kLineBytes) {
      prefetch(row + i, ahead + byte);
    }
  }
  return load_pair<split>(row, i);
}

template <class T>
AP_INLINE float load_one(const T* row, int64_t i) {
  if constexpr (std::is_same_v<T, Absent>) {
    return 0.0f;
  } else {
    return load1(row + i);
  }
}

AP_INLINE void add_pair(float* p, Pair v) {
  store(p, load(p) + v.first);
  store(p + kLanes, load(p + kLanes) + v.second);
}

// Values that were added up from split pairs, back in their order.
AP_INLINE void merge_split(float* values, int64_t count) {
  for (int64_t i = 0; i + kStep <= count; i += kStep) {
    float merged[kStep];
    for (int k = 0; k < kLanes; ++k) {
      merged[2 * k] = values[i + k];
      merged[2 * k + 1] = values[i + kLanes + k];
    }
    std::memcpy(values + i, merged, sizeof(merged));
  }
}

// ---- moving data ----------------------------------------------------------------------------------------

// Copies whole lines around the caches to a target that is aligned to a line: no line is read only to be
// overwritten, and nothing useful is driven out.
AP_INLINE void stream_lines(char* target, const char* source, int64_t bytes) {
#if AP_ISA == 2
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  }
#elif AP_ISA == 1
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + 32), high);
  }
#else
  std::memcpy(target, source, size_t(bytes));
#endif
}

// Streaming stores are not ordered with others.
AP_INLINE void stream_fence() {
#if AP_ISA > 0
  _mm_sfence();
#endif
}
