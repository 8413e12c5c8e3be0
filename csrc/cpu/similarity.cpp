// Similarity or distance of two residual streams: one pass over both, a value per token, then their mean in
// the order of the tokens.
#include <algorithm>
#include <vector>

#include "values.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kSumBlock = 2048;  // elements per fp32 sum: 64 pairs per lane

#define AP_KERNELS "similarity_kernels.h"
#include "each_isa.h"

using Kernel = void (*)(const Matrix&, const Matrix&, int64_t hidden, int64_t begin, int64_t end,
                        double* per_token);

template <Metric metric, class T>
Kernel kernel_of() {
  return AP_CHOOSE(token_values<metric, T>);
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
