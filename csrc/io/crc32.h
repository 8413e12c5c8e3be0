// CRC-32 as zlib, gzip and PNG have it (polynomial 0x04C11DB7, bits reflected): every Python can check it, and
// the checksums of parts give that of the whole, so that parts can be read in any order by any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace adapt_pruner::io {

constexpr uint32_t kPolynomial = 0xEDB88320u;  // without x^32; bit 31 is x^0

// The product of two polynomials of degree below 32, modulo the polynomial of the checksum.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// x to the power of `n`, modulo the polynomial.
constexpr uint32_t x_power(uint64_t n) {
  uint32_t result = 0x80000000u, square = 0x40000000u;
  for (; n != 0; n >>= 1) {
    if (n & 1) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

// The checksum of what stands for `first` followed by `length` bytes that stand for `second`.
constexpr uint32_t combine(uint32_t first, uint32_t second, uint64_t length) {
  return multiply(first, x_power(8 * length)) ^ second;
}

namespace detail {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t value = tables[k - 1][byte];
      tables[k][byte] = (value >> 8) ^ tables[0][value & 255];
    }
  }
  return tables;
}

inline constexpr Tables kTables = make_tables();

// The remainder after more bytes, eight at a time.
inline uint32_t divide_portably(uint32_t state, const uint8_t* data, size_t length) {
  for (; length >= 8; data += 8, length -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= state;
    state = 0;
    for (size_t k = 0; k < 8; ++k) state ^= kTables[7 - k][(word >> (8 * k)) & 255];
  }
  for (; length > 0; ++data, --length) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#if defined(__x86_64__)
// Two factors that move 16 bytes `bits` further to the front: one for each half of them. A product of reflected
// polynomials of 64 and 33 bits comes out one bit low, hence the shift.
constexpr std::array<uint64_t, 2> fold_factors(uint64_t bits) {
  return {uint64_t(x_power(bits + 32)) << 1, uint64_t(x_power(bits - 32)) << 1};
}

inline constexpr std::array<uint64_t, 2> kFoldBy64 = fold_factors(512);
inline constexpr std::array<uint64_t, 2> kFoldBy16 = fold_factors(128);

#define AP_CLMUL __attribute__((target("pclmul,sse4.1")))

AP_CLMUL inline __m128i load(const void* data) { return _mm_loadu_si128(static_cast<const __m128i*>(data)); }

AP_CLMUL inline __m128i fold(__m128i value, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(value, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Folds four lanes of 16 bytes over the data, then into one, whose remainder the tables give.
AP_CLMUL inline uint32_t divide_by_folding(uint32_t state, const uint8_t* data, size_t length) {
  if (length < 64) return divide_portably(state, data, length);
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = load(data + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(int32_t(state)));
  data += 64, length -= 64;
  const __m128i by_64 = load(kFoldBy64.data());
  for (; length >= 64; data += 64, length -= 64) {
    for (int i = 0; i < 4; ++i) lanes[i] = fold(lanes[i], by_64, load(data + 16 * i));
  }
  const __m128i by_16 = load(kFoldBy16.data());
  for (int i = 1; i < 4; ++i) lanes[i] = fold(lanes[i - 1], by_16, lanes[i]);
  uint8_t folded[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), lanes[3]);
  return divide_portably(divide_portably(0, folded, 16), data, length);
}

#undef AP_CLMUL
#endif

}  // namespace detail

inline uint32_t crc32(const void* data, size_t length) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
    return ~detail::divide_by_folding(~0u, bytes, length);
  }
#endif
  return ~detail::divide_portably(~0u, bytes, length);
}

}  // namespace adapt_pruner::io
