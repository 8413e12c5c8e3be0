// What the memory of this machine can do, for `bench kernels` to measure the other kernels against.
#include <atomic>

#include "simd.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kGrainLines = 1024;  // 64 KiB

typedef uint64_t Uint64x4 __attribute__((vector_size(32)));

// Both streams, a line of each in turn. The result depends on every byte, so no load can be left out.
AP_INLINE uint64_t read_body(const char* a, const char* b, int64_t bytes) {
  Uint64x4 sums[4] = {};
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    const char* parts[4] = {a + i, a + i + kLineBytes / 2, b + i, b + i + kLineBytes / 2};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Uint64x4 value;
      std::memcpy(&value, parts[k], sizeof(value));
      sums[k] ^= value;
    }
  }
  const Uint64x4 sum = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

AP_AVX2 uint64_t read_avx2(const char* a, const char* b, int64_t bytes) { return read_body(a, b, bytes); }
uint64_t read_baseline(const char* a, const char* b, int64_t bytes) { return read_body(a, b, bytes); }

void copy(char* target, const char* source, int64_t bytes) { std::memcpy(target, source, size_t(bytes)); }

template <class Isa>
void copy_streaming(char* target, const char* source, int64_t bytes) {
  Stream<Isa>::lines(target, source, bytes);
  Stream<Isa>::fence();
}

}  // namespace
}  // namespace adapt_pruner::cpu

uint64_t ap_cpu_roofline_read(const void* first, const void* second, int64_t bytes,
                              ApParallelFor parallel_for) {
  using namespace adapt_pruner::cpu;
  const auto read = use_avx2() ? read_avx2 : read_baseline;
  const char *a = static_cast<const char*>(first), *b = static_cast<const char*>(second);
  std::atomic<uint64_t> result = 0;  // exclusive or: the same in any order
  run_parallel(parallel_for, bytes / kLineBytes, kGrainLines, [&](int64_t begin, int64_t end) {
    result ^= read(a + begin * kLineBytes, b + begin * kLineBytes, (end - begin) * kLineBytes);
  });
  for (int64_t i = bytes / kLineBytes * kLineBytes; i < bytes; ++i) {
    result ^= uint64_t(uint8_t(a[i] ^ b[i])) << i % 8 * 8;
  }
  return result;
}

void ap_cpu_roofline_copy(void* target, const void* source, int64_t bytes, bool streaming,
                          ApParallelFor parallel_for) {
  using namespace adapt_pruner::cpu;
  const auto stream = use_avx2() ? copy_streaming<Avx2> : copy_streaming<Baseline>;
  const auto move = streaming ? stream : copy;
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  run_parallel(parallel_for, bytes / kLineBytes, kGrainLines, [&](int64_t begin, int64_t end) {
    move(to + begin * kLineBytes, from + begin * kLineBytes, (end - begin) * kLineBytes);
  });
  const int64_t whole = bytes / kLineBytes * kLineBytes;
  std::memcpy(to + whole, from + whole, size_t(bytes - whole));
}
