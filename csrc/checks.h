// Argument checks of the native ops. Messages carry the value that was seen; the Python wrappers check the
// same (adapt_pruner/kernels/checks.py) and raise ValueError before these are reached.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"

namespace adapt_pruner {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string join(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i == 0 ? "" : ", ") << values[i];
  text << "]";
  return text.str();
}

inline std::string element_name(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

inline int32_t floating_dtype(const std::string& name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16, got scalar type ",
                  int(tensor.scalar_type()));
  return -1;
}

inline int64_t rows_of(const Tensor& tensor) { return tensor.dim() == 2 ? tensor.size(0) : 1; }
inline int64_t cols_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }
inline int64_t row_stride_of(const Tensor& tensor) {
  // the stride of a single row is arbitrary
  return rows_of(tensor) > 1 ? tensor.stride(0) : cols_of(tensor);
}

inline void check_layout(const std::string& name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 1 || tensor.dim() == 2, name, ": expected a 1-D or 2-D tensor, got shape ",
                  join(tensor.sizes()));
  if (tensor.numel() == 0) return;
  const bool dense_rows = cols_of(tensor) == 1 || tensor.stride(tensor.dim() - 1) == 1;
  STD_TORCH_CHECK(dense_rows && row_stride_of(tensor) >= cols_of(tensor), name,
                  ": expected contiguous rows (last stride 1, row stride >= ", cols_of(tensor),
                  "), got strides ", join(tensor.strides()));
}

inline void check_same_device(const std::string& name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(device_name(tensor) == device_name(first), name, ": expected device ", device_name(first),
                  ", got ", device_name(tensor));
}

// The set of units that member i belongs to; without `sets` they all belong to one.
inline size_t set_of(const std::vector<int64_t>& sets, size_t i) {
  return sets.empty() ? 0 : size_t(sets[i]);
}

inline void check_sets(const std::vector<int64_t>& sets, size_t members) {
  STD_TORCH_CHECK(sets.empty() || sets.size() == members, "sets: expected one for each of ", members,
                  " tensors, got ", sets.size());
  for (size_t i = 0; i < sets.size(); ++i) {
    const int64_t before = i == 0 ? -1 : sets[i - 1];
    STD_TORCH_CHECK(sets[i] == before + 1 || (i > 0 && sets[i] == before), "sets[", i, "] = ", sets[i],
                    ": expected sets numbered from 0, members of a set one after the other");
  }
}

// Returns the number of units of each set.
inline std::vector<int64_t> check_members(const char* list, const std::vector<Tensor>& tensors,
                                          const std::vector<int64_t>& dims,
                                          const std::vector<int64_t>& group_sizes,
                                          const std::vector<int64_t>& sets = {}) {
  STD_TORCH_CHECK(!tensors.empty(), list, ": expected at least one tensor, got none");
  STD_TORCH_CHECK(dims.size() == tensors.size(), "dims: expected one for each of ", tensors.size(),
                  " tensors, got ", dims.size());
  STD_TORCH_CHECK(group_sizes.size() == tensors.size(), "group_sizes: expected one for each of ",
                  tensors.size(), " tensors, got ", group_sizes.size());
  check_sets(sets, tensors.size());
  std::vector<int64_t> units;
  size_t first = 0;  // member of its set
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = element_name(list, i);
    check_layout(name, tensors[i]);
    check_same_device(name, tensors[i], tensors[0]);
    STD_TORCH_CHECK(0 <= dims[i] && dims[i] < tensors[i].dim(), "dims[", i, "]: expected a dimension of a ",
                    tensors[i].dim(), "-D tensor, got ", dims[i]);
    const int64_t length = tensors[i].size(dims[i]);
    STD_TORCH_CHECK(group_sizes[i] >= 1 && length % group_sizes[i] == 0, "group_sizes[", i,
                    "]: expected a divisor of the ", length, " indices of dimension ", dims[i], ", got ",
                    group_sizes[i]);
    if (set_of(sets, i) == units.size()) {
      units.push_back(length / group_sizes[i]);
      first = i;
    }
    STD_TORCH_CHECK(length / group_sizes[i] == units.back(), name, ": expected ", units.back(),
                    " units as in ", list, "[", first, "], got ", length / group_sizes[i]);
  }
  return units;
}

// Gradients and Fisher diagonals: one like each weight if the mode reads them, else none.
inline void check_companions(const char* list, const std::vector<Tensor>& companions,
                             const std::vector<Tensor>& weights, bool needed, const std::string& mode) {
  const size_t expected = needed ? weights.size() : 0;
  STD_TORCH_CHECK(companions.size() == expected, list, ": mode '", mode, "' expects ", expected,
                  " tensors, got ", companions.size());
  for (size_t i = 0; i < companions.size(); ++i) {
    const std::string name = element_name(list, i);
    check_layout(name, companions[i]);
    check_same_device(name, companions[i], weights[i]);
    STD_TORCH_CHECK(join(companions[i].sizes()) == join(weights[i].sizes()), name,
                    ": expected the weight's shape ", join(weights[i].sizes()), ", got ",
                    join(companions[i].sizes()));
    const int32_t dtype = floating_dtype(name, companions[i]);
    STD_TORCH_CHECK(dtype == kFloat32 || companions[i].scalar_type() == weights[i].scalar_type(), name,
                    ": expected the weight's dtype or float32, got scalar type ",
                    int(companions[i].scalar_type()));
  }
}

inline void check_keep(const Tensor& keep, int64_t units) {
  STD_TORCH_CHECK(keep.dim() == 1 && keep.scalar_type() == ScalarType::Long,
                  "keep: expected a 1-D int64 tensor, got shape ", join(keep.sizes()), " of scalar type ",
                  int(keep.scalar_type()));
  STD_TORCH_CHECK(keep.is_cpu() && keep.is_contiguous(),
                  "keep: expected a contiguous tensor on the cpu, got ", device_name(keep));
  const int64_t* values = keep.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < keep.numel(); ++i) {
    STD_TORCH_CHECK(0 <= values[i] && values[i] < units, "keep[", i, "] = ", values[i],
                    ": expected 0 <= unit < ", units);
    STD_TORCH_CHECK(i == 0 || values[i] > values[i - 1], "keep[", i, "] = ", values[i],
                    ": expected more than keep[", i - 1, "] = ", values[i - 1], " (sorted, each unit once)");
  }
}

// First and last byte that a non-empty tensor with contiguous rows touches.
struct Extent {
  const char* first;
  const char* last;
};
inline Extent extent_of(const Tensor& tensor) {
  const char* first = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t elements = (rows_of(tensor) - 1) * row_stride_of(tensor) + cols_of(tensor);
  return {first, first + elements * int64_t(tensor.element_size()) - 1};
}
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const Extent x = extent_of(a), y = extent_of(b);
  return x.first <= y.last && y.first <= x.last;
}

// Preallocated outputs: contiguous, like the tensors but for their shape, in memory of their own.
inline void check_outputs(const std::vector<Tensor>& out, const std::vector<Tensor>& tensors,
                          const std::vector<std::vector<int64_t>>& shapes) {
  STD_TORCH_CHECK(out.size() == tensors.size(), "out: expected one for each of ", tensors.size(),
                  " tensors, got ", out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    const std::string name = element_name("out", i);
    STD_TORCH_CHECK(join(out[i].sizes()) == join(shapes[i]), name, ": expected shape ", join(shapes[i]),
                    ", got ", join(out[i].sizes()));
    STD_TORCH_CHECK(out[i].scalar_type() == tensors[i].scalar_type(), name,
                    ": expected the dtype of tensors[", i, "] (scalar type ", int(tensors[i].scalar_type()),
                    "), got scalar type ", int(out[i].scalar_type()));
    check_same_device(name, out[i], tensors[i]);
    STD_TORCH_CHECK(out[i].is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                    join(out[i].strides()));
    for (size_t j = 0; j < tensors.size(); ++j) {
      STD_TORCH_CHECK(!overlap(out[i], tensors[j]), name, ": shares memory with tensors[", j, "]");
      STD_TORCH_CHECK(j >= i || !overlap(out[i], out[j]), name, ": shares memory with out[", j, "]");
    }
  }
}

inline Mode parse_mode(const std::string& mode) {
  static const char* const names[] = {"first", "vectorize",    "second",
                                      "mixed", "magnitude_l1", "magnitude_l2"};
  for (int32_t i = 0; i < 6; ++i) {
    if (mode == names[i]) return Mode(i);
  }
  STD_TORCH_CHECK(false, "mode '", mode,
                  "': expected one of first, vectorize, second, mixed, magnitude_l1, magnitude_l2");
  return kFirst;
}

inline Metric parse_metric(const std::string& metric) {
  static const char* const names[] = {"cosine", "euclidean", "manhattan"};
  for (int32_t i = 0; i < 3; ++i) {
    if (metric == names[i]) return Metric(i);
  }
  STD_TORCH_CHECK(false, "metric '", metric, "': expected one of cosine, euclidean, manhattan");
  return kCosine;
}

}  // namespace adapt_pruner
