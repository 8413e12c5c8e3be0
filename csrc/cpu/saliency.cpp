// Unit importance: the saliency of every element, summed per unit.
//
// Sums are split by the shape alone, never by the number of threads: rows in blocks of kRowBlock, columns in
// tiles of kColumnTile, fp32 within a block (short sums), double across blocks.
#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kSumBlock = 2048;    // elements of a row per fp32 sum: 64 per lane
constexpr int64_t kRowBlock = 128;     // rows per fp32 column sum: 32 additions of four rows
constexpr int64_t kColumnTile = 16384;  // columns whose sums stay in the second-level cache (64 KB)
constexpr int kUnroll = 4;             // independent accumulators, or rows read at once

// Float is float or Float8.
template <Mode mode, class Float>
AP_INLINE Float element(Float w, Float g, Float h) {
  if constexpr (mode == kFirst) return absolute(w * g);
  if constexpr (mode == kVectorize) return w * g;
  if constexpr (mode == kSecond) return absolute(w * h * w);
  if constexpr (mode == kMixed) return absolute(w * g - 0.5f * (w * h * w));
  if constexpr (mode == kMagnitudeL1) return absolute(w);
  if constexpr (mode == kMagnitudeL2) return w * w;
}

template <Mode mode, class W, class G, class H>
AP_INLINE double row_sum(const W* w, const G* g, const H* h, int64_t cols) {
  double total = 0.0;
  for (int64_t begin = 0; begin < cols; begin += kSumBlock) {
    const int64_t end = std::min(cols, begin + kSumBlock);
    Float8 sums[kUnroll] = {};
    int64_t c = begin;
    for (; c + kUnroll * kWidth <= end; c += kUnroll * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t i = c + k * kWidth;
        sums[k] += element<mode>(load8(w + i), load8(g + i), load8(h + i));
      }
    }
    float rest = 0.0f;  // fewer than 32 elements, once per row
    for (; c < end; ++c) rest += element<mode>(load1(w + c), load1(g + c), load1(h + c));
    total += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + double(rest);
  }
  return total;
}

template <Mode mode, class W, class G, class H>
AP_INLINE void rows_body(const ImportanceMember& member, int64_t begin, int64_t end, double* index_scores) {
  for (int64_t row = begin; row < end; ++row) {
    index_scores[row] = row_sum<mode>(row_of<W>(member.weight, row), row_of<G>(member.grad, row),
                                      row_of<H>(member.fisher, row), member.cols);
  }
}

// sums[c] += the elements of `count` rows at column c; count is a constant where it is inlined
template <Mode mode, class W, class G, class H>
AP_INLINE void add_rows(const ImportanceMember& member, int64_t first_row, int count, int64_t first_col,
                        int64_t width, float* sums) {
  const W* w[kUnroll] = {};
  const G* g[kUnroll] = {};
  const H* h[kUnroll] = {};
  for (int k = 0; k < count; ++k) {
    w[k] = row_of<W>(member.weight, first_row + k) + first_col;
    if constexpr (reads_grad(mode)) g[k] = row_of<G>(member.grad, first_row + k) + first_col;
    if constexpr (reads_fisher(mode)) h[k] = row_of<H>(member.fisher, first_row + k) + first_col;
  }
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    Float8 sum = element<mode>(load8(w[0] + c), load8(g[0] + c), load8(h[0] + c));
#pragma GCC unroll 4
    for (int k = 1; k < count; ++k) sum += element<mode>(load8(w[k] + c), load8(g[k] + c), load8(h[k] + c));
    store8(sums + c, load8(sums + c) + sum);
  }
  for (; c < width; ++c) {
    float sum = element<mode>(load1(w[0] + c), load1(g[0] + c), load1(h[0] + c));
    for (int k = 1; k < count; ++k) sum += element<mode>(load1(w[k] + c), load1(g[k] + c), load1(h[k] + c));
    sums[c] += sum;
  }
}

// Items are (row block, column tile) pairs; partial_sums is [row blocks, cols].
template <Mode mode, class W, class G, class H>
AP_INLINE void columns_body(const ImportanceMember& member, int64_t begin, int64_t end, float* partial_sums) {
  const int64_t tiles = (member.cols + kColumnTile - 1) / kColumnTile;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row_block = item / tiles;
    const int64_t first_col = (item % tiles) * kColumnTile;
    const int64_t width = std::min(kColumnTile, member.cols - first_col);
    float* sums = partial_sums + row_block * member.cols + first_col;
    std::memset(sums, 0, size_t(width) * sizeof(float));
    const int64_t last_row = std::min(member.rows, (row_block + 1) * kRowBlock);
    int64_t row = row_block * kRowBlock;
    for (; row + kUnroll <= last_row; row += kUnroll) {
      add_rows<mode, W, G, H>(member, row, kUnroll, first_col, width, sums);
    }
    for (; row < last_row; ++row) add_rows<mode, W, G, H>(member, row, 1, first_col, width, sums);
  }
}

template <Mode mode, class W, class G, class H>
AP_AVX2 void rows_avx2(const ImportanceMember& member, int64_t begin, int64_t end, double* index_scores) {
  rows_body<mode, W, G, H>(member, begin, end, index_scores);
}
template <Mode mode, class W, class G, class H>
void rows_baseline(const ImportanceMember& member, int64_t begin, int64_t end, double* index_scores) {
  rows_body<mode, W, G, H>(member, begin, end, index_scores);
}
template <Mode mode, class W, class G, class H>
AP_AVX2 void columns_avx2(const ImportanceMember& member, int64_t begin, int64_t end, float* partial_sums) {
  columns_body<mode, W, G, H>(member, begin, end, partial_sums);
}
template <Mode mode, class W, class G, class H>
void columns_baseline(const ImportanceMember& member, int64_t begin, int64_t end, float* partial_sums) {
  columns_body<mode, W, G, H>(member, begin, end, partial_sums);
}

struct Kernel {
  void (*rows)(const ImportanceMember& member, int64_t begin, int64_t end, double* index_scores);
  void (*columns)(const ImportanceMember& member, int64_t begin, int64_t end, float* partial_sums);
};

template <Mode mode, class W, class G, class H>
Kernel kernel_of() {
  if (use_avx2()) return {rows_avx2<mode, W, G, H>, columns_avx2<mode, W, G, H>};
  return {rows_baseline<mode, W, G, H>, columns_baseline<mode, W, G, H>};
}

// Gradients and Fisher diagonals have the dtype of the weight or fp32.
template <Mode mode, class W, class G>
Kernel choose_fisher(const ImportanceMember& member) {
  if constexpr (!reads_fisher(mode)) return kernel_of<mode, W, G, Absent>();
  if (member.fisher.dtype == kFloat32) return kernel_of<mode, W, G, float>();
  return kernel_of<mode, W, G, W>();
}

template <Mode mode, class W>
Kernel choose_grad(const ImportanceMember& member) {
  if constexpr (!reads_grad(mode)) return choose_fisher<mode, W, Absent>(member);
  if (member.grad.dtype == kFloat32) return choose_fisher<mode, W, float>(member);
  return choose_fisher<mode, W, W>(member);
}

template <Mode mode>
Kernel choose_weight(const ImportanceMember& member) {
  if (member.weight.dtype == kFloat16) return choose_grad<mode, Half>(member);
  if (member.weight.dtype == kBFloat16) return choose_grad<mode, BFloat16>(member);
  return choose_grad<mode, float>(member);
}

Kernel choose_kernel(const ImportanceMember& member, Mode mode) {
  switch (mode) {
    case kVectorize: return choose_weight<kVectorize>(member);
    case kSecond: return choose_weight<kSecond>(member);
    case kMixed: return choose_weight<kMixed>(member);
    case kMagnitudeL1: return choose_weight<kMagnitudeL1>(member);
    case kMagnitudeL2: return choose_weight<kMagnitudeL2>(member);
    default: return choose_weight<kFirst>(member);
  }
}

void sum_rows(const ImportanceMember& member, const Kernel& kernel, double* index_scores,
              ApParallelFor parallel_for) {
  run_parallel(parallel_for, member.rows, grain_for(member.cols),
               [&](int64_t begin, int64_t end) { kernel.rows(member, begin, end, index_scores); });
}

void sum_columns(const ImportanceMember& member, const Kernel& kernel, double* index_scores,
                 ApParallelFor parallel_for) {
  const int64_t row_blocks = (member.rows + kRowBlock - 1) / kRowBlock;
  const int64_t tiles = (member.cols + kColumnTile - 1) / kColumnTile;
  const std::unique_ptr<float[]> partial_sums(new float[size_t(row_blocks * member.cols)]);
  const int64_t item_elements = std::min(member.rows, kRowBlock) * std::min(member.cols, kColumnTile);
  run_parallel(parallel_for, row_blocks * tiles, grain_for(item_elements),
               [&](int64_t begin, int64_t end) { kernel.columns(member, begin, end, partial_sums.get()); });
  run_parallel(parallel_for, member.cols, grain_for(row_blocks), [&](int64_t begin, int64_t end) {
    std::fill(index_scores + begin, index_scores + end, 0.0);
    for (int64_t block = 0; block < row_blocks; ++block) {
      const float* sums = partial_sums.get() + block * member.cols;
      for (int64_t c = begin; c < end; ++c) index_scores[c] += double(sums[c]);
    }
  });
}

}  // namespace
}  // namespace adapt_pruner::cpu

void ap_cpu_unit_importance(const adapt_pruner::ImportanceMember* members, int64_t member_count, int32_t mode,
                            int64_t units, float* scores, ApParallelFor parallel_for) {
  using namespace adapt_pruner;
  std::vector<double> totals(size_t(units), 0.0);
  std::vector<double> index_scores;
  for (int64_t m = 0; m < member_count; ++m) {
    const ImportanceMember& member = members[m];
    const cpu::Kernel kernel = cpu::choose_kernel(member, Mode(mode));
    index_scores.resize(size_t(member.dim == 0 ? member.rows : member.cols));
    if (member.dim == 0) {
      cpu::sum_rows(member, kernel, index_scores.data(), parallel_for);
    } else {
      cpu::sum_columns(member, kernel, index_scores.data(), parallel_for);
    }
    double* total = totals.data() + member.first_unit;
    for (size_t i = 0; i < index_scores.size(); ++i) total[int64_t(i) / member.group_size] += std::fabs(index_scores[i]);
  }
  for (int64_t unit = 0; unit < units; ++unit) scores[unit] = float(totals[size_t(unit)]);
}
