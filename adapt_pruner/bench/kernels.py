"""`adapt-pruner bench kernels`: measures the selected cases and writes what was found."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from adapt_pruner.bench.cases import DTYPES, Buffers, Op, head_size, rooflines
from adapt_pruner.bench.layers import Shape
from adapt_pruner.bench.measure import free_bytes, make_timer, take_turns
from adapt_pruner.bench.plot import plot_rooflines
from adapt_pruner.bench.results import Comparison, Row, compare, read_csv, to_csv
from adapt_pruner.bench.selection import Selection, needed_bytes
from adapt_pruner.checkpoint import write_json, write_text
from adapt_pruner.config import BenchConfig
from adapt_pruner.kernels import BackendUnavailable, build_info
from adapt_pruner.output import atomic_directory, require_empty
from adapt_pruner.run import environment

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """What `bench kernels` measured.

    Attributes:
        environment: device, versions and the settings of the machine that times depend on.
        rows: rooflines and cases, in the order they were measured in.
        notes: what was left out, and why.
        comparison: with the earlier run that was named.
    """

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.environment,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "notes": list(self.notes),
            "comparison": self.comparison.to_dict() if self.comparison else None,
        }

    @property
    def failed(self) -> bool:
        """Whether the comparison found regressions, or nothing to compare."""
        return self.comparison is not None and (
            bool(self.comparison.regressions) or not self.comparison.matched
        )


@dataclass(frozen=True)
class Case:
    """A roofline or an op by one provider, ready to run."""

    op: str
    provider: str
    backend: str
    roofline: str
    bytes_moved: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """What is measured in turns: ops on one shape and dtype on one device."""

    device: torch.device
    shape: Shape
    dtype: str
    ops: tuple[Op, ...]

    def __str__(self) -> str:
        return f"{_text(self.shape)} {self.dtype} on {self.device}"


def bench_kernels(config: BenchConfig) -> BenchResult:
    """Measures the ops of pruning beside plain PyTorch and the bandwidth of the memory.

    Within a shape and dtype all cases and rooflines take turns, so that none has a quieter machine.

    Raises:
        ValueError: settings that name something there is not, or nothing of them fits into memory.
        BackendUnavailable: a named backend or provider cannot be used here.
        FileExistsError: the output directory is not empty.
    """
    selection = Selection.of(config)
    old = read_csv(Path(config.compare)) if config.compare else None
    if config.output:
        require_empty(Path(config.output))
    notes: dict[str, None] = {}
    problems = _what_fits(selection, notes)
    rows: list[Row] = []
    with _threads(config.threads), torch.no_grad():
        settings = _environment(config, selection)
        for problem in problems:
            _log.info("%s: %d ops", problem, len(problem.ops))
            rows += _measure(config, selection, problem, notes)
    measured = {row.provider for row in rows}
    if len(selection.providers) == 1 and selection.providers[0] not in measured:
        raise BackendUnavailable("; ".join(notes))
    comparison = compare(old, rows, config.threshold) if old is not None else None
    result = BenchResult(settings, tuple(rows), tuple(notes), comparison)
    if config.output:
        _write(result, config, Path(config.output))
    return result


def _what_fits(selection: Selection, notes: dict[str, None]) -> list[Problem]:
    """The problems to measure; what is left out goes to the notes.

    Raises:
        ValueError: nothing is left.
    """
    problems = []
    for device in selection.backends:
        free = free_bytes(device)
        for shape, dtype in itertools.product(selection.shapes, selection.dtypes):
            problem = Problem(device, shape, dtype, ())
            for op in selection.ops:
                ops = (*problem.ops, op)
                needed = needed_bytes(shape, dtype, ops, selection.providers)
                if op.needs_heads and head_size(shape[1]) is None:
                    _leave_out(f"{op.name} {_text(shape)}", "its columns are no heads of 64 or 128", notes)
                elif needed > free:
                    reason = (
                        f"about {needed / 2**30:.1f} GiB of memory are needed, {free / 2**30:.1f} are free"
                    )
                    _leave_out(f"{op.name} {problem}", reason, notes)
                else:
                    problem = dataclasses.replace(problem, ops=ops)
            if problem.ops:
                problems.append(problem)
    if not problems:
        raise ValueError(f"nothing can be measured: {'; '.join(notes)}")
    return problems


def _measure(
    config: BenchConfig, selection: Selection, problem: Problem, notes: dict[str, None]
) -> list[Row]:
    buffers = Buffers(problem.shape, DTYPES[problem.dtype], problem.device, config.seed)
    cases = _ready_cases(selection, problem, buffers, notes)
    timer = make_timer(problem.device, config.clock, torch.get_num_threads())
    extra = [timer.extra_bytes(case.run) for case in cases]
    seconds = take_turns([case.run for case in cases], timer, config.rounds)
    rates = [
        case.bytes_moved / statistics.median(measured) for case, measured in zip(cases, seconds, strict=True)
    ]
    limits = {case.op: rate for case, rate in zip(cases, rates, strict=True)}
    device_name = _device_name(problem.device)
    rows = []
    for case, measured, rate, extra_bytes in zip(cases, seconds, rates, extra, strict=True):
        p20, p50, p80 = (_rounded(v * 1e3) for v in np.quantile(measured, (0.2, 0.5, 0.8)))
        rows.append(
            Row(
                op=case.op,
                provider=case.provider,
                backend=case.backend,
                shape=_text(problem.shape),
                dtype=problem.dtype,
                threads=torch.get_num_threads(),
                ms_p20=p20,
                ms_p50=p50,
                ms_p80=p80,
                gbps=_rounded(rate / 1e9),
                fraction_of_roofline=_rounded(rate / limits[f"roofline_{case.roofline}"]),
                roofline=case.roofline,
                extra_bytes=extra_bytes,
                extra_of_tensor=None if extra_bytes is None else _rounded(extra_bytes / buffers.bytes),
                clock=config.clock if problem.device.type == "cpu" else "cuda",
                device=device_name,
            )
        )
    return rows


def _ready_cases(
    selection: Selection, problem: Problem, buffers: Buffers, notes: dict[str, None]
) -> list[Case]:
    """Rooflines and ops by every provider that can compute them; all have run."""
    cases = []
    for bound in rooflines(buffers, problem.ops):
        bound.run()
        name, device = f"roofline_{bound.name}", problem.device.type
        cases.append(Case(name, "roofline", device, bound.bound, bound.bytes_moved, bound.run))
    if "compile" in selection.providers:
        torch.compiler.reset()  # it would stop compiling the same functions after some shapes
    for op in problem.ops:
        for case in _cases(op, selection, buffers):
            try:
                for _ in range(2):  # compiles, and touches what it writes
                    case.run()
            except Exception as error:  # compilers fail in many ways
                if case.provider != "compile" and not isinstance(error, BackendUnavailable):
                    raise
                first_line = next((line for line in str(error).splitlines() if line.strip()), repr(error))
                failed = "torch.compile failed: " * (case.provider == "compile")
                what = f"{case.op} by {case.provider} ({case.backend})"
                _leave_out(what, failed + first_line.strip(), notes)
            else:
                cases.append(case)
    return cases


def _cases(op: Op, selection: Selection, buffers: Buffers) -> Iterator[Case]:
    device = buffers.device
    moved = op.bytes_moved(buffers.shape, buffers.dtype.itemsize)
    for provider in selection.providers:
        for backend in selection.backends[device] if provider == "ours" else (device.type,):
            run = op.providers(buffers, provider, backend)
            yield Case(op.name, provider, backend, op.bound_on(device), moved, run)


def _leave_out(what: str, reason: str, notes: dict[str, None]) -> None:
    note = f"{what} left out: {reason}"
    if note not in notes:
        _log.warning("%s", note)
    notes[note] = None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # the same in CSV and in JSON


def _text(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["processor"]


def _environment(config: BenchConfig, selection: Selection) -> dict[str, Any]:
    """Of a run, with what else times depend on."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        isa = build_info()["cpu_isa"]
    except BackendUnavailable:
        isa = None
    variables = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS")
    return {
        "device": ", ".join(_device_name(device) for device in selection.backends),
        **environment(),
        "cpu_isa": isa,
        "allocator": {name: os.environ.get(name) for name in variables},
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "settings": dataclasses.asdict(config),
    }


def _write(result: BenchResult, config: BenchConfig, output: Path) -> None:
    with atomic_directory(output) as directory:
        write_text(directory / "kernels.csv", to_csv(result.rows))
        write_json(directory / "environment.json", {**result.environment, "notes": list(result.notes)})
        write_text(directory / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        plot_rooflines(result.rows, directory / "rooflines.png")
        if result.comparison:
            write_json(directory / "comparison.json", result.comparison.to_dict())
