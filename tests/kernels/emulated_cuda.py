"""The CUDA kernels, compiled by g++ against the emulation header and called through their C interface."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

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
        ("first_unit", c_int64),
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
    sources: Sequence[str] = ("saliency.cu", "gather.cu", "similarity.cu", "activations.cu"),
    edit: Callable[[str, str], str] | None = None,
) -> ctypes.CDLL:
    """Compile sources of csrc/cuda into `folder`; `edit(name, text)` may change a text, to plant a bug."""
    copies = folder / "csrc" / "cuda"
    copies.mkdir(parents=True)
    (folder / "csrc" / "kernels.h").write_text((ROOT / "csrc" / "kernels.h").read_text())
    sources = ("runtime.cu", *sources)
    for name in ("common.cuh", *sources):
        text = (CUDA_SOURCES / name).read_text()
        (copies / name).write_text(edit(name, text) if edit is not None else text)
    library = folder / "libemulated.so"
    command = ["g++", "-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", f"-I{EMULATION}"]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-o", str(library)]
    command += ["-x", "c++", *(str(copies / name) for name in sources)]
    subprocess.run(command, check=True, timeout=300)
    kernels = ctypes.CDLL(str(library))
    kernels.cuda_emulation_launches.restype = c_int64
    return kernels


class Workspace:
    """Memory of a call, full of NaN before it; nothing may be written behind its end."""

    GUARD = 256  # bytes

    def __init__(self, size_function: Any, *arguments: Any) -> None:
        size_function.restype = c_int64
        self.bytes = size_function(*arguments)
        self.memory = torch.full((self.bytes + self.GUARD,), 0xFF, dtype=torch.uint8)

    @property
    def pointer(self) -> c_void_p:
        return c_void_p(self.memory.data_ptr())

    def check(self) -> None:
        assert (self.memory[self.bytes :] == 0xFF).all(), "written behind the end of the workspace"


def unit_importance(
    kernels: ctypes.CDLL,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    mode: str,
    sets: Sequence[int] = (),
) -> Tensor:
    """As the op of this name: the scores of all sets, one after the other."""
    members = (ImportanceMember * len(weights))()
    units = first_unit = 0
    for i, weight in enumerate(weights):
        if i == 0 or (sets and sets[i] != sets[i - 1]):
            first_unit = units
            units += weight.shape[dims[i]] // group_sizes[i]
        members[i] = ImportanceMember(
            _matrix(weight),
            _matrix(grads[i]) if grads else Matrix(),
            _matrix(fishers[i]) if fishers else Matrix(),
            *_shape(weight),
            group_sizes[i],
            first_unit,
            dims[i] if weight.dim() == 2 else 1,
        )
    scores = torch.full((units,), torch.nan)
    workspace = Workspace(kernels.ap_cuda_importance_workspace_bytes, members, c_int64(len(weights)))
    error = kernels.ap_cuda_unit_importance(
        members,
        c_int64(len(weights)),
        c_int32(MODES.index(mode)),
        c_int64(units),
        _pointer(scores),
        workspace.pointer,
        None,
    )
    return _checked(error, scores, workspace)


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
    count, kept = c_int64(len(tensors)), c_int64(len(keep))
    workspace = Workspace(kernels.ap_cuda_gather_workspace_bytes, count, kept)
    error = kernels.ap_cuda_gather_units(members, count, _pointer(keep), kept, workspace.pointer, None)
    _checked(error, keep, workspace)
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
        _pointer(result),
        _pointer(scratch),
        None,
    )
    return _checked(error, result)[0]


def activation_stats(kernels: ctypes.CDLL, x: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> None:
    sizes = c_int64(x.shape[0]), c_int64(x.shape[1])
    workspace = Workspace(kernels.ap_cuda_activation_workspace_bytes, *sizes)
    state = (_pointer(mean), _pointer(m2), _pointer(count))
    error = kernels.ap_cuda_activation_stats(_matrix(x), *sizes, *state, workspace.pointer, None)
    _checked(error, mean, workspace)


def _checked(error: int, result: Tensor, workspace: Workspace | None = None) -> Tensor:
    if error != 0:
        raise LaunchFailed(f"CUDA error {error}")
    if workspace is not None:
        workspace.check()
    return result


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor.data_ptr(), _matrix_stride(tensor), DTYPE_CODES[tensor.dtype])


def _matrix_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.dim() == 2 and tensor.shape[0] > 1 else tensor.shape[-1]


def _shape(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if tensor.dim() == 2 else (1, tensor.shape[0])
