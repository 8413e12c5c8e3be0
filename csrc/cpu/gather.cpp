// Gathering of kept units. Row units are copied run by run; column units run by run where runs are long
// (attention heads), element by element where they are short (single channels).
#include <vector>

#include "simd.h"

namespace adapt_pruner::cpu {
namespace {

struct Run {  // consecutive kept indices along the unit dimension
  int64_t source;
  int64_t length;
};

constexpr int64_t kMinRunBytes = 64;  // shorter runs cost more as calls of memcpy than element by element

std::vector<Run> runs_of(const int64_t* keep, int64_t kept, int64_t group_size) {
  std::vector<Run> runs;
  for (int64_t k = 0; k < kept; ++k) {
    if (k > 0 && keep[k] == keep[k - 1] + 1) {
      runs.back().length += group_size;
    } else {
      runs.push_back({keep[k] * group_size, group_size});
    }
  }
  return runs;
}

const char* source_row(const GatherMember& member, int64_t row) {
  return static_cast<const char*>(member.source) + row * member.source_row_stride * member.element_size;
}

void gather_rows(const GatherMember& member, const int64_t* keep, int64_t kept, ApParallelFor parallel_for) {
  const size_t row_bytes = size_t(member.cols) * size_t(member.element_size);
  const bool dense = member.source_row_stride == member.cols;
  const int64_t group_size = member.group_size;
  const auto source_index = [&](int64_t row) {
    return keep[row / group_size] * group_size + row % group_size;
  };
  run_parallel(parallel_for, kept * group_size, grain_for(member.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t source = source_index(row);
      int64_t length = 1;
      while (dense && row + length < end && source_index(row + length) == source + length) ++length;
      char* target = static_cast<char*>(member.target) + size_t(row) * row_bytes;
      std::memcpy(target, source_row(member, source), size_t(length) * row_bytes);
      row += length;
    }
  });
}

void gather_column_runs(const GatherMember& member, const std::vector<Run>& runs, int64_t kept_cols,
                        ApParallelFor parallel_for) {
  const size_t size = size_t(member.element_size);
  run_parallel(parallel_for, member.rows, grain_for(kept_cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* source = source_row(member, row);
      char* target = static_cast<char*>(member.target) + size_t(row * kept_cols) * size;
      for (const Run& run : runs) {
        const size_t bytes = size_t(run.length) * size;
        std::memcpy(target, source + size_t(run.source) * size, bytes);
        target += bytes;
      }
    }
  });
}

template <class Word>
void gather_column_elements(const GatherMember& member, const std::vector<int64_t>& columns,
                            ApParallelFor parallel_for) {
  const int64_t kept_cols = int64_t(columns.size());
  const int64_t* index = columns.data();
  run_parallel(parallel_for, member.rows, grain_for(kept_cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Word* source = static_cast<const Word*>(member.source) + row * member.source_row_stride;
      Word* target = static_cast<Word*>(member.target) + row * kept_cols;
      for (int64_t c = 0; c < kept_cols; ++c) target[c] = source[index[c]];
    }
  });
}

void gather_columns(const GatherMember& member, const int64_t* keep, int64_t kept,
                    ApParallelFor parallel_for) {
  const std::vector<Run> runs = runs_of(keep, kept, member.group_size);
  const int64_t kept_cols = kept * member.group_size;
  if (kept_cols * member.element_size >= int64_t(runs.size()) * kMinRunBytes) {
    gather_column_runs(member, runs, kept_cols, parallel_for);
    return;
  }
  std::vector<int64_t> columns;
  columns.reserve(size_t(kept_cols));
  for (const Run& run : runs) {
    for (int64_t i = 0; i < run.length; ++i) columns.push_back(run.source + i);
  }
  switch (member.element_size) {
    case 1: return gather_column_elements<uint8_t>(member, columns, parallel_for);
    case 2: return gather_column_elements<uint16_t>(member, columns, parallel_for);
    case 4: return gather_column_elements<uint32_t>(member, columns, parallel_for);
    default: return gather_column_elements<uint64_t>(member, columns, parallel_for);
  }
}

}  // namespace
}  // namespace adapt_pruner::cpu

void ap_cpu_gather_units(const adapt_pruner::GatherMember* members, int64_t member_count, const int64_t* keep,
                         int64_t kept, ApParallelFor parallel_for) {
  if (kept == 0) return;
  for (int64_t m = 0; m < member_count; ++m) {
    if (members[m].rows == 0 || members[m].cols == 0) continue;
    if (members[m].dim == 0) {
      adapt_pruner::cpu::gather_rows(members[m], keep, kept, parallel_for);
    } else {
      adapt_pruner::cpu::gather_columns(members[m], keep, kept, parallel_for);
    }
  }
}
