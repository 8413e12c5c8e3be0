// One value per token from one pass over both of its rows. Included by each_isa.h.

struct TokenSums {  // of products (cosine), or the first alone of squared or absolute differences
  double dot, square_in, square_out;
};

template <Metric metric, class T>
AP_INLINE TokenSums token_sums(const T* a, const T* b, int64_t hidden, int64_t next_a, int64_t next_b) {
  constexpr bool kSplit = std::is_same_v<T, BFloat16>;
  TokenSums total = {0.0, 0.0, 0.0};
  int64_t c = 0;
  while (hidden - c >= kStep) {
    const int64_t end = std::min(c + kSumBlock, hidden / kStep * kStep);
    Floats dot = {}, square_in = {}, square_out = {};
    for (; c < end; c += kStep) {
      const Pair x = stream_pair<kSplit>(a, c, bytes_ahead<T>(c, hidden, next_a));
      const Pair y = stream_pair<kSplit>(b, c, bytes_ahead<T>(c, hidden, next_b));
      if constexpr (metric == kCosine) {
        dot += x.first * y.first + x.second * y.second;
        square_in += x.first * x.first + x.second * x.second;
        square_out += y.first * y.first + y.second * y.second;
      } else {
        const Floats d = x.first - y.first, e = x.second - y.second;
        dot += metric == kEuclidean ? d * d + e * e : absolute(d) + absolute(e);
      }
    }
    total.dot += sum_lanes(dot);
    total.square_in += sum_lanes(square_in);
    total.square_out += sum_lanes(square_out);
  }
  for (; c < hidden; ++c) {
    const double x = double(load1(a + c)), y = double(load1(b + c));
    if constexpr (metric == kCosine) {
      total.dot += x * y;
      total.square_in += x * x;
      total.square_out += y * y;
    } else {
      total.dot += metric == kEuclidean ? (x - y) * (x - y) : std::fabs(x - y);
    }
  }
  return total;
}

template <Metric metric, class T>
void token_values(const Matrix& h_in, const Matrix& h_out, int64_t hidden, int64_t begin, int64_t end,
                  double* per_token) {
  for (int64_t token = begin; token < end; ++token) {
    const TokenSums sums = token_sums<metric>(element_of<T>(h_in, token, 0), element_of<T>(h_out, token, 0),
                                              hidden, h_in.row_stride, h_out.row_stride);
    if constexpr (metric == kCosine) {
      const double norm_in = std::max(std::sqrt(sums.square_in), kCosineEps);
      const double norm_out = std::max(std::sqrt(sums.square_out), kCosineEps);
      // a norm that overflows must not pass for orthogonality: zero times infinity is NaN
      per_token[token] = sums.dot / (norm_in * norm_out) + 0.0 * (norm_in + norm_out);
    } else {
      per_token[token] = metric == kEuclidean ? std::sqrt(sums.dot) : sums.dot;
    }
  }
}
