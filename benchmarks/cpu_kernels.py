"""The CPU kernels as fractions of what the memory can do, measured in turns in one run.

    python benchmarks/cpu_kernels.py [--threads 2] [--rounds 15] [--only gather]

Prints CSV: shape, dtype, op, wall ms per call (p20, p50, p80), CPU ms per thread (p50), GB/s and fractions of
the bandwidth that bounds it. GB/s and fractions come from the CPU time (`--clock cpu`, the default, for
cores that are shared with other work) or from the wall time. Bytes are those an op must move: importance and
similarity read both tensors; a row gather and runs read and write the kept part; a random column gather reads
the whole source. Reads are bounded by `read`; gathers by `memcpy` and, in a column of its own, by a copy with
streaming stores, which does not read the target's lines first.

Outputs are preallocated (`out=`) and touched before the clock starts, so page faults cost nothing; the
allocator (glibc's unless LD_PRELOAD says otherwise) and the huge-page setting are printed with the table.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapt_pruner.kernels import build_info, gather_units, residual_similarity, unit_importance

SHAPES = [(4096, 14336), (14336, 4096)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = 128  # columns of an attention head
KEPT = 0.75
READ, COPY = ("read",), ("memcpy", "copy streaming")
REPEATS = 5  # calls per measurement: the CPU clock may tick every 4 ms only


@dataclass
class Case:
    """One op: what it does, the bytes it must move, and what it measured."""

    name: str
    run: Callable[[], object]
    bytes: int
    bounds: tuple[str, ...] = ()  # names of the cases that bound it; empty for those themselves
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, threads: int) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(REPEATS):
            self.run()
        self.wall.append((time.perf_counter() - wall) / REPEATS)
        self.cpu.append((time.process_time() - cpu) / threads / REPEATS)


def compile_bandwidth(folder: str) -> ctypes.CDLL:
    library = Path(folder) / "libbandwidth.so"
    source = Path(__file__).with_name("bandwidth.cpp")
    command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def random_units(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[: int(count * KEPT)].sort().values


def cases(shape: tuple[int, int], dtype: torch.dtype, bandwidth: ctypes.CDLL) -> list[Case]:
    rows, columns = shape
    weight, other = (torch.randn(shape).to(dtype) for _ in range(2))
    by_rows = torch.zeros(int(rows * KEPT), columns, dtype=dtype)
    by_columns = by_rows.view(rows, -1)  # as large, and never used at the same time
    kept, both = by_rows.nbytes, weight.nbytes + other.nbytes

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def native(name: str, first: Tensor, second: Tensor, count: int) -> Callable[[], object]:
        function = getattr(bandwidth, name)
        return lambda: function(pointer(first), pointer(second), ctypes.c_int64(count))

    def gather(dim: int, group_size: int) -> Callable[[], object]:
        keep = random_units(shape[dim] // group_size)
        out = [by_columns if dim else by_rows]
        return lambda: gather_units([weight], [dim], [group_size], keep, out=out)

    def importance(dim: int) -> Callable[[], object]:
        return lambda: unit_importance([weight], [other], [dim], [1])

    return [
        Case("read", native("read_pair", weight, other, weight.nbytes), both),
        Case("memcpy", native("copy", by_rows, weight, kept), 2 * kept),
        Case("copy streaming", native("copy_streaming", by_rows, weight, kept), 2 * kept),
        Case("importance rows", importance(0), both, READ),
        Case("importance columns", importance(1), both, READ),
        Case("similarity cosine", lambda: residual_similarity(weight, other), both, READ),
        Case("gather rows", gather(0, 1), 2 * kept, COPY),
        Case("gather columns", gather(1, 1), weight.nbytes + kept, COPY),
        Case(f"gather runs of {HEAD}", gather(1, HEAD), 2 * kept, COPY),
    ]


def print_table(shape: tuple[int, int], dtype: str, measured: list[Case], clock: str) -> None:
    def rate(case: Case) -> float:
        return case.bytes / statistics.median(case.cpu if clock == "cpu" else case.wall) / 1e9

    rates = {case.name: rate(case) for case in measured if not case.bounds}
    for case in measured:
        p20, p50, p80 = (statistics.quantiles(case.wall, n=10)[i] * 1e3 for i in (1, 4, 7))
        times = f"{p20:.2f},{p50:.2f},{p80:.2f},{statistics.median(case.cpu) * 1e3:.2f}"
        fractions = [f"{rate(case) / rates[bound]:.3f}" for bound in case.bounds]
        row = f"{shape[0]}x{shape[1]},{dtype},{case.name},{times},{rate(case):.1f}"
        print(",".join([row, *fractions, *[""] * (2 - len(fractions))]), flush=True)


def print_setting(threads: int, clock: str) -> None:
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    setting = {
        "threads": threads,
        "clock": clock,
        "isa": build_info()["cpu_isa"],
        "LD_PRELOAD": os.environ.get("LD_PRELOAD", ""),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
        "huge pages": huge_pages.read_text().strip() if huge_pages.exists() else "unknown",
    }
    print("# " + "; ".join(f"{name}: {value or 'unset'}" for name, value in setting.items()))
    print("shape,dtype,op,ms_p20,ms_p50,ms_p80,cpu_ms_p50,gb_per_s,fraction,fraction_of_streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--only", default="", help="ops whose name contains this, beside the bounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_setting(options.threads, options.clock)
    with tempfile.TemporaryDirectory() as folder:
        bandwidth = compile_bandwidth(folder)
        for shape in SHAPES:
            for name, dtype in DTYPES.items():
                chosen = [c for c in cases(shape, dtype, bandwidth) if not c.bounds or options.only in c.name]
                for case in chosen:
                    case.run()
                for _ in range(options.rounds):
                    for case in chosen:
                        case.measure(options.threads)
                print_table(shape, name, chosen, options.clock)


if __name__ == "__main__":
    main()
