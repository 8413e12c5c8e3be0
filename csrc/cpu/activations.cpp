// Column means and centred second moments of activations: one pass over them, merged into the running ones.
//
// Within a block of rows the sums are those of the distances from the block's first row, in fp32: values of
// one column are close to each other, so that the square of their mean cancels little. Blocks are merged in
// double, in their order (Chan, Golub and LeVeque 1979).
#include <algorithm>
#include <memory>

#include "values.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kRowBlock = 129;     // rows per fp32 sum: the origin and sixteen times kRowsAtOnce
constexpr int kRowsAtOnce = 8;         // rows that are read at the same time, and added up per column first
constexpr int64_t kColumnTile = 8192;  // columns whose sums stay in the second-level cache (64 KB)

struct BlockRange {
  int64_t first_row, rows;
  int64_t first_col, width;
};

#define AP_KERNELS "activations_kernels.h"
#include "each_isa.h"

template <class T>
void update(const Matrix& x, int64_t tokens, int64_t cols, double* mean, double* m2, int64_t count,
            ApParallelFor parallel_for) {
  const int64_t row_blocks = (tokens + kRowBlock - 1) / kRowBlock;
  const int64_t tiles = (cols + kColumnTile - 1) / kColumnTile;
  // [row blocks, cols] each; every element is written before it is read
  const std::unique_ptr<float[]> sums(new float[size_t(row_blocks * cols)]);
  const std::unique_ptr<float[]> squares(new float[size_t(row_blocks * cols)]);
  const auto kernel = AP_CHOOSE(sum_block<T>);
  run_parallel(parallel_for, row_blocks * tiles, grain_for(kRowBlock * std::min(cols, kColumnTile)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t row_block = item / tiles, first_row = row_block * kRowBlock;
                   const int64_t first_col = item % tiles * kColumnTile;
                   const BlockRange block = {first_row, std::min(kRowBlock, tokens - first_row), first_col,
                                             std::min(kColumnTile, cols - first_col)};
                   const int64_t target = row_block * cols + first_col;
                   kernel(x, block, sums.get() + target, squares.get() + target);
                 }
               });
  run_parallel(parallel_for, cols, grain_for(row_blocks), [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t first_row = block * kRowBlock;
      const int64_t rows = std::min(tokens, first_row + kRowBlock) - first_row;
      const double before = double(count + first_row), share = double(rows) / (before + double(rows));
      const T* shift = element_of<T>(x, first_row, 0);
      for (int64_t c = begin; c < end; ++c) {
        const double sum = double(sums[size_t(block * cols + c)]);
        const double block_m2 = double(squares[size_t(block * cols + c)]) - sum * sum / double(rows);
        const double delta = double(load1(shift + c)) + sum / double(rows) - mean[c];
        mean[c] += delta * share;
        m2[c] += std::max(block_m2, 0.0) + delta * delta * before * share;
      }
    }
  });
}

}  // namespace
}  // namespace adapt_pruner::cpu

void ap_cpu_activation_stats(adapt_pruner::Matrix x, int64_t tokens, int64_t cols, double* mean, double* m2,
                             int64_t* count, ApParallelFor parallel_for) {
  using namespace adapt_pruner;
  if (x.dtype == kFloat16) {
    cpu::update<cpu::Half>(x, tokens, cols, mean, m2, *count, parallel_for);
  } else if (x.dtype == kBFloat16) {
    cpu::update<cpu::BFloat16>(x, tokens, cols, mean, m2, *count, parallel_for);
  } else {
    cpu::update<float>(x, tokens, cols, mean, m2, *count, parallel_for);
  }
  *count += tokens;
}
