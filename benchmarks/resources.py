"""What compilers make of the GPU kernels, without a GPU: registers, shared memory, spills, widest loads.

    python benchmarks/resources.py        writes benchmarks/results/resources.csv

Triton kernels are compiled ahead of time exactly as a launch would specialise them; the CUDA kernels are
compiled by nvcc where there is one. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from adapt_pruner.kernels import (
    METRICS,
    MODES,
    triton_activations,
    triton_gather,
    triton_importance,
    triton_launch,
    triton_linear,
    triton_similarity,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "resources.csv"
DIGEST = RESULTS.with_suffix(".sha256")  # of the sources that the table is about
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel: the arguments as the op passes them, and their alignment."""

    kernel: JITFunction
    variant: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one target; stack (spills, local memory) in bytes per thread, shared per block."""

    source: str
    kernel: str
    variant: str
    target: str
    registers: int
    shared: int
    stack: int
    load_bits: int  # widest load from global memory; 0 where it is not looked up


# ---- launches of the Triton kernels: recorded from the ops themselves


@contextmanager
def _recorded(variant: str, launches: list[Launch]) -> Iterator[None]:
    """Ops record their launches instead of running them."""

    def record(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: launches.append(Launch(kernel, variant, arguments, options))

    with (
        patch.object(JITFunction, "__getitem__", record),
        patch.object(triton_launch, "wrap_triton", lambda kernel: kernel),
    ):
        yield


def _matrix(rows: int, cols: int, dtype: torch.dtype, layout: str) -> Tensor:
    """`aligned` rows start at multiples of 16 bytes; `odd` ones do not; `huge` is 2^31 rows or columns."""
    if layout == "odd":
        return torch.empty(rows, cols + 3, dtype=dtype)[:, 1 : cols + 2]
    if layout == "huge":
        rows, cols = (2**31 + 16, cols) if rows < cols else (rows, 2**31 + 16)
        return torch.empty(rows, cols, dtype=dtype, device="meta")
    return torch.empty(rows, cols, dtype=dtype)


def importance_launches() -> list[Launch]:
    """Every mode and pair of dtypes for aligned rows; a mode of each number of tensors for the others."""
    launches: list[Launch] = []
    for dtype in DTYPES:
        for companion in dict.fromkeys((dtype, torch.float32)):
            for mode in MODES:
                if companion == dtype or not mode.startswith("magnitude"):
                    _record_importance(launches, mode, "aligned", dtype, companion)
            for mode in ("magnitude_l1", "first", "mixed"):
                _record_importance(launches, mode, "odd", dtype, companion)
    return _distinct(launches)


def _record_importance(
    launches: list[Launch], mode: str, layout: str, dtype: torch.dtype, companion: torch.dtype
) -> None:
    # Fisher diagonals and gradients may differ as well: both orders for `mixed`
    pairs = {(companion, companion)} | (
        {(companion, dtype), (dtype, companion)} if mode == "mixed" else set()
    )
    for grad_dtype, fisher_dtype in sorted(pairs, key=str):
        variant = "_".join(
            [mode, DTYPES[dtype], DTYPES[grad_dtype]]
            + ([DTYPES[fisher_dtype]] if mode == "mixed" else [])
            + [layout]
        )
        weight = _matrix(64, 64, dtype, layout)
        grad, fisher = _matrix(64, 64, grad_dtype, layout), _matrix(64, 64, fisher_dtype, layout)
        members = [[tensor] * 2 for tensor in (weight, grad, fisher)]
        sizes = [weight.shape[dim] for dim in (0, 1)]  # one unit
        with _recorded(variant, launches):
            triton_importance.unit_importance(*members, [0, 1], sizes, mode, [0, 0])


def gather_launches() -> list[Launch]:
    launches: list[Launch] = []
    keep = torch.arange(2)
    for word in triton_gather.WORDS.values():
        for layout in ("aligned", "odd", "huge"):
            for group_size in (1, 7, 64, 65) if layout != "huge" else (1, 64):
                # kept columns of an odd target are not a multiple of 16
                rows, cols = (3 * group_size, 160) if layout != "odd" else (3 * group_size, 161)
                source = _matrix(rows, cols, word, "aligned" if layout == "huge" else layout)
                columns = _matrix(64, 3 * group_size, word, "aligned" if layout == "huge" else layout)
                if layout == "huge":
                    source = torch.empty(rows, 2**31 + 16, dtype=word, device="meta")
                    columns = torch.empty(2**31 + 16, 3 * group_size, dtype=word, device="meta")
                device_keep = keep.to(source.device)
                variant = f"{8 * word.itemsize}bit_group{group_size}_{layout}"
                with _recorded(variant, launches):
                    for dim, tensor in enumerate((source, columns)):
                        group = group_size if tensor.shape[dim] % group_size == 0 else 1
                        triton_gather._gather(
                            tensor,
                            tensor.new_empty(
                                (2 * group, tensor.shape[1]) if dim == 0 else (tensor.shape[0], 2 * group)
                            ),
                            device_keep,
                            dim,
                            group,
                        )
    return _distinct(launches)


def similarity_launches() -> list[Launch]:
    launches: list[Launch] = []
    for dtype, name in DTYPES.items():
        for metric in METRICS:
            for layout in ("aligned", "odd", "huge"):
                hidden = _matrix(64, 160, dtype, layout)
                with _recorded(f"{metric}_{name}_{layout}", launches):
                    triton_similarity.residual_similarity(hidden, hidden, metric)
    return _distinct(launches)


def linear_launches() -> list[Launch]:
    launches: list[Launch] = []
    features = {"aligned": (64, 160), "odd": (64, 160), "large": (8192, 4096), "huge": (8192, 4096)}
    for dtype, name in DTYPES.items():
        for weight_dtype in dict.fromkeys((dtype, torch.float32)):
            for layout, (rows, cols) in features.items():
                x, dy = _matrix(48, cols, dtype, layout), _matrix(48, rows, dtype, layout)
                device = "meta" if layout == "huge" else "cpu"  # huge in tokens
                kind = "odd" if layout == "odd" else "aligned"
                weight = _matrix(dy.shape[1], cols, weight_dtype, kind).to(device)
                for dim in (0, 1):
                    variant = f"dim{dim}_{name}_{DTYPES[weight_dtype]}_{layout}"
                    size = weight.shape[dim]
                    with _recorded(variant, launches):
                        for group_size in (1, 16 if size % 16 == 0 else size):
                            triton_linear.linear_importance(x, dy, weight, dim, group_size)
    return _distinct(launches)


def activation_launches() -> list[Launch]:
    launches: list[Launch] = []
    for dtype, name in DTYPES.items():
        for layout in ("aligned", "odd", "huge"):
            x = _matrix(64, 160, dtype, layout)
            mean, m2 = x.new_empty((2, x.shape[1]), dtype=torch.float64).unbind()
            count = x.new_zeros((), dtype=torch.int64)
            with _recorded(f"stats_{name}_{layout}", launches):
                triton_activations.activation_stats(x, mean, m2, count)
    return _distinct(launches)


@cache
def all_launches() -> list[Launch]:
    return (
        importance_launches()
        + linear_launches()
        + gather_launches()
        + similarity_launches()
        + activation_launches()
    )


def _distinct(launches: list[Launch]) -> list[Launch]:
    """Without launches that compile to the same kernel as one before."""
    seen: dict[str, Launch] = {}
    target = TARGETS["sm_90"]
    for launch in launches:
        signature, constexprs, attrs, options = _specialisation(launch, target)
        key = f"{launch.kernel.__name__} {signature} {constexprs} {attrs} {options}"
        seen.setdefault(key, launch)
    return list(seen.values())


# ---- compilation


def _specialisation(launch: Launch, target: GPUTarget) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Types, constants and divisibility of a launch, worked out by Triton as for a launch."""
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **launch.options)
    _, signature, constexprs, attrs = launch.kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    return signature, constexprs, attrs, options


def compile_launch(launch: Launch, target_name: str) -> Any:
    target = TARGETS[target_name]
    signature, constexprs, attrs, options = _specialisation(launch, target)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=options)


def resources_of(launch: Launch, target_name: str) -> Resources:
    compiled = compile_launch(launch, target_name)
    measure = _measure_amd if target_name.startswith("gfx") else _measure_nvidia
    values = {**measure(compiled.asm), "shared": compiled.metadata.shared}  # set at launch, not in the code
    return Resources("triton", launch.kernel.__name__, launch.variant, target_name, **values)


def _resources_by_index(launch: int, target_name: str) -> Resources:
    return resources_of(all_launches()[launch], target_name)  # kernels do not travel between processes


def _measure_nvidia(asm: dict[str, Any]) -> dict[str, int]:
    """From the machine code: spilled registers live on the stack, local arrays in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert usage is not None, report
    registers, stack, local = (int(value) for value in usage.groups())
    loads = re.findall(r"\bld\.global(?:\.L\w+)*(?:\.v(\d))?\.\w(\d+)", asm["ptx"])
    return {
        "registers": registers,
        "stack": stack + local,
        "load_bits": max((int(count or 1) * int(bits) for count, bits in loads), default=0),
    }


def _measure_amd(asm: dict[str, Any]) -> dict[str, int]:
    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])
        assert match is not None, name
        return int(match.group(1))

    words = re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", asm["amdgcn"])
    return {
        "registers": value("vgpr_count"),
        "stack": value("private_segment_fixed_size")
        + 4 * (value("vgpr_spill_count") + value("sgpr_spill_count")),
        "load_bits": max((32 * int(count or 1) for count in words), default=0),
    }


def cuda_resources(nvcc: str, target_name: str) -> list[Resources]:
    """Of every kernel in csrc/cuda, from ptxas."""
    found = []
    for source in ("saliency", "gather", "similarity", "activations"):
        command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-arch={target_name}", "-cubin"]
        command += ["--ptxas-options=-v", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        pattern = (
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
        )
        for name, stack, stores, loads, registers, rest in re.findall(pattern, report, re.DOTALL):
            shared = re.search(r"(\d+) bytes smem", rest)
            found.append(
                Resources(
                    source="cuda",
                    **_demangled(name),
                    target=target_name,
                    registers=int(registers),
                    shared=int(shared.group(1)) if shared else 0,
                    stack=int(stack) + int(stores) + int(loads),
                    load_bits=0,
                )
            )
    return found


def _demangled(symbol: str) -> dict[str, str]:
    plain = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\w+)(?:<(.*?)>)?\(", plain.replace("(anonymous namespace)", ""))
    assert match is not None, plain
    return {"kernel": match.group(1), "variant": re.sub(r".*[:)]", "", match.group(2) or "")}


def sources_digest() -> str:
    """Of every file that decides what the compilers make: a table of other sources is stale."""
    sources = [ROOT / "csrc" / "kernels.h", *(ROOT / "csrc" / "cuda").iterdir(), Path(__file__)]
    sources += (ROOT / "adapt_pruner" / "kernels").glob("triton_*.py")
    digest = hashlib.sha256(f"triton {triton.__version__}".encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    count = len(all_launches())
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        targets = [target for target in TARGETS for _ in range(count)]
        rows = list(pool.map(_resources_by_index, list(range(count)) * len(TARGETS), targets, chunksize=16))
    nvcc = shutil.which("nvcc")
    for target in TARGETS if nvcc else ():
        if target.startswith("sm_"):
            rows += cuda_resources(str(nvcc), target)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    output.with_suffix(DIGEST.suffix).write_text(sources_digest() + "\n")
    print(f"{len(rows)} kernels -> {output}")


if __name__ == "__main__":
    main()
