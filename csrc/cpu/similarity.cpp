// Similarity or distance of two residual streams: one pass over both, a value per token, then their mean in
// the order of the tokens.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kSumBlock = 1024;  // elements per fp32 sum: 64 per lane with two accumulators each
constexpr int kUnroll = 2;

struct Sums {  // of products (cosine), or the first alone of squared or absolute differences
  double dot, square_in, square_out;
};

template <Metric metric, class T>
AP_INLINE Sums token_sums(const T* a, const T* b, int64_t hidden) {
  Sums total = {0.0, 0.0, 0.0};
  for (int64_t begin = 0; begin < hidden; begin += kSumBlock) {
    const int64_t end = std::min(hidden, begin + kSumBlock);
    Float8 dot[kUnroll] = {}, square_in[kUnroll] = {}, square_out[kUnroll] = {};
    int64_t c = begin;
    for (; c + kUnroll * kWidth <= end; c += kUnroll * kWidth) {
#pragma GCC unroll 2
      for (int k = 0; k < kUnroll; ++k) {
        const Float8 x = load8(a + c + k * kWidth), y = load8(b + c + k * kWidth);
        if constexpr (metric == kCosine) {
          dot[k] += x * y;
          square_in[k] += x * x;
          square_out[k] += y * y;
        } else if constexpr (metric == kEuclidean) {
          dot[k] += (x - y) * (x - y);
        } else {
          dot[k] += absolute(x - y);
        }
      }
    }
    total.dot += sum_lanes(dot[0] + dot[1]);
    total.square_in += sum_lanes(square_in[0] + square_in[1]);
    total.square_out += sum_lanes(square_out[0] + square_out[1]);
    for (; c < end; ++c) {
      const double x = double(load1(a + c)), y = double(load1(b + c));
      if constexpr (metric == kCosine) {
        total.dot += x * y;
        total.square_in += x * x;
        total.square_out += y * y;
      } else if constexpr (metric == kEuclidean) {
        total.dot += (x - y) * (x - y);
      } else {
        total.dot += std::fabs(x - y);
      }
    }
  }
  return total;
}

template <Metric metric, class T>
AP_INLINE void tokens_body(const Matrix& h_in, const Matrix& h_out, int64_t hidden, int64_t begin,
                           int64_t end, double* per_token) {
  for (int64_t token = begin; token < end; ++token) {
    const Sums sums = token_sums<metric>(row_of<T>(h_in, token), row_of<T>(h_out, token), hidden);
    if constexpr (metric == kCosine) {
      const double norm_in = std::max(std::sqrt(sums.square_in), kCosineEps);
      const double norm_out = std::max(std::sqrt(sums.square_out), kCosineEps);
      per_token[token] = sums.dot / (norm_in * norm_out);
    } else if constexpr (metric == kEuclidean) {
      per_token[token] = std::sqrt(sums.dot);
    } else {
      per_token[token] = sums.dot;
    }
  }
}

using Kernel = void (*)(const Matrix&, const Matrix&, int64_t hidden, int64_t begin, int64_t end,
                        double* per_token);

template <Metric metric, class T>
AP_AVX2 void tokens_avx2(const Matrix& h_in, const Matrix& h_out, int64_t hidden, int64_t begin, int64_t end,
                         double* per_token) {
  tokens_body<metric, T>(h_in, h_out, hidden, begin, end, per_token);
}
template <Metric metric, class T>
void tokens_baseline(const Matrix& h_in, const Matrix& h_out, int64_t hidden, int64_t begin, int64_t end,
                     double* per_token) {
  tokens_body<metric, T>(h_in, h_out, hidden, begin, end, per_token);
}

template <Metric metric, class T>
Kernel kernel_of() {
  return use_avx2() ? tokens_avx2<metric, T> : tokens_baseline<metric, T>;
}

template <Metric metric>
Kernel choose_dtype(int32_t dtype) {
  if (dtype == kFloat16) return kernel_of<metric, Half>();
  if (dtype == kBFloat16) return kernel_of<metric, BFloat16>();
  return kernel_of<metric, float>();
}

Kernel choose_kernel(Metric metric, int32_t dtype) {
  if (metric == kEuclidean) return choose_dtype<kEuclidean>(dtype);
  if (metric == kManhattan) return choose_dtype<kManhattan>(dtype);
  return choose_dtype<kCosine>(dtype);
}

}  // namespace
}  // namespace adapt_pruner::cpu

void ap_cpu_residual_similarity(adapt_pruner::Matrix h_in, adapt_pruner::Matrix h_out, int64_t tokens,
                                int64_t hidden, int32_t metric, float* result, ApParallelFor parallel_for) {
  using namespace adapt_pruner;
  const cpu::Kernel kernel = cpu::choose_kernel(Metric(metric), h_in.dtype);
  std::vector<double> per_token(static_cast<size_t>(tokens));
  cpu::run_parallel(parallel_for, tokens, cpu::grain_for(hidden), [&](int64_t begin, int64_t end) {
    kernel(h_in, h_out, hidden, begin, end, per_token.data());
  });
  double sum = 0.0;
  for (const double value : per_token) sum += value;
  *result = float(sum / double(tokens));
}
