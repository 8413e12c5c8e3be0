// Sums over a block of rows of the distances from an origin, and of their squares. Included by each_isa.h.

// Of `count` rows from `row` on, `stride` elements apart; added to the sums. `origin` holds fp32 values, in
// the order of the pairs of T.
template <class T>
AP_INLINE void add_distances(const T* row, int64_t stride, int64_t count, int64_t width, const float* origin,
                             float* sums, float* squares) {
  constexpr bool kSplit = std::is_same_v<T, BFloat16>;
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    const Pair from = {load(origin + c), load(origin + c + kLanes)};
    const int64_t ahead = bytes_ahead<T>(c, width, count * stride);
    Pair sum = {}, square = {};
    for (int64_t k = 0; k < count; ++k) {
      const Pair x = stream_pair<kSplit>(row + k * stride, c, ahead);
      const Pair d = {x.first - from.first, x.second - from.second};
      sum = {sum.first + d.first, sum.second + d.second};
      square = {square.first + d.first * d.first, square.second + d.second * d.second};
    }
    add_pair(sums + c, sum);
    add_pair(squares + c, square);
  }
  for (; c < width; ++c) {
    float sum = 0.0f, square = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      const float d = load1(row + k * stride + c) - origin[c];
      sum += d;
      square += d * d;
    }
    sums[c] += sum;
    squares[c] += square;
  }
}

// The mean of `count` rows, in the order of the pairs of T.
template <class T>
AP_INLINE void mean_of_rows(const T* row, int64_t stride, int64_t count, int64_t width, float* mean) {
  constexpr bool kSplit = std::is_same_v<T, BFloat16>;
  const float share = 1.0f / float(count);
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    const int64_t ahead = bytes_ahead<T>(c, width, count * stride);
    Pair sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const Pair x = stream_pair<kSplit>(row + k * stride, c, ahead);
      sum = {sum.first + x.first, sum.second + x.second};
    }
    store(mean + c, share * sum.first);
    store(mean + c + kLanes, share * sum.second);
  }
  for (; c < width; ++c) {
    float sum = 0.0f;
    for (int64_t k = 0; k < count; ++k) sum += load1(row + k * stride + c);
    mean[c] = share * sum;
  }
}

template <class T>
void sum_block(const Matrix& x, const BlockRange& block, float* origin, float* sums, float* squares) {
  const T* row = element_of<T>(x, block.first_row, block.first_col);
  mean_of_rows(row, x.row_stride, std::min(block.rows, kRowsAtOnce), block.width, origin);
  std::fill(sums, sums + block.width, 0.0f);
  std::fill(squares, squares + block.width, 0.0f);
  for (int64_t r = 0; r < block.rows; r += kRowsAtOnce) {
    add_distances(row + r * x.row_stride, x.row_stride, std::min(kRowsAtOnce, block.rows - r), block.width,
                  origin, sums, squares);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (float* values : {origin, sums, squares}) merge_split(values, block.width);
  }
}

// Merges `count` columns of a block of `rows` rows into those of the `before` rows so far.
inline void merge_block(const float* __restrict__ origin, const float* __restrict__ sums,
                        const float* __restrict__ squares, int64_t count, int64_t rows, int64_t before,
                        double* __restrict__ mean, double* __restrict__ m2) {
  const double per_row = 1.0 / double(rows), share = double(rows) / double(before + rows);
  const double weight = double(before) * share;
  for (int64_t c = 0; c < count; ++c) {
    const double sum = double(sums[c]);
    const double delta = double(origin[c]) + sum * per_row - mean[c];
    mean[c] += delta * share;
    // rounding may take more away than there is; NaN stays NaN
    const double block_m2 = std::max(double(squares[c]) - sum * sum * per_row, 0.0);
    m2[c] += block_m2 + delta * delta * weight;
  }
}
