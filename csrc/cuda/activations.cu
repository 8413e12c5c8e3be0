// Column means and centred second moments of activations on the GPU: one pass over them, merged into the
// running ones without a word to the host.
//
// A warp sums the distances from a value of its rows in fp32: the values of a column are close to each other,
// so that the square of their mean cancels little; the median of three rows keeps a lone outlier from being
// that value. All that follows is in double: the sums of a block's warps are moved to a common origin and
// added, then the moments of the blocks; these are merged into the running values (Chan, Golub and LeVeque
// 1979).
#include "common.cuh"

namespace adapt_pruner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumnsPerBlock = kWarp * kChunk;
constexpr int kRowsPerWarp = 32;  // next to each other
constexpr int kRowsPerBlock = kWarps * kRowsPerWarp;
constexpr int kBlocksPerSm = 3;
constexpr int kInFlight = 4;  // chunks of a thread

// Per block of rows: [row blocks, cols] each. `before` is what *count was.
struct Workspace {
  double* means;
  float* second_moments;
  int64_t* before;
};

Workspace workspace_of(void* memory, int64_t row_blocks, int64_t cols) {
  int64_t* before = static_cast<int64_t*>(memory);
  double* means = reinterpret_cast<double*>(before + 1);
  return {means, reinterpret_cast<float*>(means + row_blocks * cols), before};
}

// Of a block of `size` rows that starts at `row`; the last one has fewer, those behind it less than one.
__device__ inline int64_t rows_from(int64_t row, int64_t tokens, int64_t size) {
  return smaller(size, tokens - row);
}

struct Moments {  // sums of distances from an origin and of their squares
  double sum;
  double square;

  // of rows whose own origin is `shift` away
  __device__ void add(double other_sum, double other_square, double rows, double shift) {
    sum += other_sum + rows * shift;
    square += other_square + shift * (2.0 * other_sum + rows * shift);
  }
  // The sum of squared distances from the mean; rounding could make it negative, NaN stays.
  __device__ double centred(double rows) const {
    const double value = square - sum * sum / rows;
    return value < 0.0 ? 0.0 : value;
  }
};

__device__ inline float median(float a, float b, float c) {
  return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    block_moments(const Matrix x, const bool aligned, const int64_t tokens, const int64_t cols,
                  const int64_t tiles, const int64_t* __restrict__ count, const Workspace out) {
  __shared__ float shared_origins[kWarps][kColumnsPerBlock];
  __shared__ float shared_sums[kWarps][kColumnsPerBlock];
  __shared__ float shared_squares[kWarps][kColumnsPerBlock];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.before = *count;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t tiles_across = ceil_div(cols, kColumnsPerBlock);
    const int64_t row_block = tile / tiles_across, first_col = tile % tiles_across * kColumnsPerBlock;
    const int64_t first_row = row_block * kRowsPerBlock;
    const int64_t col = first_col + lane * kChunk, width = cols - col;
    float origins[kChunk] = {}, sums[kChunk] = {}, squares[kChunk] = {};
    int64_t row = first_row + warp * kRowsPerWarp;
    const int64_t end_row = smaller(tokens, row + kRowsPerWarp);
    if (width > 0 && row < end_row) {
      float middle[kChunk], last[kChunk];
      convert(load_chunk(x, aligned, row, col, width), x.dtype, origins);
      convert(load_chunk(x, aligned, (row + end_row) / 2, col, width), x.dtype, middle);
      convert(load_chunk(x, aligned, end_row - 1, col, width), x.dtype, last);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) origins[k] = median(origins[k], middle[k], last[k]);
      const auto add = [&](const Chunk& chunk) {
        float values[kChunk];
        convert(chunk, x.dtype, values);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const float distance = values[k] - origins[k];
          sums[k] += distance;
          squares[k] += distance * distance;
        }
      };
      for (; aligned && width >= kChunk && row + kInFlight <= end_row; row += kInFlight) {
        Chunk chunks[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) chunks[k] = load_chunk(x, true, row + k, col, kChunk);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) add(chunks[k]);
      }
      for (; row < end_row; ++row) add(load_chunk(x, aligned, row, col, width));
    }
    // lanes next to each other write words next to each other: no bank conflicts
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      shared_origins[warp][k * kWarp + lane] = origins[k];
      shared_sums[warp][k * kWarp + lane] = sums[k];
      shared_squares[warp][k * kWarp + lane] = squares[k];
    }
    __syncthreads();
    const int slot = threadIdx.x;  // one column per thread
    const int64_t out_col = first_col + slot % kWarp * kChunk + slot / kWarp;
    if (out_col < cols) {
      const double origin = shared_origins[0][slot];
      Moments moments = {0.0, 0.0};
      for (int w = 0; w < kWarps; ++w) {
        const int64_t rows = rows_from(first_row + w * kRowsPerWarp, tokens, kRowsPerWarp);
        if (rows <= 0) break;
        const double shift = double(shared_origins[w][slot]) - origin;
        moments.add(shared_sums[w][slot], shared_squares[w][slot], double(rows), shift);
      }
      const double rows = double(rows_from(first_row, tokens, kRowsPerBlock));
      out.means[row_block * cols + out_col] = origin + moments.sum / rows;
      out.second_moments[row_block * cols + out_col] = static_cast<float>(moments.centred(rows));
    }
    __syncthreads();  // before the next tile
  }
}

// A lane per column; the warps share its blocks of rows.
__global__ void __launch_bounds__(kThreads)
    merge_blocks(const Workspace blocks, const int64_t tokens, const int64_t cols, const int64_t row_blocks,
                 double* __restrict__ mean, double* __restrict__ m2, int64_t* __restrict__ count) {
  __shared__ double shared[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double before = double(*blocks.before), added = double(tokens);
  if (blockIdx.x == 0 && threadIdx.x == 0) *count = *blocks.before + tokens;
  for (int64_t first_col = int64_t(blockIdx.x) * kWarp; first_col < cols;
       first_col += int64_t(gridDim.x) * kWarp) {
    const int64_t col = first_col + lane;
    const bool exists = col < cols;
    const double origin = exists ? blocks.means[col] : 0.0;
    Moments moments = {0.0, 0.0};
    if (exists) {
#pragma unroll 4
      for (int64_t block = warp; block < row_blocks; block += kWarps) {
        const double rows = double(rows_from(block * kRowsPerBlock, tokens, kRowsPerBlock));
        const double shift = blocks.means[block * cols + col] - origin;
        moments.add(0.0, double(blocks.second_moments[block * cols + col]), rows, shift);
      }
    }
    moments.sum = sum_over_warps<kWarps>(moments.sum, shared);
    moments.square = sum_over_warps<kWarps>(moments.square, shared);
    if (warp == 0 && exists) {
      const double delta = origin + moments.sum / added - mean[col], share = added / (before + added);
      mean[col] += delta * share;
      m2[col] += moments.centred(added) + delta * delta * before * share;
    }
  }
}

}  // namespace
}  // namespace adapt_pruner::cuda

int64_t ap_cuda_activation_workspace_bytes(int64_t tokens, int64_t cols) {
  const int64_t row_blocks = adapt_pruner::cuda::ceil_div(tokens, adapt_pruner::cuda::kRowsPerBlock);
  return int64_t(sizeof(int64_t)) + row_blocks * cols * int64_t(sizeof(double) + sizeof(float));
}

int ap_cuda_activation_stats(adapt_pruner::Matrix x, int64_t tokens, int64_t cols, double* mean, double* m2,
                             int64_t* count, void* workspace, void* stream) {
  using namespace adapt_pruner::cuda;
  const int64_t row_blocks = ceil_div(tokens, kRowsPerBlock);
  const Workspace blocks = workspace_of(workspace, row_blocks, cols);
  const int64_t tiles = row_blocks * ceil_div(cols, kColumnsPerBlock);
  const int error = launch_persistent(block_moments, kThreads, tiles, stream, x, rows_aligned(x), tokens,
                                      cols, tiles, count, blocks);
  if (error != cudaSuccess) return error;
  return launch_persistent(merge_blocks, kThreads, ceil_div(cols, kWarp), stream, blocks, tokens, cols,
                           row_blocks, mean, m2, count);
}
