"""Builds the two extensions; everything else is in pyproject.toml.

adapt_pruner._C has the ops: abi3, on libtorch's stable ABI. adapt_pruner._io copies parts of files and needs
no torch; pybind11 ties it to the Python it is built with. A wheel is tagged abi3 all the same: another Python
takes numpy instead of _io.

CPU ops are always compiled. CUDA ops are compiled when a CUDA toolkit is found, also for a CPU build of
torch, because the extension links the CUDA runtime statically and nothing of libtorch_cuda.

Environment:
    FORCE_CUDA=1|0          demand a toolkit (an error without one) | do not look for one
    CUDA_HOME               where the toolkit is; else the nvcc on PATH, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST    GPU architectures, default 8.0;9.0;10.0+PTX
    MAX_JOBS                compiler processes at a time
    ADAPT_PRUNER_NO_EXT=1   no extensions: a pure Python package, which runs the reference ops
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # the oldest libtorch the binary runs on: 2.10
PYTHON_TAG = "cp310"
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
CPU_SOURCES = [
    "ops.cpp",
    "cpu/dispatch.cpp",
    "cpu/saliency.cpp",
    "cpu/gather.cpp",
    "cpu/similarity.cpp",
    "cpu/activations.cpp",
    "cpu/roofline.cpp",
]
CUDA_SOURCES = [
    "cuda/runtime.cu",
    "cuda/saliency.cu",
    "cuda/gather.cu",
    "cuda/similarity.cu",
    "cuda/activations.cu",
]
IO_SOURCES = ["io/shard_io.cpp", "io/copy.cpp"]
IO_HEADERS = ["io/copy.h", "io/crc32.h"]
HEADERS = ["kernels.h", "checks.h", "cuda/common.cuh"]
HEADERS += [f"cpu/{path.name}" for path in sorted((ROOT / "csrc" / "cpu").glob("*.h"))]


def package_version() -> str:
    found = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None, "pyproject.toml has a line: version = ..."
    return found.group(1)


def find_cuda_home() -> str | None:
    """The directory of the toolkit to build with, or None."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        raise SystemExit(f"FORCE_CUDA={force!r}: expected 0 or 1")
    if force == "0":
        return None
    candidates = [os.environ.get("CUDA_HOME"), _toolkit_of_nvcc(shutil.which("nvcc")), "/usr/local/cuda"]
    for candidate in candidates:
        if candidate and _is_toolkit(Path(candidate)):
            return candidate
    if force == "1":
        tried = ", ".join(c for c in candidates if c)
        raise SystemExit(
            f"FORCE_CUDA=1, but no CUDA toolkit was found (looked for nvcc and headers in {tried})"
        )
    return None


def _is_toolkit(home: Path) -> bool:
    # an nvcc alone may be a wrapper script that stands outside of its toolkit
    return (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists()


def _toolkit_of_nvcc(nvcc: str | None) -> str | None:
    return str(Path(nvcc).resolve().parent.parent) if nvcc else None


def cuda_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as numbers; it also stays in the environment, where torch's build reads it."""
    text = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    archs = text.replace(";", " ").split()
    wrong = [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]
    if wrong or not archs:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={text!r}: expected a list such as {DEFAULT_ARCHS!r}")
    return archs


def extension_arguments() -> dict[str, Any]:
    import pybind11
    from setuptools import Extension
    from torch.utils import cpp_extension  # only here: a pure build needs no torch

    cuda_home = find_cuda_home()
    macros = [("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    macros.append(("ADAPT_PRUNER_VERSION", package_version()))
    common = ["-O3", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
    arguments: dict[str, Any] = {
        "sources": CPU_SOURCES,
        "libraries": ["torch_cpu", "c10"],
        "library_dirs": cpp_extension.library_paths(),
        "include_dirs": cpp_extension.include_paths(),
    }
    # no -march (the kernels choose at run time); no contraction, so that every instruction set agrees
    compile_args = {"cxx": [*common, "-ffp-contract=off", "-Wall", "-Wno-psabi"]}
    if cuda_home is not None:
        cpp_extension.CUDA_HOME = cuda_home  # torch fixes it at import, to None in a CPU build
        # It insists on torch's own CUDA version, which plays no role for a binary without libtorch_cuda.
        cpp_extension._check_cuda_version = lambda *_: None
        macros += [("ADAPT_PRUNER_WITH_CUDA", None)]
        macros += [("ADAPT_PRUNER_CUDA_ARCHS", ":".join(cuda_archs()))]  # nvcc splits arguments at commas
        arguments["sources"] = CPU_SOURCES + CUDA_SOURCES
        arguments["libraries"] = [*arguments["libraries"], "cudart_static", "dl", "rt", "pthread"]
        arguments["library_dirs"] = cpp_extension.library_paths(device_type="cuda")
        arguments["include_dirs"] = cpp_extension.include_paths(device_type="cuda")
        host = f"-Xcompiler={','.join(common[1:])}"
        compile_args["nvcc"] = ["-O3", "--ptxas-options=-v", "-Xfatbin=-compress-all", "-fmad=false", host]
    arguments["sources"] = [f"csrc/{source}" for source in arguments["sources"]]
    extension = Extension(
        "adapt_pruner._C",
        **arguments,
        define_macros=macros,
        extra_compile_args=compile_args,  # a dict per compiler, which torch's build_ext understands
        depends=[f"csrc/{header}" for header in HEADERS],
        py_limited_api=True,
        language="c++",
    )
    shard_io = Extension(
        "adapt_pruner._io",
        sources=[f"csrc/{source}" for source in IO_SOURCES],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": [*common, "-std=c++17", "-Wall", "-pthread"]},
        extra_link_args=["-pthread"],
        depends=[f"csrc/{header}" for header in IO_HEADERS],
        language="c++",
    )
    return {
        "ext_modules": [extension, shard_io],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**({} if os.environ.get("ADAPT_PRUNER_NO_EXT") == "1" else extension_arguments()))
