// Unit importance on the GPU, of all members of all sets in three launches, however many they are:
//
//   tile_sums      sums of saliency along the rows (columns) within fixed tiles of the members
//   index_scores   their sums over the tiles: one score per index of a member's unit dimension
//   unit_scores    sums over the indices of each unit and the members of its set
//
// Blocks find their work in a table of the members. No atomics: every sum has one order, given by the shape.
#include <cstring>
#include <vector>

#include "common.cuh"

namespace adapt_pruner::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpColumns = kWarp * kChunk;  // a row of chunks next to each other: 256 columns
constexpr int kBlocksPerSm = 5;               // leaves 96 registers, enough for the loads of every mode

// Summed along its rows, a tile is low and wide; along its columns, high and narrow.
constexpr int64_t kRowTileRows = 16;
constexpr int64_t kRowTileColumns = 2048;
constexpr int64_t kColumnTileRows = 128;
constexpr int64_t kColumnTileColumns = kWarpColumns;

// A member, and where its work and its sums start among those of all members.
struct Task {
  ImportanceMember member;
  int64_t indices;        // along the unit dimension
  int64_t sums;           // of an index: one per tile that it crosses
  int64_t first_tile;
  int64_t first_sum;      // in the tile sums, [sums, indices] for each member
  int64_t first_index;    // in the index scores, [indices] for each member
  int64_t first_stretch;  // of kWarp indices
  bool aligned;
};

struct Set {
  int64_t first_unit;
  int64_t first_task;
  int64_t end_task;
};

// evaluated on the host, so that device code does not call host functions
template <Mode mode>
constexpr bool kReadsGrad = reads_grad(mode);
template <Mode mode>
constexpr bool kReadsFisher = reads_fisher(mode);
template <Mode mode>
constexpr int kSteps = kReadsGrad<mode> && kReadsFisher<mode>   ? 1  // whose loads are in flight together
                       : kReadsGrad<mode> || kReadsFisher<mode> ? 2
                                                                : 4;

// The part of a member that a block adds up; the matrices start at its first element.
struct Tile {
  Matrix weight, grad, fisher;
  int rows, cols;
  bool aligned;
};

template <Mode mode>
__device__ inline Tile tile_of(const Task& task, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  const ImportanceMember& member = task.member;
  Tile tile = {};
  tile.weight = from(member.weight, row, col);
  if constexpr (kReadsGrad<mode>) tile.grad = from(member.grad, row, col);
  if constexpr (kReadsFisher<mode>) tile.fisher = from(member.fisher, row, col);
  tile.rows = static_cast<int>(smaller(rows, member.rows - row));
  tile.cols = static_cast<int>(smaller(cols, member.cols - col));
  tile.aligned = task.aligned;
  return tile;
}

struct Chunks {  // of the matrices that a mode reads
  Chunk weight, grad, fisher;
};

template <Mode mode>
__device__ inline Chunks load_chunks(const Tile& tile, bool aligned, int row, int col, int count) {
  Chunks chunks;
  chunks.weight = load_chunk(tile.weight, aligned, row, col, count);
  if constexpr (kReadsGrad<mode>) chunks.grad = load_chunk(tile.grad, aligned, row, col, count);
  if constexpr (kReadsFisher<mode>) chunks.fisher = load_chunk(tile.fisher, aligned, row, col, count);
  return chunks;
}

template <Mode mode>
__device__ inline float saliency(float w, float g, float h) {
  if constexpr (mode == kFirst) return fabsf(w * g);
  if constexpr (mode == kVectorize) return w * g;
  if constexpr (mode == kSecond) return fabsf(w * h * w);
  if constexpr (mode == kMixed) return fabsf(w * g - 0.5f * (w * h * w));
  if constexpr (mode == kMagnitudeL1) return fabsf(w);
  return w * w;
}

template <Mode mode>
__device__ inline void saliencies(const Tile& tile, const Chunks& chunks, float* values) {
  float w[kChunk], g[kChunk] = {}, h[kChunk] = {};
  convert(chunks.weight, tile.weight.dtype, w);
  if constexpr (kReadsGrad<mode>) convert(chunks.grad, tile.grad.dtype, g);
  if constexpr (kReadsFisher<mode>) convert(chunks.fisher, tile.fisher.dtype, h);
#pragma unroll
  for (int k = 0; k < kChunk; ++k) values[k] = saliency<mode>(w[k], g[k], h[k]);
}

// A warp per row.
template <Mode mode>
__device__ inline void sum_rows(const Task& task, int64_t index, float* __restrict__ sums) {
  const int64_t tile_col = index % task.sums, first_row = index / task.sums * kRowTileRows;
  const Tile tile =
      tile_of<mode>(task, first_row, tile_col * kRowTileColumns, kRowTileRows, kRowTileColumns);
  sums += tile_col * task.member.rows + first_row;
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < tile.rows; row += kWarps) {
    float sum = 0.0f;
    const auto add = [&](const Chunks& chunks) {
      float e[kChunk];
      saliencies<mode>(tile, chunks, e);
      sum += ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    };
    int col = lane * kChunk;
    for (; tile.aligned && col + (kSteps<mode> - 1) * kWarpColumns + kChunk <= tile.cols;
         col += kSteps<mode> * kWarpColumns) {
      Chunks chunks[kSteps<mode>];
#pragma unroll
      for (int k = 0; k < kSteps<mode>; ++k)
        chunks[k] = load_chunks<mode>(tile, true, row, col + k * kWarpColumns, kChunk);
#pragma unroll
      for (int k = 0; k < kSteps<mode>; ++k) add(chunks[k]);
    }
    for (; col < tile.cols; col += kWarpColumns)
      add(load_chunks<mode>(tile, tile.aligned, row, col, tile.cols - col));
    sum = warp_sum(sum);
    if (lane == 0) sums[row] = sum;
  }
}

// Each thread adds up chunks of every kWarps-th row, then one column over the warps.
template <Mode mode>
__device__ inline void sum_columns(const Task& task, int64_t index, float (*shared)[kWarpColumns],
                                   float* __restrict__ sums) {
  const int64_t tiles_across = ceil_div(task.indices, kColumnTileColumns);
  const int64_t tile_row = index / tiles_across, first_col = index % tiles_across * kColumnTileColumns;
  const Tile tile =
      tile_of<mode>(task, tile_row * kColumnTileRows, first_col, kColumnTileRows, kColumnTileColumns);
  sums += tile_row * task.indices + first_col;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int col = lane * kChunk, count = tile.cols - col;
  const bool whole = tile.aligned && count >= kChunk;
  float lane_sums[kChunk] = {};
  const auto add = [&](const Chunks& chunks) {
    float e[kChunk];
    saliencies<mode>(tile, chunks, e);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) lane_sums[k] += e[k];
  };
  int row = warp;
  for (; whole && row + (kSteps<mode> - 1) * kWarps < tile.rows; row += kSteps<mode> * kWarps) {
    Chunks chunks[kSteps<mode>];
#pragma unroll
    for (int k = 0; k < kSteps<mode>; ++k)
      chunks[k] = load_chunks<mode>(tile, true, row + k * kWarps, col, kChunk);
#pragma unroll
    for (int k = 0; k < kSteps<mode>; ++k) add(chunks[k]);
  }
  for (; count > 0 && row < tile.rows; row += kWarps)
    add(load_chunks<mode>(tile, whole, row, col, count));
  // lanes next to each other write words next to each other: no bank conflicts
#pragma unroll
  for (int k = 0; k < kChunk; ++k) shared[warp][k * kWarp + lane] = lane_sums[k];
  __syncthreads();
  for (int slot = threadIdx.x; slot < kWarpColumns; slot += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w][slot];
    const int out_col = slot % kWarp * kChunk + slot / kWarp;
    if (out_col < tile.cols) sums[out_col] = sum;
  }
  __syncthreads();  // before the next tile
}

template <Mode mode>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    tile_sums(const Task* __restrict__ tasks, const int64_t task_count, const int64_t tiles,
              float* __restrict__ sums) {
  __shared__ float shared[kWarps][kWarpColumns];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Task& task = entry_of<&Task::first_tile>(tasks, task_count, tile);
    if (task.member.dim == 0) {
      sum_rows<mode>(task, tile - task.first_tile, sums + task.first_sum);
    } else {
      sum_columns<mode>(task, tile - task.first_tile, shared, sums + task.first_sum);
    }
  }
}

// A lane per index; the warps share its sums.
__global__ void __launch_bounds__(kThreads)
    index_scores(const Task* __restrict__ tasks, const int64_t task_count, const int64_t stretches,
                 const bool absolute, const float* __restrict__ sums, float* __restrict__ scores) {
  __shared__ double shared[kWarps][kWarp];
  for (int64_t stretch = blockIdx.x; stretch < stretches; stretch += gridDim.x) {
    const Task& task = entry_of<&Task::first_stretch>(tasks, task_count, stretch);
    const int64_t indices = task.indices, sums_per_index = task.sums;
    const int64_t index = (stretch - task.first_stretch) * kWarp + threadIdx.x % kWarp;
    const float* sums_of_index = sums + task.first_sum + index;
    double sum = 0.0;
    if (index < indices) {
#pragma unroll 4
      for (int64_t i = threadIdx.x / kWarp; i < sums_per_index; i += kWarps)
        sum += sums_of_index[i * indices];
    }
    sum = sum_over_warps<kWarps>(sum, shared);
    if (threadIdx.x < kWarp && index < indices)
      scores[task.first_index + index] = static_cast<float>(absolute ? fabs(sum) : sum);
  }
}

// A warp per unit.
__global__ void __launch_bounds__(kThreads)
    unit_scores(const Set* __restrict__ sets, const int64_t set_count, const Task* __restrict__ tasks,
                const float* __restrict__ index_scores, const int64_t units, float* __restrict__ scores) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; unit < units;
       unit += int64_t(gridDim.x) * kWarps) {
    const Set& set = entry_of<&Set::first_unit>(sets, set_count, unit);
    double score = 0.0;
    for (int64_t t = set.first_task; t < set.end_task; ++t) {
      const int64_t group_size = tasks[t].member.group_size;
      const float* indices = index_scores + tasks[t].first_index + (unit - set.first_unit) * group_size;
      double sum = 0.0;
      for (int64_t i = lane; i < group_size; i += kWarp) sum += indices[i];
      score += warp_sum(sum);
    }
    if (lane == 0) scores[unit] = static_cast<float>(score);
  }
}

// The tables, and how much there is to do and to store. Members without units have no work.
struct Work {
  std::vector<Task> tasks;
  std::vector<Set> sets;
  int64_t tiles = 0;
  int64_t sums = 0;
  int64_t indices = 0;
  int64_t stretches = 0;
};

Work work_of(const ImportanceMember* members, int64_t member_count) {
  Work work;
  for (const ImportanceMember* member = members; member != members + member_count; ++member) {
    const bool by_rows = member->dim == 0;
    const int64_t indices = by_rows ? member->rows : member->cols;
    if (indices == 0) continue;
    const int64_t sums = by_rows ? ceil_div(member->cols, kRowTileColumns)
                                 : ceil_div(member->rows, kColumnTileRows);
    const bool aligned =
        rows_aligned(member->weight) && rows_aligned(member->grad) && rows_aligned(member->fisher);
    const int64_t task = int64_t(work.tasks.size());
    work.tasks.push_back(
        {*member, indices, sums, work.tiles, work.sums, work.indices, work.stretches, aligned});
    work.tiles += sums * ceil_div(indices, by_rows ? kRowTileRows : kColumnTileColumns);
    work.sums += sums * indices;
    work.indices += indices;
    work.stretches += ceil_div(indices, kWarp);
    if (work.sets.empty() || work.sets.back().first_unit != member->first_unit)
      work.sets.push_back({member->first_unit, task, task});
    work.sets.back().end_task = task + 1;
  }
  return work;
}

// Where the parts of the workspace start, in bytes: the tables first, the floats behind them.
struct Layout {
  int64_t sets, sums, scores, end;
};

Layout layout_of(const Work& work) {
  Layout layout;
  layout.sets = int64_t(work.tasks.size() * sizeof(Task));
  layout.sums = layout.sets + int64_t(work.sets.size() * sizeof(Set));
  layout.scores = layout.sums + work.sums * int64_t(sizeof(float));
  layout.end = layout.scores + work.indices * int64_t(sizeof(float));
  return layout;
}

using TileSums = void (*)(const Task*, int64_t, int64_t, float*);

TileSums tile_sums_of(Mode mode) {
  switch (mode) {
    case kVectorize: return tile_sums<kVectorize>;
    case kSecond: return tile_sums<kSecond>;
    case kMixed: return tile_sums<kMixed>;
    case kMagnitudeL1: return tile_sums<kMagnitudeL1>;
    case kMagnitudeL2: return tile_sums<kMagnitudeL2>;
    default: return tile_sums<kFirst>;
  }
}

int upload(const Work& work, const Layout& layout, char* workspace, void* stream) {
  std::vector<char> tables(size_t(layout.sums));
  std::memcpy(tables.data(), work.tasks.data(), size_t(layout.sets));
  std::memcpy(tables.data() + layout.sets, work.sets.data(), size_t(layout.sums - layout.sets));
  return ap_cuda_upload(workspace, tables.data(), layout.sums, stream);
}

int launch(const Work& work, Mode mode, int64_t units, float* scores, char* workspace, void* stream) {
  const Layout layout = layout_of(work);
  int error = upload(work, layout, workspace, stream);
  if (error != cudaSuccess) return error;
  const Task* tasks = reinterpret_cast<const Task*>(workspace);
  const Set* sets = reinterpret_cast<const Set*>(workspace + layout.sets);
  float* sums = reinterpret_cast<float*>(workspace + layout.sums);
  float* scores_of_indices = reinterpret_cast<float*>(workspace + layout.scores);
  const int64_t task_count = int64_t(work.tasks.size()), set_count = int64_t(work.sets.size());
  if (work.tiles > 0) {
    error = launch_persistent(tile_sums_of(mode), kThreads, work.tiles, stream, tasks, task_count, work.tiles,
                              sums);
    if (error != cudaSuccess) return error;
  }
  error = launch_persistent(index_scores, kThreads, work.stretches, stream, tasks, task_count, work.stretches,
                            mode == kVectorize, sums, scores_of_indices);
  if (error != cudaSuccess) return error;
  return launch_persistent(unit_scores, kThreads, ceil_div(units, kWarps), stream, sets, set_count, tasks,
                           scores_of_indices, units, scores);
}

}  // namespace
}  // namespace adapt_pruner::cuda

int64_t ap_cuda_importance_workspace_bytes(const adapt_pruner::ImportanceMember* members,
                                           int64_t member_count) {
  using namespace adapt_pruner::cuda;
  return layout_of(work_of(members, member_count)).end;
}

int ap_cuda_unit_importance(const adapt_pruner::ImportanceMember* members, int64_t member_count, int32_t mode,
                            int64_t units, float* scores, void* workspace, void* stream) {
  using namespace adapt_pruner::cuda;
  if (units == 0) return cudaSuccess;
  return launch(work_of(members, member_count), adapt_pruner::Mode(mode), units, scores,
                static_cast<char*>(workspace), stream);
}
