// Gathering of kept units. Where runs of kept elements are long (rows, attention heads) they are copied one by
// one; where they are short (single channels) the elements of a row are compressed eight at a time.
#include <algorithm>
#include <vector>

#include "line_writer.h"
#include "simd.h"

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

template <class Word>
constexpr int64_t kBlockBytes = 8 * int64_t(sizeof(Word));

// Items are kept rows.
template <class Isa>
void copy_rows(const Plan& plan, int64_t begin, int64_t end) {
  const GatherMember& member = plan.member;
  const int64_t row_bytes = member.cols * member.element_size;
  const bool dense = member.source_row_stride == member.cols;
  LineWriter<Isa> writer(plan.target_row(begin), plan.stream);
  for (int64_t row = begin; row < end;) {
    const int64_t source = plan.source_row_of(row);
    int64_t count = 1;
    while (dense && row + count < end && plan.source_row_of(row + count) == source + count) ++count;
    writer.append(plan.source_row(source), count * row_bytes);
    row += count;
  }
  writer.finish();
}

// Items are rows.
template <class Isa>
void copy_column_runs(const Plan& plan, int64_t begin, int64_t end) {
  const int64_t size = plan.member.element_size;
  LineWriter<Isa> writer(plan.target_row(begin), plan.stream);
  for (int64_t row = begin; row < end; ++row) {
    const char* source = plan.source_row(row);
    for (const Run& run : plan.runs) writer.append(source + run.source * size, run.length * size);
  }
  writer.finish();
}

// Items are rows. Reads no element behind a row's end.
template <class Isa, class Word>
void compress_columns(const Plan& plan, int64_t begin, int64_t end) {
  LineWriter<Isa> writer(plan.target_row(begin), plan.stream);
  const auto compress = [&](const Word* source, const uint8_t* masks, int64_t blocks) {
    Word* target = reinterpret_cast<Word*>(writer.position());
    const Word* target_end = Compress<Isa, Word>::blocks(source, masks, blocks, target);
    writer.advance((target_end - target) * int64_t(sizeof(Word)));
    if (writer.room() < kBlockBytes<Word>) writer.flush();
  };
  const int64_t blocks = plan.member.cols / 8;
  const int64_t rest = plan.member.cols % 8;
  const uint8_t* masks = plan.column_masks.data();
  for (int64_t row = begin; row < end; ++row) {
    const Word* source = reinterpret_cast<const Word*>(plan.source_row(row));
    for (int64_t block = 0; block < blocks;) {
      const int64_t fitting = std::min(blocks - block, writer.room() / kBlockBytes<Word>);
      compress(source + block * 8, masks + block, fitting);
      block += fitting;
    }
    if (rest > 0) {
      Word last[8] = {};
      std::memcpy(last, source + blocks * 8, size_t(rest) * sizeof(Word));
      compress(last, masks + blocks, 1);
    }
  }
  writer.finish();
}

using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end);

template <class Word>
Kernel columns_of() {
  return use_avx2() ? compress_columns<Avx2, Word> : compress_columns<Baseline, Word>;
}

Kernel choose_columns(int32_t element_size) {
  switch (element_size) {
    case 1: return columns_of<uint8_t>();
    case 2: return columns_of<uint16_t>();
    case 4: return columns_of<uint32_t>();
    default: return columns_of<uint64_t>();
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
  Plan plan = {member, keep, by_rows ? kept_indices : member.rows, by_rows ? member.cols : kept_indices,
               false,  {},   {}};
  plan.stream = plan.kept_rows * plan.kept_cols * member.element_size >= kStreamBytes;
  Kernel kernel = use_avx2() ? copy_rows<Avx2> : copy_rows<Baseline>;
  if (!by_rows) {
    plan.runs = runs_of(keep, kept, member.group_size);
    if (kept_indices * member.element_size >= int64_t(plan.runs.size()) * kMinRunBytes) {
      kernel = use_avx2() ? copy_column_runs<Avx2> : copy_column_runs<Baseline>;
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
