// Unit importance: the saliency of every element, summed per unit.
//
// Sums are split by the shape alone, never by the number of threads: into tiles of some rows and columns,
// fp32 within a tile (short sums), double across tiles. A matrix that two members in a row read, one by rows
// and one by columns, is read once.
#include <algorithm>
#include <memory>
#include <vector>

#include "values.h"

namespace adapt_pruner::cpu {
namespace {

constexpr int64_t kColumnTile = 16384;  // columns whose sums stay in the second-level cache (64 KB)
constexpr int64_t kSumBlock = 2048;     // elements of a row per fp32 sum: 64 pairs per lane
constexpr int kRowsAtOnce = 4;          // rows that are read at the same time, and added up per column first

// Rows per fp32 column sum: at most 64 additions of kRowsAtOnce rows. Small matrices get more tiles than
// threads.
int64_t rows_per_tile(int64_t rows) { return rows >= 8192 ? 256 : (rows >= 2048 ? 128 : 32); }

struct TileRange {
  int64_t first_row, rows;
  int64_t first_col, width;
};

#define AP_KERNELS "saliency_kernels.h"
#include "each_isa.h"

using Kernel = void (*)(const ImportanceMember& member, const TileRange& tile, double* row_sums,
                        float* column_sums);

// Gradients and Fisher diagonals have the dtype of the weight or fp32.
template <Mode mode, class W, class G>
Kernel choose_fisher(const ImportanceMember& member) {
  if constexpr (!reads_fisher(mode)) return AP_CHOOSE(sum_tile<mode, W, G, Absent>);
  if (member.fisher.dtype == kFloat32) return AP_CHOOSE(sum_tile<mode, W, G, float>);
  return AP_CHOOSE(sum_tile<mode, W, G, W>);
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

// Signed sums of each row and, if they are asked for, of each column.
struct IndexSums {
  std::vector<double> rows;
  std::vector<double> cols;
};

IndexSums sum_indices(const ImportanceMember& member, Mode mode, bool by_cols, ApParallelFor parallel_for) {
  const int64_t rows = member.rows, cols = member.cols, tile_rows = rows_per_tile(rows);
  const int64_t row_tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t col_tiles = (cols + kColumnTile - 1) / kColumnTile;
  const Kernel kernel = choose_kernel(member, mode);
  // every element is written before it is read
  const std::unique_ptr<double[]> row_sums(new double[size_t(col_tiles * rows)]);
  const std::unique_ptr<float[]> column_sums(by_cols ? new float[size_t(row_tiles * cols)] : nullptr);
  run_parallel(parallel_for, row_tiles * col_tiles, grain_for(tile_rows * std::min(cols, kColumnTile)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t row_tile = item / col_tiles, col_tile = item % col_tiles;
                   const int64_t first_row = row_tile * tile_rows, first_col = col_tile * kColumnTile;
                   const TileRange tile = {first_row, std::min(tile_rows, rows - first_row), first_col,
                                           std::min(kColumnTile, cols - first_col)};
                   kernel(member, tile, row_sums.get() + col_tile * rows + first_row,
                          by_cols ? column_sums.get() + row_tile * cols + first_col : nullptr);
                 }
               });
  IndexSums sums = {std::vector<double>(size_t(rows), 0.0), {}};
  for (int64_t tile = 0; tile < col_tiles; ++tile) {
    for (int64_t row = 0; row < rows; ++row) sums.rows[size_t(row)] += row_sums[size_t(tile * rows + row)];
  }
  if (!by_cols) return sums;
  sums.cols.resize(size_t(cols));
  const auto fold = AP_CHOOSE(add_tiles);
  run_parallel(parallel_for, cols, grain_for(row_tiles), [&](int64_t begin, int64_t end) {
    fold(column_sums.get(), row_tiles, cols, begin, end, sums.cols.data());
  });
  return sums;
}

void add_to_units(const std::vector<double>& index_sums, const ImportanceMember& member, double* totals) {
  const double* next = index_sums.data();
  for (double* unit = totals + member.first_unit; next != index_sums.data() + index_sums.size(); ++unit) {
    for (int64_t i = 0; i < member.group_size; ++i) *unit += std::fabs(*next++);
  }
}

bool same_data(const Matrix& a, const Matrix& b) {
  return a.data == b.data && a.row_stride == b.row_stride && a.dtype == b.dtype;
}

// Whether two members are the same matrix, once by rows and once by columns.
bool share_a_read(const ImportanceMember& a, const ImportanceMember& b) {
  return a.dim != b.dim && a.rows == b.rows && a.cols == b.cols && same_data(a.weight, b.weight) &&
         same_data(a.grad, b.grad) && same_data(a.fisher, b.fisher);
}

}  // namespace
}  // namespace adapt_pruner::cpu

void ap_cpu_unit_importance(const adapt_pruner::ImportanceMember* members, int64_t member_count, int32_t mode,
                            int64_t units, float* scores, ApParallelFor parallel_for) {
  using namespace adapt_pruner;
  std::vector<double> totals(size_t(units), 0.0);
  for (int64_t m = 0; m < member_count; ++m) {
    const bool shared = m + 1 < member_count && cpu::share_a_read(members[m], members[m + 1]);
    const bool by_cols = shared || members[m].dim == 1;
    const cpu::IndexSums sums = cpu::sum_indices(members[m], Mode(mode), by_cols, parallel_for);
    for (const int64_t last = shared ? m + 1 : m;; ++m) {
      cpu::add_to_units(members[m].dim == 0 ? sums.rows : sums.cols, members[m], totals.data());
      if (m == last) break;
    }
  }
  std::copy(totals.begin(), totals.end(), scores);
}
