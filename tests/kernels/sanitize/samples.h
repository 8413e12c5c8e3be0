// What the driver hands to the kernels: memory with nothing around it, values, threads; and how it compares.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using namespace adapt_pruner;

std::mt19937_64 random_bits(0);

int64_t draw(int64_t from, int64_t to) { return from + int64_t(random_bits() % uint64_t(to - from + 1)); }
template <class T>
T any_of(std::initializer_list<T> values) {
  return values.begin()[draw(0, int64_t(values.size()) - 1)];
}

// What runs is named in a failure.
std::string current_case;
int64_t case_count = 0;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "WRONG RESULT (%s): %s: %s\n", ap_cpu_isa(), current_case.c_str(), what.c_str());
  _exit(1);  // no search for leaks
}

// ---- threads --------------------------------------------------------------------------------------------

void on_one_thread(int64_t count, int64_t, ApRangeBody body, void* context) {
  if (count > 0) body(0, count, context);
}

// Pieces smaller than `grain` occur in practice: the last one. Here all may be.
void on_several_threads(int64_t count, int64_t grain, ApRangeBody body, void* context) {
  std::vector<int64_t> begins;
  for (int64_t begin = 0; begin < count;) {
    begins.push_back(begin);
    begin += std::min(count - begin, draw(1, std::max(std::min(grain, count / 3), count / 20) + 1));
  }
  begins.push_back(count);
  std::atomic<int64_t> next(int64_t(begins.size()) - 2);  // from the last piece to the first
  const auto work = [&] {
    for (int64_t i = next--; i >= 0; i = next--) body(begins[size_t(i)], begins[size_t(i) + 1], context);
  };
  std::thread second(work), third(work);
  work();
  second.join();
  third.join();
}

// ---- memory ---------------------------------------------------------------------------------------------

// Bytes that end, or begin, where nothing may be touched.
class Buffer {
 public:
  // On the heap, `offset` bytes behind the alignment of malloc; in pages where `offset` is negative.
  Buffer(int64_t bytes, int64_t offset) : bytes_(bytes) {
    if (bytes == 0) return;
    if (offset >= 0) {
      block_ = static_cast<char*>(std::malloc(size_t(offset + bytes)));
      std::memset(block_, kCanary, size_t(offset));
      data_ = block_ + offset;
      return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    block_ = static_cast<char*>(
        mmap(nullptr, size_t(mapped_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (block_ == MAP_FAILED || mprotect(block_ + page, size_t(inner), PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    std::memset(block_ + page, kCanary, size_t(inner));
    data_ = block_ + page + (offset == kAtPageEnd ? inner - bytes : 0);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (mapped_ > 0) {
      munmap(block_, size_t(mapped_));
    } else {
      std::free(block_);
    }
  }

  static constexpr int64_t kAtPageEnd = -1, kAtPageBegin = -2;
  static int64_t any_offset(int64_t element_size) {
    return any_of<int64_t>({0, element_size, element_size * draw(2, 40), kAtPageEnd, kAtPageBegin});
  }

  char* data() const { return data_; }

  // What lies around the bytes in the same block is as it was.
  void check_surroundings() const {
    if (bytes_ == 0) return;
    const int64_t page = mapped_ > 0 ? sysconf(_SC_PAGESIZE) : 0;
    const char* end = mapped_ > 0 ? block_ + mapped_ - page : data_ + bytes_;
    for (const char* p = block_ + page; p < end; ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != kCanary) fail("bytes around an output were written");
    }
  }

 private:
  static constexpr char kCanary = 0x5a;
  int64_t bytes_;
  int64_t mapped_ = 0;
  char* block_ = nullptr;
  char* data_ = nullptr;  // null where there are no bytes, as in an empty tensor
};

// ---- values ---------------------------------------------------------------------------------------------

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa != 0 ? std::nan("") : HUGE_VAL)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}
double bfloat_value(uint16_t bits) { return double(bits_as<float>(uint32_t(bits) << 16)); }

int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

double value_at(int32_t dtype, const char* p) {
  uint32_t word = 0;
  std::memcpy(&word, p, size_t(size_of(dtype)));
  if (dtype == kFloat32) return double(bits_as<float>(word));
  return dtype == kFloat16 ? half_value(uint16_t(word)) : bfloat_value(uint16_t(word));
}

uint32_t bits_of_integer(int32_t dtype, int64_t value) {
  const uint32_t single = bits_as<uint32_t>(float(value));
  if (dtype == kFloat32) return single;
  if (dtype == kBFloat16) return single >> 16;
  if (value == 0) return 0;
  return (single >> 31 << 15) | (((single >> 23 & 255) - 112) << 10) | (single >> 13 & 1023);
}

enum Values { kIntegers, kAnything };

uint32_t random_value(int32_t dtype, Values values) {
  if (values == kIntegers) return bits_of_integer(dtype, draw(-4, 4));
  const uint32_t random = uint32_t(random_bits());
  if (dtype == kFloat32) return (random & 0x807fffffu) | uint32_t(draw(124, 129)) << 23;
  if (dtype == kBFloat16) return (random & 0x807fu) | uint32_t(draw(124, 129)) << 7;
  return (random & 0x83ffu) | uint32_t(draw(12, 17)) << 10;
}

uint32_t not_finite(int32_t dtype, double value) {
  const uint32_t single = bits_as<uint32_t>(float(value));
  if (dtype == kFloat32) return single;
  if (dtype == kBFloat16) return single >> 16;
  return (single >> 31 << 15) | 0x7c00u | (std::isnan(value) ? 0x200u : 0u);
}

struct Sample {  // [rows, cols] in its dtype, and in double
  int32_t dtype;
  int64_t rows, cols, stride;
  Buffer buffer;
  std::vector<double> values;

  Sample(int32_t dtype_, int64_t rows_, int64_t cols_, int64_t padding, Values kind, int64_t offset)
      : dtype(dtype_),
        rows(rows_),
        cols(cols_),
        stride(cols_ + padding),
        buffer(rows_ * cols_ == 0 ? 0 : ((rows_ - 1) * stride + cols_) * size_of(dtype_), offset),
        values(size_t(rows_ * cols_)) {
    const uint32_t nan = 0xffffffffu;
    for (int64_t i = 0; rows * cols > 0 && i < (rows - 1) * stride + cols; ++i) {
      const uint32_t bits = i % stride < cols ? random_value(dtype, kind) : nan;
      std::memcpy(at(i), &bits, size_t(size_of(dtype)));
    }
    read();
  }

  char* at(int64_t element) const { return buffer.data() + element * size_of(dtype); }
  void set(int64_t row, int64_t col, uint32_t bits) {
    std::memcpy(at(row * stride + col), &bits, size_t(size_of(dtype)));
    values[size_t(row * cols + col)] = value_at(dtype, at(row * stride + col));
  }
  void read() {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) values[size_t(r * cols + c)] = value_at(dtype, at(r * stride + c));
    }
  }
  Matrix matrix() const { return {buffer.data(), stride, dtype}; }
};

std::shared_ptr<Sample> make_sample(int32_t dtype, int64_t rows, int64_t cols, Values kind) {
  return std::make_shared<Sample>(dtype, rows, cols, rows > 1 ? any_of<int64_t>({0, 1, 3, 16}) : 0, kind,
                                  Buffer::any_offset(size_of(dtype)));
}

std::string shape_text(const Sample& s) {
  return "dtype " + std::to_string(s.dtype) + " [" + std::to_string(s.rows) + ", " + std::to_string(s.cols) +
         "] stride " + std::to_string(s.stride);
}

// Equal up to `tolerance`; NaN and infinities equal themselves.
void check_close(double got, double expected, double tolerance, const std::string& what) {
  const bool same = std::isfinite(expected) ? std::fabs(got - expected) <= tolerance
                                            : std::isnan(expected) ? std::isnan(got) : got == expected;
  if (same) return;
  char text[160];
  std::snprintf(text, sizeof(text), " is %.9g, expected %.9g within %.3g", got, expected, tolerance);
  fail(what + text);
}

template <class T>
void check_same_bits(const T* a, const T* b, int64_t count, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(T)) != 0) {
      fail(std::string(what) + "[" + std::to_string(i) + "] depends on the threads");
    }
  }
}

}  // namespace
