"""`adapt-pruner bench kernels`: measures the selected cases and writes what was found."""

from __future__ import annotations

import dataclasses
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
from adapt_pruner.checkpoint import atomic_directory, require_empty, write_json, write_text
from adapt_pruner.config import BenchConfig
from adapt_pruner.kernels import BackendUnavailable, build_info
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
    with _threads(config.threads), torch.no_grad():
        settings = _environment(config, selection)
        rows: list[Row] = []
        for device, shape, dtype, ops in problems:
            _log.info("%s %s on %s: %d ops", _text(shape), dtype, device, len(ops))
            rows += _measure(config, selection, device, shape, dtype, ops, notes)
    measured = {row.provider for row in rows}
    if len(selection.providers) == 1 and selection.providers[0] not in measured:
        raise BackendUnavailable("; ".join(notes))
    comparison = compare(old, rows, config.threshold) if old is not None else None
    result = BenchResult(settings, tuple(rows), tuple(notes), comparison)
    if config.output:
        _write(result, config, Path(config.output))
    return result


def _what_fits(
    selection: Selection, notes: dict[str, None]
) -> list[tuple[torch.device, Shape, str, list[Op]]]:
    """The problems to measure; what is left out goes to the notes.

    Raises:
        ValueError: nothing is left.
    """
    problems = []
    for device in selection.backends:
        free = free_bytes(device)
        for shape in selection.shapes:
            for dtype in selection.dtypes:
                ops = []
                for op in selection.ops:
                    needed = needed_bytes(shape, dtype, op, selection.providers)
                    if needed > free:
                        notes[
                            f"{op.name} {_text(shape)} {dtype} on {device} left out: it needs about "
                            f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
                        ] = None
                    elif op.needs_heads and head_size(shape[1]) is None:
                        notes[f"{op.name} {_text(shape)} left out: its columns are no heads of 64 or 128"] = (
                            None
                        )
                    else:
                        ops.append(op)
                if ops:
                    problems.append((device, shape, dtype, ops))
    for note in notes:
        _log.warning("%s", note)
    if not problems:
        raise ValueError(f"nothing can be measured: {'; '.join(notes)}")
    return problems


def _measure(
    config: BenchConfig,
    selection: Selection,
    device: torch.device,
    shape: Shape,
    dtype: str,
    ops: list[Op],
    notes: dict[str, None],
) -> list[Row]:
    buffers = Buffers(shape, DTYPES[dtype], device, config.seed)
    cases = []
    for bound in rooflines(buffers, ops):
        bound.run()
        cases.append(
            Case(f"roofline_{bound.name}", "roofline", device.type, bound.bound, bound.bytes_moved, bound.run)
        )
    if "compile" in selection.providers:
        torch.compiler.reset()  # it would stop compiling the same functions after some shapes
    for op in ops:
        for case in _cases(op, selection, buffers):
            try:
                for _ in range(2):  # compiles, and touches what it writes
                    case.run()
            except BackendUnavailable as error:
                _leave_out(case, str(error), notes)
            except Exception as error:  # of a compiler, in one of its many ways
                if case.provider != "compile":
                    raise
                _leave_out(case, f"torch.compile failed: {error}", notes)
            else:
                cases.append(case)
    timer = make_timer(device, config.clock, torch.get_num_threads())
    extra = [timer.extra_bytes(case.run) for case in cases]
    seconds = take_turns([case.run for case in cases], timer, config.rounds)
    by_roofline = {
        case.op.removeprefix("roofline_"): case.bytes_moved / statistics.median(measured)
        for case, measured in zip(cases, seconds, strict=True)
        if case.provider == "roofline"
    }
    rows = []
    for case, measured, extra_bytes in zip(cases, seconds, extra, strict=True):
        p20, p50, p80 = (_rounded(v * 1e3) for v in np.quantile(measured, (0.2, 0.5, 0.8)))
        rate = case.bytes_moved / statistics.median(measured)
        rows.append(
            Row(
                op=case.op,
                provider=case.provider,
                backend=case.backend,
                shape=_text(shape),
                dtype=dtype,
                threads=torch.get_num_threads(),
                ms_p20=p20,
                ms_p50=p50,
                ms_p80=p80,
                gbps=_rounded(rate / 1e9),
                fraction_of_roofline=_rounded(rate / by_roofline[case.roofline]),
                roofline=case.roofline,
                extra_bytes=extra_bytes,
                extra_of_tensor=None if extra_bytes is None else _rounded(extra_bytes / buffers.bytes),
                clock=config.clock if device.type == "cpu" else "cuda",
                device=_device_name(device),
            )
        )
    return rows


def _cases(op: Op, selection: Selection, buffers: Buffers) -> Iterator[Case]:
    device = buffers.device
    moved = op.bytes_moved(buffers.shape, buffers.dtype.itemsize)
    for provider in selection.providers:
        for backend in selection.backends[device] if provider == "ours" else (device.type,):
            run = op.providers(buffers, provider, backend)
            yield Case(op.name, provider, backend, op.bound_on(device), moved, run)


def _leave_out(case: Case, reason: str, notes: dict[str, None]) -> None:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    note = f"{case.op} by {case.provider} ({case.backend}) left out: {lines[0] if lines else reason}"
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
