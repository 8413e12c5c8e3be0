"""Rows of a benchmark: as CSV and back, and one run compared with another."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

_KEY = ("op", "provider", "backend", "shape", "dtype", "threads", "clock", "device")


@dataclass(frozen=True)
class Row:
    """One op by one provider on one shape.

    Attributes:
        op: a public op and its variant, such as unit_importance_rows; or roofline_NAME.
        provider: "eager", "eager_preallocated", "compile", "ours" or "roofline".
        backend: of "ours"; of the others the device's type.
        shape: "ROWSxCOLUMNS" of the weight.
        dtype: "fp32", "bf16" or "fp16".
        threads: of torch's CPU ops.
        ms_p20, ms_p50, ms_p80: milliseconds per call, quantiles over the rounds.
        gbps: bytes that the op must move, in 1e9 per second of the median.
        fraction_of_roofline: of the rate of `roofline` in this run; with gemm of its time.
        roofline: what bounds the op: "read", "read_one", "memcpy", "copy" or "gemm".
        extra_bytes: memory that a call needs at its peak beside what it works on; None if unknown.
        extra_of_tensor: the same as a fraction of a tensor of this shape, such as the weight's gradient.
        clock: "wall", "cpu" (CPU time per thread) or "cuda" (events on the device).
        device: name of the processor.
    """

    op: str
    provider: str
    backend: str
    shape: str
    dtype: str
    threads: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    gbps: float
    fraction_of_roofline: float
    roofline: str
    extra_bytes: int | None
    extra_of_tensor: float | None
    clock: str
    device: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row of another run has to share to be compared with this one."""
        return tuple(getattr(self, name) for name in _KEY)


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def to_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """What `to_csv` wrote.

    Raises:
        ValueError: a column is missing, or a value is not one.
    """
    types = get_type_hints(Row)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is not the kernels.csv of a benchmark: no column {', '.join(missing)}")
        try:
            return [Row(**{name: _parse(line[name], types[name]) for name in COLUMNS}) for line in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _parse(text: str, kind: Any) -> Any:
    if kind in (str, int, float):
        return kind(text)
    return None if text == "" else (int if kind == int | None else float)(text)


@dataclass(frozen=True)
class Regression:
    """A row that became slower, by its time and beside the roofline alike."""

    before: Row
    after: Row

    @property
    def slowdown(self) -> float:
        """Time after by time before."""
        return self.after.ms_p50 / self.before.ms_p50

    def to_dict(self) -> dict[str, Any]:
        key = dict(zip(_KEY, self.after.key, strict=True))
        values = {
            f"{name}_{when}": getattr(row, name)
            for name in ("ms_p50", "fraction_of_roofline")
            for when, row in (("before", self.before), ("after", self.after))
        }
        return {**key, **values, "slowdown": float(f"{self.slowdown:.4g}")}


@dataclass(frozen=True)
class Comparison:
    """Rows of this run beside those of an old one.

    Attributes:
        matched: rows that both have.
        unmatched: rows of the ops of this run that the old one does not have.
        old_devices: devices that the old run was measured on and this one not.
        regressions: the slower ones, the worst first.
    """

    matched: int
    unmatched: int
    old_devices: tuple[str, ...]
    regressions: tuple[Regression, ...]

    def to_dict(self) -> dict[str, Any]:
        found = [r.to_dict() for r in self.regressions]
        return {**dataclasses.asdict(self), "regressions": found}


def compare(old: Sequence[Row], new: Sequence[Row], threshold: float) -> Comparison:
    """Flags ops of ours whose time grew and whose fraction of the roofline fell by more than `threshold`.

    Both are asked for: a machine that is slower today is slower at its rooflines too, and a roofline that
    was measured badly changes no time.
    """
    before = {row.key: row for row in old}
    measured = [row for row in new if row.provider == "ours"]
    pairs = [Regression(before[row.key], row) for row in measured if row.key in before]
    slower = [
        pair
        for pair in pairs
        if pair.after.ms_p50 > pair.before.ms_p50 * (1 + threshold)
        and pair.before.fraction_of_roofline > pair.after.fraction_of_roofline * (1 + threshold)
    ]
    devices = {row.device for row in new}
    return Comparison(
        len(pairs),
        len(measured) - len(pairs),
        tuple(sorted({row.device for row in old} - devices)),
        tuple(sorted(slower, key=lambda pair: -pair.slowdown)),
    )
