"""Which implementation runs an op, and why another one cannot.

Importing this module loads the compiled extension when there is one, which registers its ops and nothing
else: no CUDA context, no compiler, and never an exception. What is missing is reported when asked for.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
OLDEST_TRITON_CAPABILITY = (7, 5)

_warned_about_fallback = False


class BackendUnavailable(RuntimeError):
    """The backend that was asked for is not built, or cannot be used on this machine."""


def _load_extension() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("adapt_pruner._C"), None
    except (ImportError, OSError) as error:  # absent, or built for a libtorch that is not this one
        return None, f"extension not built: {error}"


_extension, _extension_problem = _load_extension()


def extension_loaded() -> bool:
    """Whether `torch.ops.adapt_pruner` exists in this process."""
    return _extension is not None


def build_info() -> dict[str, Any]:
    """What is compiled into the extension.

    Returns:
        `version` of the package it was built from, `torch_target` (oldest libtorch it runs on), `compiler`,
        `cpu_isa` (instruction set chosen on this machine), `cuda` ("13.0") and `cuda_archs`
        ("8.0;9.0;10.0+PTX"), both None in a build without CUDA.
    Raises:
        BackendUnavailable: there is no extension.
    """
    if _extension is None:
        raise BackendUnavailable(_extension_problem)
    info = dict(_extension.build_info())
    if info["cuda_archs"] is not None:
        info["cuda_archs"] = info["cuda_archs"].replace(":", ";")  # as in TORCH_CUDA_ARCH_LIST
    return info


def backend_status() -> dict[str, str | None]:
    """For each backend None when it can be used here, else the reason why not.

    Asks the driver whether there is a CUDA device, without creating a context on it.
    """
    return {backend: _problem_of(backend) for backend in BACKENDS if backend != "auto"}


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend that runs an op whose tensors are on `device`: never "auto".

    Raises:
        ValueError: no such backend, or it does not work on tensors of this device.
        BackendUnavailable: the named backend is not built or not usable here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    if backend == "auto":
        return _choose_automatically(device)
    problem = _problem_of(backend)
    if problem is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot be used: {problem}")
    needed = ("cpu" if _triton_is_interpreted() else "cuda") if backend == "triton" else backend
    if device.type != needed:
        raise ValueError(f"backend {backend!r} needs tensors on a {needed} device, got {device}")
    return backend


def triton_for_cuda(op: str, backend: str, device: torch.device) -> str:
    """What runs an op on a CUDA device that has no kernel there but the one of Triton.

    Returns:
        "triton"; with the backend "auto" also "reference", where that cannot be used.

    Raises:
        BackendUnavailable: it cannot be used, and another backend was named.
    """
    problem = _triton_problem() or _triton_architecture_problem(device)
    if problem is None:
        return "triton"
    if backend != "auto":
        raise BackendUnavailable(f"{op} on CUDA devices needs triton: {problem}")
    _warn_about_fallback(f"{op} on CUDA devices needs triton: {problem}")
    return "reference"


def _problem_of(backend: str) -> str | None:
    if backend == "cuda":
        return _cuda_problem()
    if backend == "triton":
        return _triton_problem()
    return _extension_problem if backend == "cpu" else None


def _choose_automatically(device: torch.device) -> str:
    if device.type == "cpu":
        problem = _extension_problem
    elif device.type == "cuda":
        problem = _cuda_problem() or _architecture_problem(device)
        if problem is not None:
            problem_of_triton = _triton_problem() or _triton_architecture_problem(device)
            if problem_of_triton is None:
                return "triton"
            problem = f"{problem}; triton: {problem_of_triton}"
    else:
        problem = f"no kernels for {device.type} devices"
    if problem is None:
        return device.type
    _warn_about_fallback(problem)
    return "reference"


def _warn_about_fallback(problem: str) -> None:
    global _warned_about_fallback
    if not _warned_about_fallback:
        _warned_about_fallback = True
        warnings.warn(f"adapt_pruner runs the slow reference ops: {problem}", RuntimeWarning, stacklevel=2)


def _cuda_problem() -> str | None:
    if _extension is None:
        return _extension_problem
    if build_info()["cuda"] is None:
        return "built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    driver, runtime = _extension.cuda_driver_version(), build_info()["cuda"]
    if driver // 1000 < int(runtime.split(".")[0]):  # the runtime is linked in, whatever torch brings along
        return f"built with CUDA {runtime}, the driver supports only {driver // 1000}.{driver % 1000 // 10}"
    return None


def _architecture_problem(device: torch.device) -> str | None:
    """Machine code runs on the same major architecture from its minor on; PTX on everything newer."""
    capability = torch.cuda.get_device_capability(device)
    built = build_info()["cuda_archs"]
    for entry in built.split(";"):
        major, minor = (int(part) for part in entry.removesuffix("+PTX").rstrip("af").split("."))
        same_major = capability[0] == major and capability[1] >= minor
        if same_major or (entry.endswith("+PTX") and capability >= (major, minor)):
            return None
    return f"built for CUDA architectures {built}, {device} is {capability[0]}.{capability[1]}"


def _triton_is_interpreted() -> bool:
    """Triton's own switch, for tests: kernels run as Python on CPU tensors and nowhere else."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem() -> str | None:
    """Why Triton's kernels cannot be used; None once they are imported and their ops registered."""
    if not _triton_is_interpreted() and not torch.cuda.is_available():  # true for ROCm as well
        return "no CUDA or ROCm device"
    try:
        for name in ("importance", "linear", "gather", "similarity", "activations"):
            importlib.import_module(f"adapt_pruner.kernels.triton_{name}")
    except Exception as error:  # absent, or broken in one of the many ways of compilers
        return f"triton cannot be imported: {error}"
    return None


def _triton_architecture_problem(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_TRITON_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has architecture {major}.{minor}, older than 7.5"
    return None


# torch.compile must not trace imports and calls of the extension. torch.compiler.assume_constant_result does
# no more than this, but imports the whole compiler, and triton with it.
for _probe in (_cuda_problem, _architecture_problem, _triton_problem, _triton_architecture_problem):
    _probe.__dict__["_dynamo_marked_constant"] = True
