// Sums of the saliencies of a tile by rows, by columns, or both from one read. Included by each_isa.h.

// Float is float or Floats.
template <Mode mode, class Float>
AP_INLINE Float element(Float w, Float g, Float h) {
  if constexpr (mode == kFirst) return absolute(w * g);
  if constexpr (mode == kVectorize) return w * g;
  if constexpr (mode == kSecond) return absolute(w * h * w);
  if constexpr (mode == kMixed) return absolute(w * g - 0.5f * (w * h * w));
  if constexpr (mode == kMagnitudeL1) return absolute(w);
  if constexpr (mode == kMagnitudeL2) return w * w;
}

struct Ahead {  // bytes, see bytes_ahead
  int64_t w, g, h;
};

// One row of a tile, from the tile's first column on.
template <Mode mode, class W, class G, class H>
struct Row {
  static constexpr bool kSplit = !std::is_same_v<W, float> && !std::is_same_v<W, Half> &&
                                 !std::is_same_v<G, float> && !std::is_same_v<H, float>;
  const W* w;
  const G* g;
  const H* h;

  AP_INLINE Pair elements(int64_t c, const Ahead& ahead) const {
    const Pair x = stream_pair<kSplit>(w, c, ahead.w), y = stream_pair<kSplit>(g, c, ahead.g),
               z = stream_pair<kSplit>(h, c, ahead.h);
    return {element<mode>(x.first, y.first, z.first), element<mode>(x.second, y.second, z.second)};
  }
  AP_INLINE float one_element(int64_t c) const {
    return element<mode>(load_one(w, c), load_one(g, c), load_one(h, c));
  }
};

// `count` rows at once, from first_row on: their sums are stored in row_sums and, unless that is null, added
// to column_sums. Row sums cost nothing: the memory is what everything waits for.
template <Mode mode, class W, class G, class H, int count>
void add_rows(const ImportanceMember& member, int64_t first_row, int64_t first_col, int64_t width,
              double* row_sums, float* column_sums) {
  Row<mode, W, G, H> rows[count];
  for (int k = 0; k < count; ++k) {
    rows[k] = {element_of<W>(member.weight, first_row + k, first_col),
               element_of<G>(member.grad, first_row + k, first_col),
               element_of<H>(member.fisher, first_row + k, first_col)};
  }
  double totals[count] = {};
  int64_t c = 0;
  while (width - c >= kStep) {
    const int64_t end = std::min(c + kSumBlock, width / kStep * kStep);
    Floats sums[count] = {};
    for (; c < end; c += kStep) {
      const Ahead ahead = {bytes_ahead<W>(c, width, count * member.weight.row_stride),
                           bytes_ahead<G>(c, width, count * member.grad.row_stride),
                           bytes_ahead<H>(c, width, count * member.fisher.row_stride)};
      Pair column = {};
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) {
        const Pair e = rows[k].elements(c, ahead);
        sums[k] += e.first + e.second;
        column = k == 0 ? e : Pair{column.first + e.first, column.second + e.second};
      }
      if (column_sums != nullptr) add_pair(column_sums + c, column);
    }
    for (int k = 0; k < count; ++k) totals[k] += sum_lanes(sums[k]);
  }
  for (; c < width; ++c) {
    float column = 0.0f;
    for (int k = 0; k < count; ++k) {
      const float e = rows[k].one_element(c);
      totals[k] += double(e);
      column += e;
    }
    if (column_sums != nullptr) column_sums[c] += column;
  }
  std::copy(totals, totals + count, row_sums);
}

// One block of rows of a column tile.
template <Mode mode, class W, class G, class H>
void sum_tile(const ImportanceMember& member, const TileRange& tile, double* row_sums, float* column_sums) {
  if (column_sums != nullptr) std::fill(column_sums, column_sums + tile.width, 0.0f);
  int64_t row = 0;
  for (; row + kRowsAtOnce <= tile.rows; row += kRowsAtOnce) {
    add_rows<mode, W, G, H, kRowsAtOnce>(member, tile.first_row + row, tile.first_col, tile.width,
                                         row_sums + row, column_sums);
  }
  for (; row < tile.rows; ++row) {
    add_rows<mode, W, G, H, 1>(member, tile.first_row + row, tile.first_col, tile.width, row_sums + row,
                               column_sums);
  }
  if (Row<mode, W, G, H>::kSplit && column_sums != nullptr) merge_split(column_sums, tile.width);
}

// Columns [begin, end) of `tiles` rows of tile sums, added up.
inline void add_tiles(const float* tile_sums, int64_t tiles, int64_t cols, int64_t begin, int64_t end,
                      double* sums) {
  constexpr int64_t kPiece = 1024;  // sums that stay in the first-level cache
  for (; begin < end; begin += kPiece) {
    const int64_t width = std::min(kPiece, end - begin);
    double* piece = sums + begin;
    std::fill(piece, piece + width, 0.0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* next = tile_sums + tile * cols + begin;
      for (int64_t c = 0; c < width; ++c) piece[c] += double(next[c]);
    }
  }
}
