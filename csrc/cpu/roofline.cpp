// What the memory of this machine can do, for `bench kernels` to measure the other kernels against.
#include <atomic>

#include "values.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kGrainLines = 1024;  // 64 KiB

#define AP_KERNELS "roofline_kernels.h"
#include "each_isa.h"

void copy(char* target, const char* source, int64_t bytes) { std::memcpy(target, source, size_t(bytes)); }

}  // namespace
}  // namespace adapt_pruner::cpu

uint64_t ap_cpu_roofline_read(const void* first, const void* second, int64_t bytes, bool ahead,
                              ApParallelFor parallel_for) {
  using namespace adapt_pruner::cpu;
  const auto read = ahead ? AP_CHOOSE(read_lines<true>) : AP_CHOOSE(read_lines<false>);
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
  const auto move = streaming ? AP_CHOOSE(copy_streaming) : copy;
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  run_parallel(parallel_for, bytes / kLineBytes, kGrainLines, [&](int64_t begin, int64_t end) {
    move(to + begin * kLineBytes, from + begin * kLineBytes, (end - begin) * kLineBytes);
  });
  const int64_t whole = bytes / kLineBytes * kLineBytes;
  std::memcpy(to + whole, from + whole, size_t(bytes - whole));
}
