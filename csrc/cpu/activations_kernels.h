// Sums over a block of rows of the distances from its first row, and of their squares. Included by each_isa.h.

// Adds `count` rows from `row` on, `stride` elements apart from each other.
template <class T, int count>
AP_INLINE void add_distances(const T* origin, const T* row, int64_t stride, int64_t width, float* sums,
                             float* squares) {
  constexpr bool kSplit = std::is_same_v<T, BFloat16>;
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    const Pair from = load_pair<kSplit>(origin, c);
    Pair sum = {}, square = {};
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) {
      const Pair x = stream_pair<kSplit>(row + k * stride, c);
      const Pair d = {x.first - from.first, x.second - from.second};
      sum = {sum.first + d.first, sum.second + d.second};
      square = {square.first + d.first * d.first, square.second + d.second * d.second};
    }
    add_pair(sums + c, sum);
    add_pair(squares + c, square);
  }
  for (; c < width; ++c) {
    for (int k = 0; k < count; ++k) {
      const float d = load1(row + k * stride + c) - load1(origin + c);
      sums[c] += d;
      squares[c] += d * d;
    }
  }
}

template <class T>
void sum_block(const Matrix& x, const BlockRange& block, float* sums, float* squares) {
  const T* origin = element_of<T>(x, block.first_row, block.first_col);
  std::fill(sums, sums + block.width, 0.0f);
  std::fill(squares, squares + block.width, 0.0f);
  int64_t row = 1;  // the first one is at no distance
  for (; row + kRowsAtOnce <= block.rows; row += kRowsAtOnce) {
    add_distances<T, kRowsAtOnce>(origin, origin + row * x.row_stride, x.row_stride, block.width, sums, squares);
  }
  for (; row < block.rows; ++row) {
    add_distances<T, 1>(origin, origin + row * x.row_stride, x.row_stride, block.width, sums, squares);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    merge_split(sums, block.width);
    merge_split(squares, block.width);
  }
}
