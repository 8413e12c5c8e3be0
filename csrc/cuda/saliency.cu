// Unit importance on the GPU. Per member: one score per index of the unit dimension (rows: a block each;
// columns: partial sums of fixed blocks of rows, then their sum), then the indices of each unit are added to
// its score. No atomics: every sum has one order, given by the shape.
#include "common.cuh"

namespace adapt_pruner::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kColumnLanes = 32;                         // threads along the columns, kChunk columns each
constexpr int kRowLanes = 8;                             // threads along the rows
constexpr int kColumnsPerBlock = kColumnLanes * kChunk;  // 256
constexpr int kRowsPerBlock = 128;                       // 16 per thread
constexpr int kColumnBlocksPerSm = 3;  // leaves registers for the loads of every mode without spilling
constexpr int kFoldThreads = 256;

// evaluated on the host, so that device code does not call host functions
template <Mode mode>
constexpr bool kReadsGrad = reads_grad(mode);
template <Mode mode>
constexpr bool kReadsFisher = reads_fisher(mode);

template <Mode mode>
__device__ inline float element(float w, float g, float h) {
  if constexpr (mode == kFirst) return fabsf(w * g);
  if constexpr (mode == kVectorize) return w * g;
  if constexpr (mode == kSecond) return fabsf(w * h * w);
  if constexpr (mode == kMixed) return fabsf(w * g - 0.5f * (w * h * w));
  if constexpr (mode == kMagnitudeL1) return fabsf(w);
  return w * w;
}

// elements[k] of one row from column `col` on, 0 beyond the end
template <Mode mode>
__device__ inline void load_elements(const ImportanceMember& member, bool aligned, int64_t row, int64_t col,
                                     float* elements) {
  const int count = static_cast<int>(smaller(kChunk, member.cols - col));
  float w[kChunk], g[kChunk] = {}, h[kChunk] = {};
  load_chunk(member.weight, aligned, row * member.weight.row_stride + col, count, w);
  if constexpr (kReadsGrad<mode>)
    load_chunk(member.grad, aligned, row * member.grad.row_stride + col, count, g);
  if constexpr (kReadsFisher<mode>) {
    load_chunk(member.fisher, aligned, row * member.fisher.row_stride + col, count, h);
  }
#pragma unroll
  for (int k = 0; k < kChunk; ++k) elements[k] = element<mode>(w[k], g[k], h[k]);
}

template <Mode mode>
__global__ void __launch_bounds__(kRowThreads)
    row_scores(const ImportanceMember member, const bool aligned, float* __restrict__ index_scores) {
  __shared__ float shared[kRowThreads / kWarp];
  const int64_t row = blockIdx.x;
  float sum = 0.0f;
  for (int64_t col = int64_t(threadIdx.x) * kChunk; col < member.cols; col += kRowThreads * kChunk) {
    float e[kChunk];
    load_elements<mode>(member, aligned, row, col, e);
    sum += ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
  }
  sum = block_sum<kRowThreads>(sum, shared);
  if (threadIdx.x == 0) index_scores[row] = mode == kVectorize ? fabsf(sum) : sum;
}

// partial_sums: [row blocks, cols]
template <Mode mode>
__global__ void __launch_bounds__(kColumnLanes* kRowLanes, kColumnBlocksPerSm)
    column_partial_sums(const ImportanceMember member, const bool aligned, float* __restrict__ partial_sums) {
  __shared__ float shared[kRowLanes][kColumnsPerBlock];
  const int64_t first_col = int64_t(blockIdx.x) * kColumnsPerBlock;
  const int64_t col = first_col + int64_t(threadIdx.x) * kChunk;
  const int64_t row_block = blockIdx.y;
  const int64_t last_row = smaller(member.rows, (row_block + 1) * kRowsPerBlock);
  float sums[kChunk] = {};
  if (col < member.cols) {
    for (int64_t row = row_block * kRowsPerBlock + threadIdx.y; row < last_row; row += kRowLanes) {
      float e[kChunk];
      load_elements<mode>(member, aligned, row, col, e);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) sums[k] += e[k];
    }
  }
  // lanes next to each other write words next to each other: no bank conflicts
#pragma unroll
  for (int k = 0; k < kChunk; ++k) shared[threadIdx.y][k * kColumnLanes + threadIdx.x] = sums[k];
  __syncthreads();
  const int slot = threadIdx.y * kColumnLanes + threadIdx.x;  // one column per thread of the block
  const int64_t out_col = first_col + (slot % kColumnLanes) * kChunk + slot / kColumnLanes;
  float sum = 0.0f;
#pragma unroll
  for (int lane = 0; lane < kRowLanes; ++lane) sum += shared[lane][slot];
  if (out_col < member.cols) partial_sums[row_block * member.cols + out_col] = sum;
}

__global__ void __launch_bounds__(kFoldThreads)
    column_scores(const float* __restrict__ partial_sums, const int64_t row_blocks, const int64_t cols,
                  const bool absolute, float* __restrict__ index_scores) {
  const int64_t col = int64_t(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (col >= cols) return;
  double sum = 0.0;
  for (int64_t row_block = 0; row_block < row_blocks; ++row_block)
    sum += partial_sums[row_block * cols + col];
  index_scores[col] = static_cast<float>(absolute ? fabs(sum) : sum);
}

// A warp per unit adds up the unit's indices.
__global__ void __launch_bounds__(kFoldThreads)
    add_unit_scores(const float* __restrict__ index_scores, const int64_t units, const int64_t group_size,
                    const bool first_member, float* __restrict__ scores) {
  const int64_t unit = int64_t(blockIdx.x) * (kFoldThreads / kWarp) + threadIdx.x / kWarp;
  if (unit >= units) return;  // whole warps only
  double sum = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < group_size; i += kWarp)
    sum += index_scores[unit * group_size + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) scores[unit] = static_cast<float>(first_member ? sum : scores[unit] + sum);
}

int64_t unit_axis_length(const ImportanceMember& member) {
  return member.dim == 0 ? member.rows : member.cols;
}

template <Mode mode>
int launch_index_scores(const ImportanceMember& member, float* index_scores, float* partial_sums,
                        void* stream) {
  const bool aligned = rows_aligned(member.weight) && (!kReadsGrad<mode> || rows_aligned(member.grad)) &&
                       (!kReadsFisher<mode> || rows_aligned(member.fisher));
  if (member.dim == 0) {
    if (member.rows > kMaxGridX) return cudaErrorInvalidValue;
    AP_LAUNCH(row_scores<mode>, static_cast<unsigned>(member.rows), kRowThreads, stream, member, aligned,
              index_scores);
    return cudaGetLastError();
  }
  const int64_t row_blocks = ceil_div(member.rows, kRowsPerBlock);
  if (row_blocks > kMaxGridY) return cudaErrorInvalidValue;  // over 8 million rows
  if (row_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(member.cols, kColumnsPerBlock)),
                    static_cast<unsigned>(row_blocks));
    AP_LAUNCH(column_partial_sums<mode>, grid, dim3(kColumnLanes, kRowLanes), stream, member, aligned,
              partial_sums);
    const int error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  AP_LAUNCH(column_scores, static_cast<unsigned>(ceil_div(member.cols, kFoldThreads)), kFoldThreads, stream,
            partial_sums, row_blocks, member.cols, mode == kVectorize, index_scores);
  return cudaGetLastError();
}

int launch_mode(Mode mode, const ImportanceMember& member, float* index_scores, float* partial_sums,
                void* stream) {
  switch (mode) {
    case kVectorize: return launch_index_scores<kVectorize>(member, index_scores, partial_sums, stream);
    case kSecond: return launch_index_scores<kSecond>(member, index_scores, partial_sums, stream);
    case kMixed: return launch_index_scores<kMixed>(member, index_scores, partial_sums, stream);
    case kMagnitudeL1: return launch_index_scores<kMagnitudeL1>(member, index_scores, partial_sums, stream);
    case kMagnitudeL2: return launch_index_scores<kMagnitudeL2>(member, index_scores, partial_sums, stream);
    default: return launch_index_scores<kFirst>(member, index_scores, partial_sums, stream);
  }
}

}  // namespace
}  // namespace adapt_pruner::cuda

// Scratch of the largest member: its index scores, then its partial column sums.
int64_t ap_cuda_importance_scratch_floats(const adapt_pruner::ImportanceMember* members,
                                          int64_t member_count) {
  using namespace adapt_pruner::cuda;
  int64_t largest = 0;
  for (int64_t m = 0; m < member_count; ++m) {
    int64_t floats = unit_axis_length(members[m]);
    if (members[m].dim == 1) floats += ceil_div(members[m].rows, kRowsPerBlock) * members[m].cols;
    largest = floats > largest ? floats : largest;
  }
  return largest;
}

int ap_cuda_unit_importance(const adapt_pruner::ImportanceMember* members, int64_t member_count, int32_t mode,
                            int64_t units, float* scores, float* scratch, void* stream) {
  using namespace adapt_pruner::cuda;
  if (units == 0) return cudaSuccess;
  for (int64_t m = 0; m < member_count; ++m) {
    float* partial_sums = scratch + unit_axis_length(members[m]);
    int error = launch_mode(adapt_pruner::Mode(mode), members[m], scratch, partial_sums, stream);
    if (error != cudaSuccess) return error;
    AP_LAUNCH(add_unit_scores, static_cast<unsigned>(ceil_div(units, kFoldThreads / kWarp)), kFoldThreads,
              stream, scratch, units, members[m].group_size, m == 0, scores);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
