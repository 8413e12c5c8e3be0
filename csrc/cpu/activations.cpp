// Column means and centred second moments of activations: one pass over them, merged into the running ones.
//
// Within a block of rows the sums are fp32, of the distances from the mean of the block's first rows: that is
// close enough to the mean of all of them for the square of what is left to cancel nothing, even if one of
// them is an outlier, as first tokens are. Blocks are merged in double, in their order (Chan, Golub and
// LeVeque 1979).
#include <algorithm>
#include <memory>

#include "values.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 8;      // rows that are read at the same time, and added up per column first
constexpr int64_t kColumnTile = 16384;  // columns whose sums stay in the second-level cache (192 KB)

// Rows per fp32 sum; few rows get more blocks than threads.
int64_t rows_per_block(int64_t tokens) { return tokens >= 4096 ? 512 : 128; }

struct BlockRange {
  int64_t first_row, rows;
  int64_t first_col, width;
};

#define AP_KERNELS "activations_kernels.h"
#include "each_isa.h"

template <class T>
void update(const Matrix& x, int64_t tokens, int64_t cols, double* mean, double* m2, int64_t count,
            ApParallelFor parallel_for) {
  const int64_t block_rows = rows_per_block(tokens);
  const int64_t blocks = (tokens + block_rows - 1) / block_rows;
  const int64_t tiles = (cols + kColumnTile - 1) / kColumnTile;
  // [blocks, 3, cols]: origins, sums and squares of each block; every element is written before it is read
  const std::unique_ptr<float[]> scratch(new float[size_t(blocks * 3 * cols)]);
  const auto kernel = AP_CHOOSE(sum_block<T>);
  run_parallel(parallel_for, blocks * tiles, grain_for(block_rows * std::min(cols, kColumnTile)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t first_row = item / tiles * block_rows,
                                 first_col = item % tiles * kColumnTile;
                   const BlockRange block = {first_row, std::min(block_rows, tokens - first_row), first_col,
                                             std::min(kColumnTile, cols - first_col)};
                   float* target = scratch.get() + item / tiles * 3 * cols + first_col;
                   kernel(x, block, target, target + cols, target + 2 * cols);
                 }
               });
  const auto merge = AP_CHOOSE(merge_block);
  run_parallel(parallel_for, cols, grain_for(blocks), [&](int64_t first, int64_t last) {
    constexpr int64_t kPiece = 1024;  // columns whose statistics stay in the first-level cache
    for (int64_t c = first; c < last; c += kPiece) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * block_rows;
        const float* source = scratch.get() + block * 3 * cols + c;
        merge(source, source + cols, source + 2 * cols, std::min(kPiece, last - c),
              std::min(block_rows, tokens - row), count + row, mean + c, m2 + c);
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
