// Runs every CPU op, compiled with the address and undefined-behaviour sanitizers, without torch.
//
// Matrices of odd shapes lie in memory of their exact size: on the heap, where the sanitizer sees a byte too
// far, and against inaccessible pages, which also stop instructions it does not know. Row padding is NaN, and
// so is all that the kernels allocate. Results are compared with plain loops in double: exactly where the
// values are small integers, whose sums are exact in any order. Each case runs on one thread and, in pieces
// of random size, on several, and has to give the same bits.
//
//     driver [SECTION]      of kSections; in a process of its own per instruction set
#include <sys/wait.h>

#include "samples.h"

// Malloc fills its memory with NaN.
extern "C" const char* __asan_default_options() {
  return "max_malloc_fill_size=1073741824:malloc_fill_byte=255:strict_string_checks=1";
}

namespace {

// ---- unit importance ------------------------------------------------------------------------------------

struct Member {
  std::shared_ptr<Sample> weight, grad, fisher;
  int64_t group_size;
  int32_t dim;

  int64_t units() const { return (dim == 0 ? weight->rows : weight->cols) / group_size; }
};
using UnitSets = std::vector<std::vector<Member>>;

Member make_member(int32_t dtype, int64_t rows, int64_t cols, int64_t group_size, int32_t dim, Values kind) {
  const auto companion = [&] { return draw(0, 1) ? dtype : int32_t(kFloat32); };
  return {make_sample(dtype, rows, cols, kind), make_sample(companion(), rows, cols, kind),
          make_sample(companion(), rows, cols, kind), group_size, dim};
}

double element(Mode mode, double w, double g, double h) {
  switch (mode) {
    case kFirst: return std::fabs(w * g);
    case kVectorize: return w * g;
    case kSecond: return std::fabs(w * h * w);
    case kMixed: return std::fabs(w * g - 0.5 * (w * h * w));
    case kMagnitudeL1: return std::fabs(w);
    default: return w * w;
  }
}

void check_importance(const UnitSets& sets, Mode mode, Values kind) {
  ++case_count;
  std::vector<ImportanceMember> members;
  std::vector<double> expected, scale;
  current_case = "unit_importance mode " + std::to_string(mode);
  for (const auto& set : sets) {
    const int64_t first = int64_t(expected.size());
    expected.resize(size_t(first + set[0].units()), 0.0);
    scale.resize(expected.size(), 0.0);
    for (const Member& m : set) {
      const int64_t rows = m.weight->rows, cols = m.weight->cols;
      current_case += "; " + shape_text(*m.weight) + " dim " + std::to_string(m.dim) + " group size " +
                      std::to_string(m.group_size);
      members.push_back({m.weight->matrix(), reads_grad(mode) ? m.grad->matrix() : Matrix{},
                         reads_fisher(mode) ? m.fisher->matrix() : Matrix{}, rows, cols, m.group_size, first,
                         m.dim});
      const int64_t indices = m.dim == 0 ? rows : cols, others = m.dim == 0 ? cols : rows;
      for (int64_t i = 0; i < indices; ++i) {
        double sum = 0.0, size = 0.0;
        for (int64_t j = 0; j < others; ++j) {
          const size_t k = size_t(m.dim == 0 ? i * cols + j : j * cols + i);
          const double w = m.weight->values[k], g = m.grad->values[k], h = m.fisher->values[k];
          sum += element(mode, w, g, h);
          size += std::fabs(element(mode, w, g, h));
          if (mode == kMixed) size += std::fabs(w * g);  // its difference cancels
        }
        expected[size_t(first + i / m.group_size)] += std::fabs(sum);
        scale[size_t(first + i / m.group_size)] += size;
      }
    }
  }
  const int64_t units = int64_t(expected.size());
  const Buffer one(units * 4, Buffer::any_offset(4)), several(units * 4, Buffer::any_offset(4));
  for (const Buffer* scores : {&one, &several}) {
    ap_cpu_unit_importance(members.data(), int64_t(members.size()), mode, units,
                           reinterpret_cast<float*>(scores->data()),
                           scores == &one ? on_one_thread : on_several_threads);
    scores->check_surroundings();
  }
  const float* got = reinterpret_cast<const float*>(one.data());
  for (int64_t u = 0; u < units; ++u) {
    const double truth = double(float(expected[size_t(u)]));
    check_close(got[u], truth, kind == kIntegers ? 0.0 : 2e-6 * scale[size_t(u)] + 1e-30,
                "score of unit " + std::to_string(u));
  }
  check_same_bits(got, reinterpret_cast<const float*>(several.data()), units, "score");
}

// All 65536 values of a 16-bit dtype, in vectors and one by one.
void check_conversion(int32_t dtype, int64_t cols) {
  const auto sample = std::make_shared<Sample>(dtype, 65536 / cols + 1, cols, 0, kIntegers, 0);
  for (int64_t i = 0; i < 65536; ++i) sample->set(i / cols, i % cols, uint32_t(i));
  for (int32_t dim : {0, 1}) {
    const auto transposed = std::make_shared<Sample>(dtype, cols, sample->rows, 1, kIntegers, 0);
    for (int64_t i = 0; i < 65536; ++i) transposed->set(i % cols, i / cols, uint32_t(i));
    check_importance({{{dim == 0 ? sample : transposed, sample, sample, 1, dim}}}, kMagnitudeL1, kAnything);
  }
}

void run_importance() {
  const int64_t shapes[][2] = {{1, 1},  {1, 7},   {7, 1},    {0, 5},    {5, 0},
                               {3, 8},  {5, 15},  {4, 16},   {6, 33},   {33, 31},
                               {129, 24}, {258, 65}, {3, 2049}, {5, 4101}, {600, 33}};
  for (int mode = kFirst; mode <= kMagnitudeL2; ++mode) {
    for (int32_t dtype : {kFloat32, kFloat16, kBFloat16}) {
      for (const auto& shape : shapes) {
        for (int32_t dim : {0, 1}) {
          const int64_t group_size = shape[dim] % 3 == 0 ? any_of<int64_t>({1, 3}) : 1;
          const Values kind = draw(0, 1) ? kIntegers : kAnything;
          const Member member = make_member(dtype, shape[0], shape[1], group_size, dim, kind);
          check_importance({{member}}, Mode(mode), kind);
        }
      }
      if (mode == kMixed) {
        check_importance({{make_member(dtype, 3, 32800, 1, 1, kIntegers)}}, kMixed, kIntegers);
      }
    }
  }
  // Several sets of several members: rows, columns and biases, and matrices that two neighbours share.
  for (int i = 0; i < 300; ++i) {
    const Values kind = draw(0, 2) ? kIntegers : kAnything;
    UnitSets sets(size_t(draw(1, 4)));
    for (auto& set : sets) {
      const int64_t units = any_of<int64_t>({1, 2, 5, 8, 9, 33, 64});
      const int64_t member_count = draw(1, 4);
      for (int64_t m = 0; m < member_count; ++m) {
        const int32_t dtype = int32_t(draw(0, 2)), dim = int32_t(draw(0, 1));
        const int64_t group_size = draw(1, 5), other = any_of<int64_t>({0, 1, 3, 8, 31, 64, 130});
        const int64_t length = units * group_size;
        const bool bias = draw(0, 2) == 0;
        set.push_back(dim == 0 ? make_member(dtype, length, other, group_size, 0, kind)
                               : make_member(dtype, bias ? 1 : other, length, group_size, 1, kind));
      }
      if (draw(0, 1)) {  // both dimensions of one matrix
        const int64_t rows = draw(1, 3), cols = draw(1, 3);
        Member member = make_member(int32_t(draw(0, 2)), units * rows, units * cols, rows, 0, kind);
        set.push_back(member);
        member.dim = 1;
        member.group_size = cols;
        set.push_back(member);
        if (draw(0, 1)) std::swap(set[set.size() - 1], set[set.size() - 2]);
      }
    }
    if (draw(0, 1)) {  // the rows of one set are the columns of the next
      const Member& last = sets.back().back();
      sets.push_back({{last.weight, last.grad, last.fisher, 1, 1 - last.dim}});
    }
    if (draw(0, 5) == 0) {
      const double value = any_of<double>({std::nan(""), HUGE_VAL, -HUGE_VAL});
      const Member& member = sets[0][0];
      Sample& spoiled = *any_of<std::shared_ptr<Sample>>({member.weight, member.grad, member.fisher});
      if (spoiled.rows * spoiled.cols > 0) {
        spoiled.set(draw(0, spoiled.rows - 1), draw(0, spoiled.cols - 1), not_finite(spoiled.dtype, value));
      }
    }
    check_importance(sets, Mode(draw(kFirst, kMagnitudeL2)), kind);
  }
  for (int32_t dtype : {kFloat16, kBFloat16}) {
    check_conversion(dtype, 1);
    check_conversion(dtype, 9);
  }
}

// ---- activation statistics ------------------------------------------------------------------------------

void check_statistics(int32_t dtype, int64_t cols, const std::vector<int64_t>& batches, Values kind,
                      bool spoil = false) {
  ++case_count;
  const Buffer mean(cols * 8, Buffer::any_offset(8)), m2(cols * 8, Buffer::any_offset(8));
  const Buffer mean_of_several(cols * 8, Buffer::any_offset(8));
  const Buffer m2_of_several(cols * 8, Buffer::any_offset(8));
  for (const Buffer* buffer : {&mean, &m2, &mean_of_several, &m2_of_several}) {
    std::memset(buffer->data(), 0, size_t(cols * 8));
  }
  const auto doubles = [](const Buffer& buffer) { return reinterpret_cast<double*>(buffer.data()); };
  int64_t count = 0, count_of_several = 0;
  std::vector<std::vector<double>> seen(static_cast<size_t>(cols));
  for (const int64_t tokens : batches) {
    const auto x = make_sample(dtype, tokens, cols, kind);
    current_case = "activation_stats of " + shape_text(*x);
    if (spoil) x->set(draw(0, tokens - 1), draw(0, cols - 1), not_finite(dtype, std::nan("")));
    ap_cpu_activation_stats(x->matrix(), tokens, cols, doubles(mean), doubles(m2), &count, on_one_thread);
    ap_cpu_activation_stats(x->matrix(), tokens, cols, doubles(mean_of_several), doubles(m2_of_several),
                            &count_of_several, on_several_threads);
    for (int64_t i = 0; i < tokens * cols; ++i) seen[size_t(i % cols)].push_back(x->values[size_t(i)]);
  }
  for (const Buffer* buffer : {&mean, &m2, &mean_of_several, &m2_of_several}) buffer->check_surroundings();
  for (int64_t c = 0; c < cols; ++c) {
    const auto& column = seen[size_t(c)];
    if (count != int64_t(column.size()) || count_of_several != count) fail("count is wrong");
    double sum = 0.0, squares = 0.0, size = 0.0;
    for (const double value : column) sum += value;
    for (const double value : column) {
      const double distance = value - sum / double(count);
      squares += distance * distance;
      size = std::max(size, std::fabs(value));
    }
    check_close(doubles(mean)[c], sum / double(count), 5e-7 * size, "mean " + std::to_string(c));
    check_close(doubles(m2)[c], squares, 5e-7 * size * size * double(count), "m2 " + std::to_string(c));
  }
  check_same_bits(doubles(mean), doubles(mean_of_several), cols, "mean");
  check_same_bits(doubles(m2), doubles(m2_of_several), cols, "m2");
}

void run_statistics() {
  for (int32_t dtype : {kFloat32, kFloat16, kBFloat16}) {
    for (int64_t cols : {1, 2, 7, 8, 9, 31, 32, 65, 300, 2050, 4103}) {
      for (Values kind : {kIntegers, kAnything}) {
        check_statistics(dtype, cols, {1, 1, draw(2, 9)}, kind);
        check_statistics(dtype, cols, cols < 400 ? std::vector<int64_t>{64, 129, draw(60, 300)}
                                                 : std::vector<int64_t>{draw(1, 20)}, kind);
      }
    }
    check_statistics(dtype, 3, {1027}, kIntegers);
    check_statistics(dtype, 43, {70, 5}, kIntegers, true);
  }
}

// ---- similarity of residual streams ---------------------------------------------------------------------

void check_similarity(int32_t dtype, int64_t tokens, int64_t hidden, Metric metric, Values kind, bool zeros,
                      double spoil = 0.0) {
  ++case_count;
  const auto a = make_sample(dtype, tokens, hidden, kind), b = make_sample(dtype, tokens, hidden, kind);
  for (int64_t c = 0; zeros && c < hidden; ++c) a->set(draw(0, 1) * (tokens - 1), c, 0);
  if (!std::isfinite(spoil)) b->set(draw(0, tokens - 1), draw(0, hidden - 1), not_finite(dtype, spoil));
  current_case = "residual_similarity metric " + std::to_string(metric) + " of " + shape_text(*a);
  double sum = 0.0, size = 0.0;
  for (int64_t t = 0; t < tokens; ++t) {
    double dot = 0.0, of_a = 0.0, of_b = 0.0, squares = 0.0, absolutes = 0.0;
    for (int64_t i = t * hidden; i < (t + 1) * hidden; ++i) {
      const double x = a->values[size_t(i)], y = b->values[size_t(i)];
      dot += x * y;
      of_a += x * x;
      of_b += y * y;
      squares += (x - y) * (x - y);
      absolutes += std::fabs(x - y);
    }
    const double norms = std::max(std::sqrt(of_a), kCosineEps) * std::max(std::sqrt(of_b), kCosineEps);
    const double values[] = {dot / norms, std::sqrt(squares), absolutes};
    sum += values[metric];
    size += metric == kCosine ? 1.0 : values[metric];
  }
  const Buffer one(4, Buffer::any_offset(4)), several(4, Buffer::any_offset(4));
  for (const Buffer* result : {&one, &several}) {
    ap_cpu_residual_similarity(a->matrix(), b->matrix(), tokens, hidden, metric,
                               reinterpret_cast<float*>(result->data()),
                               result == &one ? on_one_thread : on_several_threads);
    result->check_surroundings();
  }
  const float* got = reinterpret_cast<const float*>(one.data());
  const double tolerance = kind == kIntegers ? 1.2e-7 : 1e-6;  // integers leave the rounding to fp32 alone
  check_close(*got, sum / double(tokens), tolerance * size / double(tokens) + 1e-30, "result");
  check_same_bits(got, reinterpret_cast<const float*>(several.data()), 1, "result");
}

void run_similarity() {
  for (int32_t dtype : {kFloat32, kFloat16, kBFloat16}) {
    for (Metric metric : {kCosine, kEuclidean, kManhattan}) {
      for (int64_t hidden : {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 576, 1023, 1025, 2070}) {
        for (Values kind : {kIntegers, kAnything}) {
          check_similarity(dtype, 1, hidden, metric, kind, false);
          check_similarity(dtype, draw(2, hidden < 100 ? 90 : 9), hidden, metric, kind, draw(0, 3) == 0);
        }
      }
      check_similarity(dtype, 2 * 1024 + 3, 5, metric, kIntegers, false);
      check_similarity(dtype, 5, 43, metric, kIntegers, false, std::nan(""));
      check_similarity(dtype, 5, 43, metric, kIntegers, false, HUGE_VAL);
    }
  }
}

// ---- gathering ------------------------------------------------------------------------------------------

std::vector<int64_t> make_keep(int64_t units) {
  const int64_t kind = draw(0, 6);
  std::vector<int64_t> keep;
  bool in_run = draw(0, 1);
  for (int64_t unit = 0; unit < units; ++unit) {
    in_run = draw(0, 9) == 0 ? !in_run : in_run;
    const bool kept[] = {true, false, unit == 0, unit == units - 1, draw(0, 3) > 0, draw(0, 9) == 0, in_run};
    if (kept[kind]) keep.push_back(unit);
  }
  return keep;
}

struct GatherCase {
  int64_t rows, cols, padding, group_size;
  int32_t dim, element_size;
};

void check_gather(const std::vector<GatherCase>& cases, const std::vector<int64_t>& keep_units) {
  ++case_count;
  const int64_t kept = int64_t(keep_units.size());
  const Buffer keep(kept * 8, Buffer::any_offset(8));
  if (kept > 0) std::memcpy(keep.data(), keep_units.data(), size_t(kept) * 8);
  std::vector<std::unique_ptr<Buffer>> sources, targets[2];
  std::vector<GatherMember> members[2];
  current_case = "gather_units of " + std::to_string(kept) + " units";
  for (const GatherCase& c : cases) {
    const int64_t size = c.element_size, stride = c.cols + (c.rows > 1 ? c.padding : 0);
    const int64_t kept_rows = c.dim == 0 ? kept * c.group_size : c.rows;
    const int64_t kept_cols = c.dim == 1 ? kept * c.group_size : c.cols;
    const int64_t source_bytes = c.rows * c.cols == 0 ? 0 : ((c.rows - 1) * stride + c.cols) * size;
    sources.push_back(std::make_unique<Buffer>(source_bytes, Buffer::any_offset(size)));
    for (int64_t i = 0; i < source_bytes; i += 8) {
      const uint64_t word = random_bits();
      std::memcpy(sources.back()->data() + i, &word, size_t(std::min<int64_t>(8, source_bytes - i)));
    }
    for (int run : {0, 1}) {
      const int64_t target_bytes = kept_rows * kept_cols * size;
      targets[run].push_back(std::make_unique<Buffer>(target_bytes, Buffer::any_offset(size)));
      members[run].push_back({sources.back()->data(), targets[run].back()->data(), stride, c.rows, c.cols,
                              c.group_size, c.dim, c.element_size});
    }
    current_case += "; [" + std::to_string(c.rows) + ", " + std::to_string(c.cols) + "] of " +
                    std::to_string(size) + " bytes, stride " + std::to_string(stride) + " dim " +
                    std::to_string(c.dim) + " group size " + std::to_string(c.group_size);
  }
  for (int run : {0, 1}) {
    ap_cpu_gather_units(members[run].data(), int64_t(members[run].size()),
                        reinterpret_cast<const int64_t*>(keep.data()), kept,
                        run == 0 ? on_one_thread : on_several_threads);
    for (size_t m = 0; m < cases.size(); ++m) {
      const GatherCase& c = cases[m];
      const int64_t size = c.element_size, stride = members[run][m].source_row_stride;
      const auto source_index = [&](int64_t i) {
        return keep_units[size_t(i / c.group_size)] * c.group_size + i % c.group_size;
      };
      const int64_t kept_rows = c.dim == 0 ? kept * c.group_size : c.rows;
      const int64_t kept_cols = c.dim == 1 ? kept * c.group_size : c.cols;
      const char* got = targets[run][m]->data();
      targets[run][m]->check_surroundings();
      for (int64_t row = 0; row < kept_rows; ++row) {
        const int64_t source_row = c.dim == 0 ? source_index(row) : row;
        for (int64_t col = 0; col < kept_cols; ++col, got += size) {
          const int64_t source_col = c.dim == 1 ? source_index(col) : col;
          const char* source = sources[m]->data() + (source_row * stride + source_col) * size;
          if (std::memcmp(got, source, size_t(size)) != 0) {
            fail("row " + std::to_string(row) + ", column " + std::to_string(col) + " of member " +
                 std::to_string(m));
          }
        }
      }
    }
  }
}

void run_gather() {
  for (int32_t element_size : {1, 2, 4, 8}) {
    for (int32_t dim : {0, 1}) {
      for (int64_t units : {0, 1, 2, 7, 8, 9, 64, 65, 200}) {
        for (int64_t group_size : {1, 2, 8, 96}) {
          for (int repeat = 0; repeat < 3; ++repeat) {
            const int64_t other = any_of<int64_t>({0, 1, 3, 17, 130});
            const int64_t length = units * group_size;
            check_gather({{dim == 0 ? length : other, dim == 0 ? other : length,
                           any_of<int64_t>({0, 0, 1, 5, 64}), group_size, dim, element_size}},
                         make_keep(units));
          }
        }
      }
    }
  }
  for (int i = 0; i < 200; ++i) {
    const int64_t units = draw(1, 90);
    std::vector<GatherCase> cases(size_t(draw(2, 5)));
    for (GatherCase& c : cases) {
      c = {1, 1, draw(0, 9), draw(1, 9), int32_t(draw(0, 1)), int32_t(1 << draw(0, 3))};
      (c.dim == 0 ? c.rows : c.cols) = units * c.group_size;
      (c.dim == 0 ? c.cols : c.rows) = draw(0, 40);
    }
    check_gather(cases, make_keep(units));
  }
  // Large enough to be written around the caches.
  std::vector<int64_t> most;
  for (int64_t unit = 0; unit < 1100; ++unit) {
    if (draw(0, 9) > 0) most.push_back(unit);
  }
  check_gather({{1100, 1231, 1, 1, 0, 4}}, most);
  check_gather({{1231, 1100, 0, 1, 1, 4}}, most);
  check_gather({{2462, 1100, 3, 1, 1, 2}}, most);
  check_gather({{5, 110000, 0, 100, 1, 8}, {5, 110000, 0, 100, 1, 8}}, most);
}

// ---- reading and copying at the speed of memory ---------------------------------------------------------

void check_roofline(int64_t bytes) {
  ++case_count;
  current_case = "roofline of " + std::to_string(bytes) + " bytes";
  const Buffer first(bytes, Buffer::any_offset(1)), second(bytes, Buffer::any_offset(1));
  uint64_t expected = 0;
  for (int64_t i = 0; i < bytes; ++i) {
    first.data()[i] = char(random_bits());
    second.data()[i] = char(random_bits());
    expected ^= uint64_t(uint8_t(first.data()[i] ^ second.data()[i])) << i % 8 * 8;
  }
  for (const bool option : {false, true}) {
    for (const ApParallelFor threads : {on_one_thread, on_several_threads}) {
      const uint64_t got = ap_cpu_roofline_read(first.data(), second.data(), bytes, option, threads);
      if (got != expected) fail("exclusive or is wrong");
      const Buffer copy(bytes, bytes % 64 == 0 ? Buffer::kAtPageEnd : Buffer::kAtPageBegin);
      ap_cpu_roofline_copy(copy.data(), first.data(), bytes, option, threads);
      copy.check_surroundings();
      if (std::memcmp(copy.data(), first.data(), size_t(bytes)) != 0) fail("copy is wrong");
    }
  }
}

void run_roofline() {
  for (int64_t bytes : {1, 7, 63, 64, 65, 128, 1000, 4096, 65536, 262144 + 64, 300001}) check_roofline(bytes);
}

// ---- processes ------------------------------------------------------------------------------------------

const struct {
  const char* name;
  void (*run)();
} kSections[] = {{"importance", run_importance},
                 {"statistics", run_statistics},
                 {"similarity", run_similarity},
                 {"gather", run_gather},
                 {"roofline", run_roofline}};

int run_sections(const std::string& isa, const std::string& only) {
  if (isa != ap_cpu_isa()) {
    std::fprintf(stderr, "ADAPT_PRUNER_CPU_ISA=%s runs %s\n", isa.c_str(), ap_cpu_isa());
    return 1;
  }
  for (const auto& section : kSections) {
    if (only.empty() || only == section.name) section.run();
  }
  std::printf("%s: %lld cases\n", isa.c_str(), static_cast<long long>(case_count));
  return case_count > 0 ? 0 : 1;
}

// The instruction sets that this machine has, by a process for each: kernels choose once.
int run_instruction_sets(const char* only) {
  std::vector<std::string> names = {"baseline", "avx2", "avx512"};
  const auto best = std::find(names.begin(), names.end(), ap_cpu_isa());
  if (best == names.end()) {
    names = {"baseline", ap_cpu_isa()};
  } else {
    names.erase(best + 1, names.end());
  }
  for (const std::string& name : names) {
    if (fork() == 0) {
      setenv("ADAPT_PRUNER_CPU_ISA", name.c_str(), 1);
      execl("/proc/self/exe", "driver", "--isa", name.c_str(), only, nullptr);
      std::perror("execl");
      _exit(1);
    }
  }
  int failures = 0, status = 0;
  while (wait(&status) > 0) failures += status != 0;
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc >= 4 && std::string(argv[1]) == "--isa") return run_sections(argv[2], argv[3]);
  if (getenv("ADAPT_PRUNER_CPU_ISA") != nullptr) {  // or it would hide what the machine has
    unsetenv("ADAPT_PRUNER_CPU_ISA");
    execv("/proc/self/exe", argv);
  }
  return run_instruction_sets(argc > 1 ? argv[1] : "");
}
