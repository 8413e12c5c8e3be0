// The Python module adapt_pruner._io: it needs no torch, and pybind11 ties it to one version of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <exception>
#include <future>
#include <string>
#include <tuple>
#include <vector>

#include "copy.h"

namespace py = pybind11;

namespace adapt_pruner::io {
namespace {

using Runs = py::array_t<int64_t, py::array::c_style>;
using PyPiece = std::tuple<size_t, int64_t, int64_t, int64_t, Runs>;
using PyTensor = std::tuple<int64_t, std::vector<PyPiece>>;

// Nothing that is refused here can come from shard_io.py; a wrong number must not become a wrong read.
Piece checked(const PyPiece& given, size_t num_sources) {
  const auto& [source, offset, rows, stride, runs] = given;
  if (source >= num_sources || offset < 0 || rows < 0 || stride < 0) {
    throw py::value_error("piece: expected one of the sources, and offset, rows and stride of 0 or more");
  }
  if (runs.ndim() != 2 || runs.shape(1) != 2) throw py::value_error("runs: expected shape [runs, 2]");
  const Run* first = reinterpret_cast<const Run*>(runs.data());
  const size_t count = size_t(runs.shape(0));
  int64_t end = 0;
  for (size_t i = 0; i < count; ++i) {
    if (first[i].first < end || first[i].length < 1) {
      throw py::value_error("runs: expected ascending ones of 1 or more bytes that do not overlap");
    }
    end = first[i].first + first[i].length;
  }
  if (rows > 1 && end > stride) throw py::value_error("runs: expected to lie within a row");
  return {source, offset, rows, stride, first, count};
}

[[noreturn]] void raise(const FileError& error) {
  if (error.number == 0) {
    const auto message = "file ends before the data that was expected in it";
    const auto path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path.c_str()));
    if (!path) throw py::error_already_set();
    PyErr_SetObject(PyExc_OSError, py::make_tuple(EIO, message, path).ptr());
  } else {
    errno = error.number;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
  }
  throw py::error_already_set();
}

std::vector<uint32_t> copy_interruptibly(const std::vector<std::string>& sources,
                                         const std::vector<PyTensor>& given, const std::string& target,
                                         int threads, int64_t buffer_bytes) {
  if (threads < 1 || buffer_bytes < 1) throw py::value_error("expected a thread and a byte of buffer at least");
  std::vector<Tensor> tensors;
  for (const auto& [target_offset, pieces] : given) {
    tensors.push_back({target_offset, {}});
    for (const PyPiece& piece : pieces) tensors.back().pieces.push_back(checked(piece, sources.size()));
  }
  std::atomic<bool> stop = false;
  bool interrupted = false;
  try {
    auto result = std::async(std::launch::async, [&] {
      return copy(sources, tensors, target, threads, buffer_bytes, stop);
    });
    while (!interrupted) {
      std::future_status status;
      {
        const py::gil_scoped_release release;
        status = result.wait_for(std::chrono::milliseconds(50));
      }
      if (status == std::future_status::ready) return result.get();
      interrupted = PyErr_CheckSignals() != 0;
    }
    stop = true;
    const py::gil_scoped_release release;
    result.wait();
  } catch (const FileError& error) {
    raise(error);
  }
  throw py::error_already_set();
}

}  // namespace
}  // namespace adapt_pruner::io

PYBIND11_MODULE(_io, module) {
  module.def("copy", &adapt_pruner::io::copy_interruptibly, py::arg("sources"), py::arg("tensors"),
             py::arg("target"), py::arg("threads"), py::arg("buffer_bytes"));
}
