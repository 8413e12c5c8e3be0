"""The numbers of a comparison, a line for each row, from what the rows have measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from adapt_pruner.comparison.rows import DENSE, Row
from adapt_pruner.evaluation.multiple_choice import mean_of_tasks, paired_difference

Line = dict[str, Any]
Measured = tuple[float, float | None]  # a value and its standard error, where that is known

# Means over tasks: of all of them, and of those that the dense model does better than guessing.
MEANS = ("mean", "mean_above_chance")
_FIRST = (
    "model", "method", "target", "parameters", "parameters_kept", "non_embedding", "non_embedding_kept",
    "perplexity", "bits_per_byte",
)  # fmt: skip
_LAST = (
    "prune_seconds", "calibration_tokens", "rounds", "peak_memory_bytes", "tokens_per_second_before",
    "tokens_per_second", "note", "failure",
)  # fmt: skip


def table(rows: Sequence[Row], info: Mapping[str, Any]) -> list[Line]:
    """A line for each row with the same columns, None where a row has no such number.

    Accuracies are normalised by length where lm-eval does so. A difference is that to the baseline method at
    the same target, or to the dense model if that is the baseline, on the same questions.
    """
    lines = []
    for row in rows:
        alike = [other for other in rows if other.model == row.model]
        dense = next((other for other in alike if other.method == DENSE), None)
        targets = (None,) if info["baseline"] == DENSE else (row.target,)
        baseline = next((o for o in alike if o.method == info["baseline"] and o.target in targets), None)
        lines.append(_line(row, alike, dense, baseline))
    columns = [
        *_FIRST,
        *dict.fromkeys(c for line in lines for c in line if c not in (*_FIRST, *_LAST)),
        *_LAST,
    ]
    return [{column: line.get(column) for column in columns} for line in lines]


def _line(row: Row, alike: Sequence[Row], dense: Row | None, baseline: Row | None) -> Line:
    size, speed = row.results.get("size"), row.results.get("speed", {})
    line: Line = {"model": row.model, "method": row.method, "target": row.target, "note": row.note}
    if size:
        for name in ("parameters", "non_embedding"):
            line |= {name: size[name], f"{name}_kept": size[name] / size[f"{name}_before"]}
    line |= {name: row.results.get("perplexity", {}).get(name) for name in ("perplexity", "bits_per_byte")}
    tasks = list(dict.fromkeys(task for other in alike for task in other.tasks))
    for task in tasks:
        if task in row.results:
            line[task], line[f"{task}_stderr"] = _accuracy(row, task)
    for name, of in zip(MEANS, (tasks, _above_chance(dense, tasks)), strict=True):
        if of and _has(row, of):
            line[name], line[f"{name}_stderr"] = mean_of_tasks([_accuracy(row, task) for task in of])
            if baseline is not None and baseline is not row and _has(baseline, of):
                difference = mean_of_tasks([_difference(row, baseline, task) for task in of])
                line[f"{name}_difference"], line[f"{name}_difference_stderr"] = difference
    pruning = row.results.get("pruning", {})
    line |= {
        "prune_seconds": pruning.get("seconds"),
        "calibration_tokens": pruning.get("calibration_tokens"),
        "rounds": pruning.get("iterations"),
        "peak_memory_bytes": pruning.get("peak_memory_bytes"),
        "tokens_per_second_before": speed.get("tokens_per_second_before"),
        "tokens_per_second": speed.get("tokens_per_second"),
        "failure": f"{row.failure.step}: {row.failure.reason}" if row.failure else None,
    }
    return line


def _has(row: Row, tasks: Sequence[str]) -> bool:
    return all(task in row.results for task in tasks)


def _accuracy(row: Row, task: str) -> Measured:
    result = row.results[task]
    kind = "accuracy" if result["accuracy_norm"] is None else "accuracy_norm"
    return result[kind], result[f"{kind}_stderr"]


def _correct(row: Row, task: str) -> list[bool]:
    result = row.results[task]
    return result["correct"] if result["correct_norm"] is None else result["correct_norm"]


def _difference(row: Row, baseline: Row, task: str) -> Measured:
    first, second = _correct(row, task), _correct(baseline, task)
    return paired_difference(first, second) if len(first) > 1 else (float(first[0]) - float(second[0]), None)


def _above_chance(dense: Row | None, tasks: Sequence[str]) -> list[str]:
    """Tasks that the dense model does better than guessing, by more than two standard errors."""
    if dense is None or not _has(dense, tasks):
        return []
    result = []
    for task in tasks:
        accuracy, error = _accuracy(dense, task)
        if error is not None and accuracy - 2 * error > dense.results[task]["chance"]:
            result.append(task)
    return result


def tasks_of(lines: Sequence[Line]) -> list[str]:
    """Tasks that the lines have an accuracy of, in the order of their columns."""
    means = {f"{name}{end}" for name in MEANS for end in ("", "_difference")}
    return [
        column
        for column in (lines[0] if lines else ())
        if f"{column}_stderr" in lines[0] and column not in means
        if any(line[column] is not None for line in lines)
    ]


def to_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return text.getvalue()
