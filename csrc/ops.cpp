// Every op's schema and registration, on libtorch's stable ABI: one binary for every torch from
// TORCH_TARGET_VERSION on and, through the limited API, every Python from 3.10 on.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "checks.h"
#include "kernels.h"

#ifdef ADAPT_PRUNER_WITH_CUDA
#include <dlfcn.h>
#endif

namespace adapt_pruner {
namespace {

// ---- arguments, checked and turned into the kernels' plain structs ----

Matrix matrix_of(const std::string& name, const Tensor& tensor) {
  return {tensor.const_data_ptr(), row_stride_of(tensor), floating_dtype(name, tensor)};
}

struct ImportanceArguments {
  std::vector<ImportanceMember> members;
  Mode mode;
  int64_t units;  // of all sets
};

ImportanceArguments importance_arguments(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                                         const std::vector<Tensor>& fishers, const std::vector<int64_t>& dims,
                                         const std::vector<int64_t>& group_sizes,
                                         const std::string& mode_name, const std::vector<int64_t>& sets) {
  ImportanceArguments arguments;
  arguments.mode = parse_mode(mode_name);
  const std::vector<int64_t> units = check_members("weights", weights, dims, group_sizes, sets);
  std::vector<int64_t> first_units = {0};
  for (const int64_t count : units) first_units.push_back(first_units.back() + count);
  arguments.units = first_units.back();
  check_companions("grads", grads, weights, reads_grad(arguments.mode), mode_name);
  check_companions("fishers", fishers, weights, reads_fisher(arguments.mode), mode_name);
  for (size_t i = 0; i < weights.size(); ++i) {
    ImportanceMember member = {};
    member.weight = matrix_of(element_name("weights", i), weights[i]);
    if (!grads.empty()) member.grad = matrix_of(element_name("grads", i), grads[i]);
    if (!fishers.empty()) member.fisher = matrix_of(element_name("fishers", i), fishers[i]);
    member.rows = rows_of(weights[i]);
    member.cols = cols_of(weights[i]);
    member.group_size = group_sizes[i];
    member.first_unit = first_units[set_of(sets, i)];
    member.dim = weights[i].dim() == 1 ? 1 : int32_t(dims[i]);  // a bias is one row of columns
    arguments.members.push_back(member);
  }
  return arguments;
}

struct GatherArguments {
  std::vector<Tensor> outputs;
  std::vector<GatherMember> members;
};

// The outputs are new ones without `out`.
GatherArguments gather_arguments(const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims,
                                 const std::vector<int64_t>& group_sizes, const Tensor& keep,
                                 const std::vector<Tensor>* out) {
  check_keep(keep, check_members("tensors", tensors, dims, group_sizes)[0]);
  GatherArguments arguments;
  std::vector<std::vector<int64_t>> shapes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int32_t size = int32_t(tensors[i].element_size());
    STD_TORCH_CHECK(size == 1 || size == 2 || size == 4 || size == 8, element_name("tensors", i),
                    ": expected elements of 1, 2, 4 or 8 bytes, got ", size);
    shapes.emplace_back(tensors[i].sizes().begin(), tensors[i].sizes().end());
    shapes[i][size_t(dims[i])] = keep.numel() * group_sizes[i];
  }
  if (out != nullptr) check_outputs(*out, tensors, shapes);
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor output = out != nullptr ? (*out)[i] : torch::stable::new_empty(tensors[i], shapes[i]);
    GatherMember member = {};
    member.source = tensors[i].const_data_ptr();
    member.target = output.mutable_data_ptr();
    member.source_row_stride = row_stride_of(tensors[i]);
    member.rows = rows_of(tensors[i]);
    member.cols = cols_of(tensors[i]);
    member.group_size = group_sizes[i];
    member.dim = tensors[i].dim() == 1 ? 1 : int32_t(dims[i]);
    member.element_size = int32_t(tensors[i].element_size());
    arguments.outputs.push_back(output);
    arguments.members.push_back(member);
  }
  return arguments;
}

struct SimilarityArguments {
  Matrix h_in;
  Matrix h_out;
  int64_t tokens;
  int64_t hidden;
  Metric metric;
};

// [tokens, hidden] with any row stride, or contiguous with any number of leading dimensions.
Matrix token_rows(const std::string& name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.numel() > 0, name,
                  ": expected [..., hidden] with at least one token, got shape ", join(tensor.sizes()));
  if (tensor.dim() <= 2) {
    check_layout(name, tensor);
    return matrix_of(name, tensor);
  }
  STD_TORCH_CHECK(tensor.is_contiguous(), name,
                  ": expected a contiguous tensor or [tokens, hidden], got shape ", join(tensor.sizes()),
                  " with strides ", join(tensor.strides()));
  return {tensor.const_data_ptr(), cols_of(tensor), floating_dtype(name, tensor)};
}

SimilarityArguments similarity_arguments(const Tensor& h_in, const Tensor& h_out, const std::string& metric) {
  STD_TORCH_CHECK(join(h_in.sizes()) == join(h_out.sizes()), "h_out: expected the shape of h_in ",
                  join(h_in.sizes()), ", got ", join(h_out.sizes()));
  STD_TORCH_CHECK(h_in.scalar_type() == h_out.scalar_type(),
                  "h_out: expected the dtype of h_in (scalar type ", int(h_in.scalar_type()),
                  "), got scalar type ", int(h_out.scalar_type()));
  check_same_device("h_out", h_out, h_in);
  SimilarityArguments arguments = {};
  arguments.metric = parse_metric(metric);
  arguments.h_in = token_rows("h_in", h_in);
  arguments.h_out = token_rows("h_out", h_out);
  arguments.hidden = cols_of(h_in);
  arguments.tokens = h_in.numel() / arguments.hidden;
  return arguments;
}

struct StatsArguments {
  Matrix x;
  int64_t tokens;
  int64_t cols;
};

void check_state(const std::string& name, const Tensor& tensor, const Tensor& x, ScalarType dtype,
                 const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected scalar type ", int(dtype), ", got ",
                  int(tensor.scalar_type()));
  STD_TORCH_CHECK(join(tensor.sizes()) == join(shape), name, ": expected shape ", join(shape), ", got ",
                  join(tensor.sizes()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  join(tensor.strides()));
  check_same_device(name, tensor, x);
}

StatsArguments stats_arguments(const Tensor& x, const Tensor& mean, const Tensor& m2, const Tensor& count) {
  const Matrix rows = token_rows("x", x);
  check_state("mean", mean, x, ScalarType::Double, {cols_of(x)});
  check_state("m2", m2, x, ScalarType::Double, {cols_of(x)});
  check_state("count", count, x, ScalarType::Long, {});
  return {rows, x.numel() / cols_of(x), cols_of(x)};
}

// ---- CPU ------------------------------------------------------------------------------------------------

void parallel_for(int64_t count, int64_t grain, ApRangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor unit_importance_cpu(std::vector<Tensor> weights, std::vector<Tensor> grads,
                           std::vector<Tensor> fishers, std::vector<int64_t> dims,
                           std::vector<int64_t> group_sizes, std::string mode, std::vector<int64_t> sets) {
  const ImportanceArguments arguments =
      importance_arguments(weights, grads, fishers, dims, group_sizes, mode, sets);
  Tensor scores = torch::stable::new_empty(weights[0], {arguments.units}, ScalarType::Float);
  ap_cpu_unit_importance(arguments.members.data(), int64_t(arguments.members.size()), arguments.mode,
                         arguments.units, scores.mutable_data_ptr<float>(), parallel_for);
  return scores;
}

void run_gather_cpu(const GatherArguments& arguments, const Tensor& keep) {
  ap_cpu_gather_units(arguments.members.data(), int64_t(arguments.members.size()),
                      keep.const_data_ptr<int64_t>(), keep.numel(), parallel_for);
}

std::vector<Tensor> gather_units_cpu(std::vector<Tensor> tensors, std::vector<int64_t> dims,
                                     std::vector<int64_t> group_sizes, Tensor keep) {
  const GatherArguments arguments = gather_arguments(tensors, dims, group_sizes, keep, nullptr);
  run_gather_cpu(arguments, keep);
  return arguments.outputs;
}

void gather_units_out_cpu(std::vector<Tensor> tensors, std::vector<int64_t> dims,
                          std::vector<int64_t> group_sizes, Tensor keep, std::vector<Tensor> out) {
  run_gather_cpu(gather_arguments(tensors, dims, group_sizes, keep, &out), keep);
}

Tensor residual_similarity_cpu(Tensor h_in, Tensor h_out, std::string metric) {
  const SimilarityArguments arguments = similarity_arguments(h_in, h_out, metric);
  Tensor result = torch::stable::new_empty(h_in, {}, ScalarType::Float);
  ap_cpu_residual_similarity(arguments.h_in, arguments.h_out, arguments.tokens, arguments.hidden,
                             arguments.metric, result.mutable_data_ptr<float>(), parallel_for);
  return result;
}

void activation_stats_cpu(Tensor x, Tensor mean, Tensor m2, Tensor count) {
  const StatsArguments arguments = stats_arguments(x, mean, m2, count);
  ap_cpu_activation_stats(arguments.x, arguments.tokens, arguments.cols, mean.mutable_data_ptr<double>(),
                          m2.mutable_data_ptr<double>(), count.mutable_data_ptr<int64_t>(), parallel_for);
}

int64_t bytes_of(const std::string& name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  join(tensor.strides()));
  return tensor.numel() * int64_t(tensor.element_size());
}

int64_t roofline_read_cpu(Tensor first, Tensor second, bool ahead) {
  const int64_t bytes = bytes_of("first", first);
  STD_TORCH_CHECK(bytes_of("second", second) == bytes, "second: expected the ", bytes,
                  " bytes of first, got ", bytes_of("second", second));
  return int64_t(
      ap_cpu_roofline_read(first.const_data_ptr(), second.const_data_ptr(), bytes, ahead, parallel_for));
}

void roofline_copy_cpu(Tensor target, Tensor source, bool streaming) {
  const int64_t bytes = bytes_of("target", target);
  STD_TORCH_CHECK(bytes_of("source", source) == bytes, "source: expected the ", bytes,
                  " bytes of target, got ", bytes_of("source", source));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(target.const_data_ptr()) % 64 == 0,
                  "target: expected data aligned to 64 bytes");
  ap_cpu_roofline_copy(target.mutable_data_ptr(), source.const_data_ptr(), bytes, streaming, parallel_for);
}

// ---- CUDA -----------------------------------------------------------------------------------------------

#ifdef ADAPT_PRUNER_WITH_CUDA

// The symbol exists only in libtorch_cuda.so, which a CPU torch lacks: looked up when it is needed, in the
// library that torch has loaded.
void* current_stream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return stream;
}

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": ", ap_cuda_error_string(error));
}

// Freed on return, but its memory is only reused by later work of the same stream.
Tensor workspace_like(const Tensor& tensor, int64_t bytes) {
  return torch::stable::new_empty(tensor, {bytes}, ScalarType::Byte);
}

Tensor unit_importance_cuda(std::vector<Tensor> weights, std::vector<Tensor> grads,
                            std::vector<Tensor> fishers, std::vector<int64_t> dims,
                            std::vector<int64_t> group_sizes, std::string mode, std::vector<int64_t> sets) {
  const ImportanceArguments arguments =
      importance_arguments(weights, grads, fishers, dims, group_sizes, mode, sets);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const int64_t count = int64_t(arguments.members.size());
  Tensor scores = torch::stable::new_empty(weights[0], {arguments.units}, ScalarType::Float);
  const Tensor workspace =
      workspace_like(weights[0], ap_cuda_importance_workspace_bytes(arguments.members.data(), count));
  check_launch("unit_importance",
               ap_cuda_unit_importance(arguments.members.data(), count, arguments.mode, arguments.units,
                                       scores.mutable_data_ptr<float>(), workspace.mutable_data_ptr(),
                                       current_stream(weights[0].get_device_index())));
  return scores;
}

void run_gather_cuda(const GatherArguments& arguments, const Tensor& keep) {
  const Tensor& first = arguments.outputs[0];
  const int64_t count = int64_t(arguments.members.size());
  const Tensor workspace = workspace_like(first, ap_cuda_gather_workspace_bytes(count, keep.numel()));
  check_launch(
      "gather_units",
      ap_cuda_gather_units(arguments.members.data(), count, keep.const_data_ptr<int64_t>(), keep.numel(),
                           workspace.mutable_data_ptr(), current_stream(first.get_device_index())));
}

void check_on_cuda(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].is_cuda(), "tensors: expected tensors on a cuda device");
}

std::vector<Tensor> gather_units_cuda(std::vector<Tensor> tensors, std::vector<int64_t> dims,
                                      std::vector<int64_t> group_sizes, Tensor keep) {
  check_on_cuda(tensors);
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const GatherArguments arguments = gather_arguments(tensors, dims, group_sizes, keep, nullptr);
  run_gather_cuda(arguments, keep);
  return arguments.outputs;
}

void gather_units_out_cuda(std::vector<Tensor> tensors, std::vector<int64_t> dims,
                           std::vector<int64_t> group_sizes, Tensor keep, std::vector<Tensor> out) {
  check_on_cuda(tensors);
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  run_gather_cuda(gather_arguments(tensors, dims, group_sizes, keep, &out), keep);
}

Tensor residual_similarity_cuda(Tensor h_in, Tensor h_out, std::string metric) {
  const SimilarityArguments arguments = similarity_arguments(h_in, h_out, metric);
  const torch::stable::accelerator::DeviceGuard guard(h_in.get_device_index());
  Tensor result = torch::stable::new_empty(h_in, {}, ScalarType::Float);
  Tensor scratch = torch::stable::new_empty(h_in, {arguments.tokens}, ScalarType::Float);
  check_launch("residual_similarity",
               ap_cuda_residual_similarity(
                   arguments.h_in, arguments.h_out, arguments.tokens, arguments.hidden, arguments.metric,
                   result.mutable_data_ptr<float>(), scratch.mutable_data_ptr<float>(),
                   current_stream(h_in.get_device_index())));
  return result;
}

void activation_stats_cuda(Tensor x, Tensor mean, Tensor m2, Tensor count) {
  const StatsArguments arguments = stats_arguments(x, mean, m2, count);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor workspace =
      workspace_like(x, ap_cuda_activation_workspace_bytes(arguments.tokens, arguments.cols));
  check_launch(
      "activation_stats",
      ap_cuda_activation_stats(arguments.x, arguments.tokens, arguments.cols, mean.mutable_data_ptr<double>(),
                               m2.mutable_data_ptr<double>(), count.mutable_data_ptr<int64_t>(),
                               workspace.mutable_data_ptr(), current_stream(x.get_device_index())));
}

#endif  // ADAPT_PRUNER_WITH_CUDA

}  // namespace

STABLE_TORCH_LIBRARY(adapt_pruner, m) {
  // sets[i] numbers the set of units that member i belongs to, ascending from 0; all one set without it.
  // The scores of all sets, one after the other.
  m.def(
      "unit_importance(Tensor[] weights, Tensor[] grads, Tensor[] fishers, int[] dims, int[] group_sizes, "
      "str mode, int[] sets=[]) -> Tensor");
  m.def("activation_stats(Tensor x, Tensor(a!) mean, Tensor(b!) m2, Tensor(c!) count) -> ()");
  // keep is host data (it comes from a plan) for tensors of every device
  m.def("gather_units(Tensor[] tensors, int[] dims, int[] group_sizes, Tensor keep) -> Tensor[]");
  m.def(
      "gather_units.out(Tensor[] tensors, int[] dims, int[] group_sizes, Tensor keep, *, Tensor(a!)[] out) "
      "-> ()");
  m.def("residual_similarity(Tensor h_in, Tensor h_out, str metric) -> Tensor");
  // what the memory can do, to measure the others against
  m.def("roofline_read(Tensor first, Tensor second, bool ahead) -> int");
  m.def("roofline_copy(Tensor(a!) target, Tensor source, bool streaming) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(adapt_pruner, CPU, m) {
  m.impl("unit_importance", TORCH_BOX(&unit_importance_cpu));
  m.impl("gather_units", TORCH_BOX(&gather_units_cpu));
  m.impl("gather_units.out", TORCH_BOX(&gather_units_out_cpu));
  m.impl("residual_similarity", TORCH_BOX(&residual_similarity_cpu));
  m.impl("activation_stats", TORCH_BOX(&activation_stats_cpu));
  m.impl("roofline_read", TORCH_BOX(&roofline_read_cpu));
  m.impl("roofline_copy", TORCH_BOX(&roofline_copy_cpu));
}

#ifdef ADAPT_PRUNER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adapt_pruner, CUDA, m) {
  m.impl("unit_importance", TORCH_BOX(&unit_importance_cuda));
  m.impl("gather_units", TORCH_BOX(&gather_units_cuda));
  m.impl("gather_units.out", TORCH_BOX(&gather_units_out_cuda));
  m.impl("residual_similarity", TORCH_BOX(&residual_similarity_cuda));
  m.impl("activation_stats", TORCH_BOX(&activation_stats_cuda));
}
#endif

}  // namespace adapt_pruner

// ---- the Python module: importing it registers the ops; it also says how it was built ----

#define ADAPT_PRUNER_TEXT(...) #__VA_ARGS__
#define ADAPT_PRUNER_EXPANDED_TEXT(...) ADAPT_PRUNER_TEXT(__VA_ARGS__)

namespace {

bool set_text(PyObject* dict, const char* key, const std::string& text) {
  PyObject* value = PyUnicode_FromStringAndSize(text.data(), Py_ssize_t(text.size()));
  const bool done = value != nullptr && PyDict_SetItemString(dict, key, value) == 0;
  Py_XDECREF(value);
  return done;
}

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* info = PyDict_New();
  if (info == nullptr) return nullptr;
  const int target_major = int((uint64_t(TORCH_TARGET_VERSION) >> 56) & 0xff);
  const int target_minor = int((uint64_t(TORCH_TARGET_VERSION) >> 48) & 0xff);
  bool done =
      set_text(info, "version", ADAPT_PRUNER_EXPANDED_TEXT(ADAPT_PRUNER_VERSION)) &&
      set_text(info, "torch_target", std::to_string(target_major) + "." + std::to_string(target_minor)) &&
      set_text(info, "compiler", __VERSION__) && set_text(info, "cpu_isa", ap_cpu_isa());
#ifdef ADAPT_PRUNER_WITH_CUDA
  const int runtime = ap_cuda_runtime_version();
  done = done &&
         set_text(info, "cuda", std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10)) &&
         set_text(info, "cuda_archs", ADAPT_PRUNER_EXPANDED_TEXT(ADAPT_PRUNER_CUDA_ARCHS));
#else
  done = done && PyDict_SetItemString(info, "cuda", Py_None) == 0 &&
         PyDict_SetItemString(info, "cuda_archs", Py_None) == 0;
#endif
  if (done) return info;
  Py_DECREF(info);
  return nullptr;
}

// 13000 for 13.0, 0 without a driver; makes no CUDA context
PyObject* cuda_driver_version(PyObject*, PyObject*) {
#ifdef ADAPT_PRUNER_WITH_CUDA
  return PyLong_FromLong(ap_cuda_driver_version());
#else
  return PyLong_FromLong(0);
#endif
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr},
                         {"cuda_driver_version", cuda_driver_version, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
