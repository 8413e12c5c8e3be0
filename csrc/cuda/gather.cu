// Gathering of kept units on the GPU, in the widest words (up to 16 bytes) that alignment and group size
// allow.
#include "common.cuh"

namespace adapt_pruner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 8;  // of a column gather: the source column is worked out once for all of them

// A member counted in words instead of elements.
template <class Word>
struct Words {
  const Word* source;
  Word* target;
  int64_t source_row_stride;
  int64_t rows;
  int64_t kept_cols;
  int64_t group_size;
};

// Blocks are numbered along the columns first, so that a grid of one dimension is enough.
struct Position {
  int64_t row_step;
  int64_t col;
};

__device__ inline Position position_of(int64_t kept_cols) {
  const int64_t col_blocks = ceil_div(kept_cols, kThreads);
  const int64_t block = blockIdx.x;
  return {block / col_blocks, block % col_blocks * kThreads + threadIdx.x};
}

// index along the unit dimension: kept -> source
__device__ inline int64_t source_index(const int64_t* keep, int64_t group_size, int64_t index) {
  return keep[index / group_size] * group_size + index % group_size;
}

// rows are the kept ones, kept_cols are all columns
template <class Word>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const Words<Word> member, const int64_t* __restrict__ keep) {
  const Position at = position_of(member.kept_cols);
  if (at.col >= member.kept_cols) return;
  const int64_t source_row = source_index(keep, member.group_size, at.row_step);
  member.target[at.row_step * member.kept_cols + at.col] =
      member.source[source_row * member.source_row_stride + at.col];
}

template <class Word>
__global__ void __launch_bounds__(kThreads)
    gather_columns(const Words<Word> member, const int64_t* __restrict__ keep) {
  const Position at = position_of(member.kept_cols);
  if (at.col >= member.kept_cols) return;
  const int64_t source_col = source_index(keep, member.group_size, at.col);
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int64_t row = at.row_step * kRowsPerThread + k;
    if (row < member.rows) {
      member.target[row * member.kept_cols + at.col] =
          member.source[row * member.source_row_stride + source_col];
    }
  }
}

template <class Word>
int launch_words(const GatherMember& member, const int64_t* keep, int64_t kept, void* stream) {
  const int64_t per_word = int64_t(sizeof(Word)) / member.element_size;
  Words<Word> words = {static_cast<const Word*>(member.source),
                       static_cast<Word*>(member.target),
                       member.source_row_stride / per_word,
                       0,
                       0,
                       0};
  const bool by_rows = member.dim == 0;
  if (by_rows) {
    words.rows = kept * member.group_size;
    words.kept_cols = member.cols / per_word;
    words.group_size = member.group_size;
  } else {
    words.rows = member.rows;
    words.group_size = member.group_size / per_word;
    words.kept_cols = kept * words.group_size;
  }
  const int64_t row_steps = by_rows ? words.rows : ceil_div(words.rows, kRowsPerThread);
  const int64_t blocks = row_steps * ceil_div(words.kept_cols, kThreads);
  if (blocks > kMaxGridX) return cudaErrorInvalidValue;
  const unsigned grid = static_cast<unsigned>(blocks);
  if (by_rows) {
    AP_LAUNCH(gather_rows<Word>, grid, kThreads, stream, words, keep);
  } else {
    AP_LAUNCH(gather_columns<Word>, grid, kThreads, stream, words, keep);
  }
  return cudaGetLastError();
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

int launch_member(const GatherMember& member, const int64_t* keep, int64_t kept, void* stream) {
  if (fits(member, 16)) return launch_words<Vector16>(member, keep, kept, stream);
  if (fits(member, 8)) return launch_words<uint64_t>(member, keep, kept, stream);
  if (fits(member, 4)) return launch_words<uint32_t>(member, keep, kept, stream);
  if (fits(member, 2)) return launch_words<uint16_t>(member, keep, kept, stream);
  return launch_words<uint8_t>(member, keep, kept, stream);
}

}  // namespace
}  // namespace adapt_pruner::cuda

int ap_cuda_gather_units(const adapt_pruner::GatherMember* members, int64_t member_count, const int64_t* keep,
                         int64_t kept, void* stream) {
  for (int64_t m = 0; m < member_count; ++m) {
    if (kept == 0 || members[m].rows == 0 || members[m].cols == 0) continue;
    const int error = adapt_pruner::cuda::launch_member(members[m], keep, kept, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
