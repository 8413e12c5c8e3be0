// Column means and centred second moments of activations: one pass over them, merged into the running ones.
//
// Within a block of rows the sums are those of the distances from the block's first row, in fp32: values of
// one column are close to each other, so that the square of their mean cancels little. Blocks are merged in
// double, in their order (Chan, Golub and LeVeque 1979).
#include <algorithm>
#include <memory>

#include "simd.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kRowBlock = 64;      // rows per fp32 sum
constexpr int64_t kColumnTile = 2048;  // columns whose sums stay in the first-level cache (16 KB)

struct BlockSums {  // [row blocks, cols] each
  float* sums;
  float* squares;
};

// Items are (row block, column tile) pairs.
template <class T>
AP_INLINE void blocks_body(const Matrix& x, int64_t tokens, int64_t cols, int64_t begin, int64_t end,
                           const BlockSums& out) {
  const int64_t tiles = (cols + kColumnTile - 1) / kColumnTile;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_row = item / tiles * kRowBlock;
    const int64_t last_row = std::min(tokens, first_row + kRowBlock);
    const int64_t first_col = item % tiles * kColumnTile;
    const int64_t width = std::min(kColumnTile, cols - first_col);
    float* sums = out.sums + item / tiles * cols + first_col;
    float* squares = out.squares + item / tiles * cols + first_col;
    const T* shift = row_of<T>(x, first_row) + first_col;
    std::memset(sums, 0, size_t(width) * sizeof(float));
    std::memset(squares, 0, size_t(width) * sizeof(float));
    for (int64_t row = first_row + 1; row < last_row; ++row) {
      const T* values = row_of<T>(x, row) + first_col;
      int64_t c = 0;
      for (; c + kWidth <= width; c += kWidth) {
        const Float8 d = load8(values + c) - load8(shift + c);
        store8(sums + c, load8(sums + c) + d);
        store8(squares + c, load8(squares + c) + d * d);
      }
      for (; c < width; ++c) {
        const float d = load1(values + c) - load1(shift + c);
        sums[c] += d;
        squares[c] += d * d;
      }
    }
  }
}

template <class T>
AP_AVX2 void blocks_avx2(const Matrix& x, int64_t tokens, int64_t cols, int64_t begin, int64_t end,
                         const BlockSums& out) {
  blocks_body<T>(x, tokens, cols, begin, end, out);
}
template <class T>
void blocks_baseline(const Matrix& x, int64_t tokens, int64_t cols, int64_t begin, int64_t end,
                     const BlockSums& out) {
  blocks_body<T>(x, tokens, cols, begin, end, out);
}

template <class T>
void update(const Matrix& x, int64_t tokens, int64_t cols, double* mean, double* m2, int64_t count,
            ApParallelFor parallel_for) {
  const int64_t row_blocks = (tokens + kRowBlock - 1) / kRowBlock;
  const int64_t tiles = (cols + kColumnTile - 1) / kColumnTile;
  const std::unique_ptr<float[]> scratch(new float[size_t(2 * row_blocks * cols)]);
  const BlockSums out = {scratch.get(), scratch.get() + row_blocks * cols};
  const auto kernel = use_avx2() ? blocks_avx2<T> : blocks_baseline<T>;
  const int64_t item_elements = std::min(tokens, kRowBlock) * std::min(cols, kColumnTile);
  run_parallel(parallel_for, row_blocks * tiles, grain_for(item_elements),
               [&](int64_t begin, int64_t end) { kernel(x, tokens, cols, begin, end, out); });
  run_parallel(parallel_for, cols, grain_for(row_blocks), [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t first_row = block * kRowBlock;
      const int64_t rows = std::min(tokens, first_row + kRowBlock) - first_row;
      const double before = double(count + first_row), share = double(rows) / (before + double(rows));
      const T* shift = row_of<T>(x, first_row);
      for (int64_t c = begin; c < end; ++c) {
        const double sum = double(out.sums[block * cols + c]);
        const double block_m2 = double(out.squares[block * cols + c]) - sum * sum / double(rows);
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
