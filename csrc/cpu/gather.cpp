// Gathering of kept units. Where runs of kept elements are long (rows, attention heads) they are copied one
// by one; where they are short (single channels) the elements of a row are compressed eight at a time.
#include <algorithm>
#include <vector>

#include "values.h"

namespace adapt_pruner::cpu {
namespace {

struct Run {  // consecutive kept indices along the unit dimension
  int64_t source;
  int64_t length;
};

constexpr int64_t kMinRunBytes = 256;      // shorter runs cost more to copy one by one than to compress
constexpr int64_t kStreamBytes = 4 << 20;  // smaller outputs are left in the caches for whoever reads them

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

// What is kept of one member. Threads share it.
struct Plan {
  GatherMember member;
  const int64_t* keep;
  int64_t kept_rows;
  int64_t kept_cols;
  bool stream;
  std::vector<Run> runs;              // of columns
  std::vector<uint8_t> column_masks;  // a bit per column

  const char* source_row(int64_t row) const {
    return static_cast<const char*>(member.source) + row * member.source_row_stride * member.element_size;
  }
  char* target_row(int64_t row) const {
    return static_cast<char*>(member.target) + row * kept_cols * member.element_size;
  }
  int64_t source_row_of(int64_t kept_row) const {
    return keep[kept_row / member.group_size] * member.group_size + kept_row % member.group_size;
  }
};

// For each set of kept elements among eight, which ones they are: in front and in order, then zeros.
struct Kept {
  alignas(32) uint32_t index[256][8];
  alignas(16) uint8_t bytes_of_words[256][16];
};
constexpr Kept kept_of_eight() {
  Kept table = {};
  for (int mask = 0; mask < 256; ++mask) {
    int kept = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if ((mask >> bit & 1) == 0) continue;
      table.index[mask][kept] = uint32_t(bit);
      table.bytes_of_words[mask][2 * kept] = uint8_t(2 * bit);
      table.bytes_of_words[mask][2 * kept + 1] = uint8_t(2 * bit + 1);
      ++kept;
    }
  }
  return table;
}
constexpr Kept kKept = kept_of_eight();

#define AP_KERNELS "gather_kernels.h"
#include "each_isa.h"

using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end);

Kernel choose_columns(int32_t element_size) {
  switch (element_size) {
    case 1: return AP_CHOOSE(compress_columns<uint8_t>);
    case 2: return AP_CHOOSE(compress_columns<uint16_t>);
    case 4: return AP_CHOOSE(compress_columns<uint32_t>);
    default: return AP_CHOOSE(compress_columns<uint64_t>);
  }
}

std::vector<uint8_t> masks_of(const std::vector<Run>& runs, int64_t cols) {
  std::vector<uint8_t> masks(size_t(cols / 8 + 1), 0);
  for (const Run& run : runs) {
    for (int64_t c = run.source; c < run.source + run.length; ++c) {
      masks[size_t(c / 8)] |= uint8_t(1 << c % 8);
    }
  }
  return masks;
}

void gather_member(const GatherMember& member, const int64_t* keep, int64_t kept,
                   ApParallelFor parallel_for) {
  const bool by_rows = member.dim == 0;
  const int64_t kept_indices = kept * member.group_size;
  Plan plan = {
      member, keep, by_rows ? kept_indices : member.rows, by_rows ? member.cols : kept_indices, false,
      {},     {}};
  plan.stream = plan.kept_rows * plan.kept_cols * member.element_size >= kStreamBytes;
  Kernel kernel = AP_CHOOSE(copy_rows);
  if (!by_rows) {
    plan.runs = runs_of(keep, kept, member.group_size);
    if (kept_indices * member.element_size >= int64_t(plan.runs.size()) * kMinRunBytes) {
      kernel = AP_CHOOSE(copy_column_runs);
    } else {
      plan.column_masks = masks_of(plan.runs, member.cols);
      kernel = choose_columns(member.element_size);
    }
  }
  run_parallel(parallel_for, plan.kept_rows, grain_for(plan.kept_cols),
               [&](int64_t begin, int64_t end) { kernel(plan, begin, end); });
}

}  // namespace
}  // namespace adapt_pruner::cpu

void ap_cpu_gather_units(const adapt_pruner::GatherMember* members, int64_t member_count, const int64_t* keep,
                         int64_t kept, ApParallelFor parallel_for) {
  if (kept == 0) return;
  for (int64_t m = 0; m < member_count; ++m) {
    if (members[m].rows == 0 || members[m].cols == 0) continue;
    adapt_pruner::cpu::gather_member(members[m], keep, kept, parallel_for);
  }
}
