"""The CUDA kernels, compiled by g++ against the emulation header and called through their C interface."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from adapt_pruner.kernels import METRICS, MODES

ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = ROOT / "csrc" / "cuda"
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("dtype", c_int32)]


class ImportanceMember(Structure):
    _fields_ = [
        ("weight", Matrix),
        ("grad", Matrix),
        ("fisher", Matrix),
        ("rows", c_int64),
        ("cols", c_int64),
        ("group_size", c_int64),
        ("dim", c_int32),
    ]


class GatherMember(Structure):
    _fields_ = [
        ("source", c_void_p),
        ("target", c_void_p),
        ("source_row_stride", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("group_size", c_int64),
        ("dim", c_int32),
        ("element_size", c_int32),
    ]


class LaunchFailed(RuntimeError):
    """A kernel launch returned an error: a barrier that not all threads reach, or a bad configuration."""


def compile_kernels(
    folder: Path,
    sources: Sequence[str] = ("saliency.cu", "gather.cu", "similarity.cu"),
    edit: Callable[[str, str], str] | None = None,
) -> ctypes.CDLL:
    """Compile sources of csrc/cuda into `folder`; `edit(name, text)` may change a text, to plant a bug."""
    copies = folder / "csrc" / "cuda"
    copies.mkdir(parents=True)
    (folder / "csrc" / "kernels.h").write_text((ROOT / "csrc" / "kernels.h").read_text())
    for name in ("common.cuh", *sources):
        text = (CUDA_SOURCES / name).read_text()
        (copies / name).write_text(edit(name, text) if edit is not None else text)
    # one translation unit, so that all kernels share one emulated machine and g++ starts once
    (copies / "all.cpp").write_text("".join(f'#include "{name}"\n' for name in sources))
    library = folder / "libemulated.so"
    command = ["g++", "-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", f"-I{EMULATION}"]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", str(copies / "all.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    kernels = ctypes.CDLL(str(library))
    if "saliency.cu" in sources:
        kernels.ap_cuda_importance_scratch_floats.restype = c_int64
    return kernels


def unit_importance(
    kernels: ctypes.CDLL,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    mode: str,
) -> Tensor:
    members = (ImportanceMember * len(weights))()
    for i, weight in enumerate(weights):
        members[i] = ImportanceMember(
            _matrix(weight),
            _matrix(grads[i]) if grads else Matrix(),
            _matrix(fishers[i]) if fishers else Matrix(),
            *_shape(weight),
            group_sizes[i],
            dims[i] if weight.dim() == 2 else 1,
        )
    units = weights[0].shape[dims[0]] // group_sizes[0]
    scores = torch.full((units,), torch.nan)
    floats = kernels.ap_cuda_importance_scratch_floats(members, c_int64(len(weights)))
    scratch = torch.full((floats,), torch.nan)
    error = kernels.ap_cuda_unit_importance(
        members,
        c_int64(len(weights)),
        c_int32(MODES.index(mode)),
        c_int64(units),
        _floats(scores),
        _floats(scratch),
        None,
    )
    return _checked(error, scores)


def gather_units(
    kernels: ctypes.CDLL,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    keep: Tensor,
) -> list[Tensor]:
    members = (GatherMember * len(tensors))()
    outputs = []
    for i, tensor in enumerate(tensors):
        shape = list(tensor.shape)
        shape[dims[i]] = len(keep) * group_sizes[i]
        output = torch.empty(shape, dtype=tensor.dtype)
        outputs.append(output)
        members[i] = GatherMember(
            tensor.data_ptr(),
            output.data_ptr(),
            _matrix_stride(tensor),
            *_shape(tensor),
            group_sizes[i],
            dims[i] if tensor.dim() == 2 else 1,
            tensor.element_size(),
        )
    error = kernels.ap_cuda_gather_units(
        members, c_int64(len(tensors)), c_void_p(keep.data_ptr()), c_int64(len(keep)), None
    )
    _checked(error, keep)
    return outputs


def residual_similarity(kernels: ctypes.CDLL, h_in: Tensor, h_out: Tensor, metric: str) -> Tensor:
    tokens, hidden = h_in.shape
    result, scratch = torch.full((1,), torch.nan), torch.full((tokens,), torch.nan)
    error = kernels.ap_cuda_residual_similarity(
        _matrix(h_in),
        _matrix(h_out),
        c_int64(tokens),
        c_int64(hidden),
        c_int32(METRICS.index(metric)),
        _floats(result),
        _floats(scratch),
        None,
    )
    return _checked(error, result)[0]


def _checked(error: int, result: Tensor) -> Tensor:
    if error != 0:
        raise LaunchFailed(f"CUDA error {error}")
    return result


def _floats(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor.data_ptr(), _matrix_stride(tensor), DTYPE_CODES[tensor.dtype])


def _matrix_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.dim() == 2 and tensor.shape[0] > 1 else tensor.shape[-1]


def _shape(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if tensor.dim() == 2 else (1, tensor.shape[0])
