// Gathering of kept units on the GPU: all tensors of a call in one launch, each in the widest words (up to 16
// bytes) that its alignment and group size allow. Blocks find their tile in a table of the tensors.
//
// Kept columns that are no runs of words still read every sector of the source that holds one of them: single
// columns out of random places cost a read of nearly the whole source.
#include <cstring>
#include <vector>

#include "common.cuh"

namespace adapt_pruner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 4;
constexpr int64_t kTileColumns = kWarp;  // words
constexpr int kBytesPerThread = 128;     // of a tile: words of rows next to each other in one column

__host__ __device__ constexpr int rows_per_warp(int word_bytes) { return kBytesPerThread / word_bytes; }

// A member counted in words instead of elements; `rows` and `cols` are those of the target.
struct Task {
  const void* source;
  void* target;
  int64_t source_row_stride;
  int64_t rows;
  int64_t cols;
  int64_t group_size;
  int64_t first_tile;
  bool by_rows;
  int32_t word_bytes;
};

// A kept index along the unit dimension, and those after it.
struct KeptIndex {
  const int64_t* __restrict__ keep;
  int64_t group_size;
  int64_t unit;
  int64_t within;

  __device__ KeptIndex(const int64_t* keep, int64_t group_size, int64_t index)
      : keep(keep), group_size(group_size), unit(group_size == 1 ? index : index / group_size) {
    within = index - unit * group_size;
  }
  __device__ int64_t in_source() const { return keep[unit] * group_size + within; }
  __device__ void advance() {
    if (++within < group_size) return;
    within = 0;
    ++unit;
  }
};

template <class Word, bool kByRows>
__device__ inline void gather_tile(const Task& task, const int64_t* __restrict__ keep, int64_t tile) {
  constexpr int kInFlight = sizeof(Word) > 4 ? 4 : 8;  // loads of a thread before its first store
  constexpr int kRows = rows_per_warp(sizeof(Word));
  const int64_t cols = task.cols, source_row_stride = task.source_row_stride;
  const int64_t tiles_across = ceil_div(cols, kTileColumns);
  const int64_t col = tile % tiles_across * kTileColumns + threadIdx.x % kWarp;
  const int64_t first_row = (tile / tiles_across * kWarps + threadIdx.x / kWarp) * kRows;
  if (col >= cols || first_row >= task.rows) return;
  const int rows = static_cast<int>(smaller(kRows, task.rows - first_row));
  KeptIndex kept(keep, task.group_size, kByRows ? first_row : col);
  const Word* source = in_global(static_cast<const Word*>(task.source)) +
                       (kByRows ? col : first_row * source_row_stride + kept.in_source());
  Word* target = in_global(static_cast<Word*>(task.target)) + first_row * cols + col;
  const auto load = [&] {
    if constexpr (kByRows) {
      const Word word = source[kept.in_source() * source_row_stride];
      kept.advance();
      return word;
    } else {
      const Word word = *source;
      source += source_row_stride;
      return word;
    }
  };
  const auto store = [&](const Word& word) {
    *target = word;
    target += cols;
  };
  int row = 0;
  for (; row + kInFlight <= rows; row += kInFlight) {
    Word words[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) words[k] = load();
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) store(words[k]);
  }
  for (; row < rows; ++row) store(load());
}

template <class Word>
__device__ inline void gather_tile(const Task& task, const int64_t* __restrict__ keep, int64_t tile) {
  if (task.by_rows) {
    gather_tile<Word, true>(task, keep, tile);
  } else {
    gather_tile<Word, false>(task, keep, tile);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gather(const Task* __restrict__ tasks, const int64_t task_count, const int64_t* __restrict__ keep,
           const int64_t tiles) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Task& task = entry_of<&Task::first_tile>(tasks, task_count, tile);
    const int64_t tile_of_task = tile - task.first_tile;
    switch (task.word_bytes) {
      case 16: gather_tile<Vector16>(task, keep, tile_of_task); break;
      case 8: gather_tile<uint64_t>(task, keep, tile_of_task); break;
      case 4: gather_tile<uint32_t>(task, keep, tile_of_task); break;
      case 2: gather_tile<uint16_t>(task, keep, tile_of_task); break;
      default: gather_tile<uint8_t>(task, keep, tile_of_task);
    }
  }
}

// Words must divide the unit (columns) or the row (rows), and every row must start at a multiple of a word.
bool fits(const GatherMember& member, int64_t word_bytes) {
  const int64_t size = member.element_size;
  const int64_t unbroken = (member.dim == 0 ? member.cols : member.group_size) * size;
  return word_bytes >= size && unbroken % word_bytes == 0 &&
         member.source_row_stride * size % word_bytes == 0 &&
         reinterpret_cast<uintptr_t>(member.source) % uintptr_t(word_bytes) == 0 &&
         reinterpret_cast<uintptr_t>(member.target) % uintptr_t(word_bytes) == 0;
}

Task task_of(const GatherMember& member, int64_t kept) {
  int32_t word_bytes = 16;
  while (!fits(member, word_bytes)) word_bytes /= 2;  // down to an element, which always fits
  const int64_t per_word = word_bytes / member.element_size;
  Task task = {};
  task.source = member.source;
  task.target = member.target;
  task.source_row_stride = member.source_row_stride / per_word;
  task.by_rows = member.dim == 0;
  task.word_bytes = word_bytes;
  if (task.by_rows) {
    task.group_size = member.group_size;
    task.rows = kept * member.group_size;
    task.cols = member.cols / per_word;
  } else {
    task.group_size = member.group_size / per_word;
    task.rows = member.rows;
    task.cols = kept * task.group_size;
  }
  return task;
}

}  // namespace
}  // namespace adapt_pruner::cuda

// The table, then keep.
int64_t ap_cuda_gather_workspace_bytes(int64_t member_count, int64_t kept) {
  return member_count * int64_t(sizeof(adapt_pruner::cuda::Task)) + kept * int64_t(sizeof(int64_t));
}

int ap_cuda_gather_units(const adapt_pruner::GatherMember* members, int64_t member_count, const int64_t* keep,
                         int64_t kept, void* workspace, void* stream) {
  using namespace adapt_pruner::cuda;
  std::vector<Task> tasks;
  int64_t tiles = 0;
  for (int64_t m = 0; m < member_count; ++m) {
    if (kept == 0 || members[m].rows == 0 || members[m].cols == 0) continue;
    Task task = task_of(members[m], kept);
    task.first_tile = tiles;
    tiles += ceil_div(task.rows, kWarps * rows_per_warp(task.word_bytes)) * ceil_div(task.cols, kTileColumns);
    tasks.push_back(task);
  }
  if (tiles == 0) return cudaSuccess;
  const size_t table_bytes = tasks.size() * sizeof(Task), keep_bytes = size_t(kept) * sizeof(int64_t);
  std::vector<char> uploaded(table_bytes + keep_bytes);
  std::memcpy(uploaded.data(), tasks.data(), table_bytes);
  std::memcpy(uploaded.data() + table_bytes, keep, keep_bytes);
  const int error = ap_cuda_upload(workspace, uploaded.data(), int64_t(uploaded.size()), stream);
  if (error != cudaSuccess) return error;
  const Task* device_tasks = static_cast<const Task*>(workspace);
  const int64_t* device_keep = reinterpret_cast<const int64_t*>(device_tasks + tasks.size());
  return launch_persistent(gather, kThreads, tiles, stream, device_tasks, int64_t(tasks.size()), device_keep,
                           tiles);
}
