"""results.md, results.csv and results.png, from the JSON files of a comparison and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint import write_text
from adapt_pruner.comparison.rows import DENSE, Row
from adapt_pruner.comparison.table import MEANS, Line, table, tasks_of, to_csv
from adapt_pruner.report.plots import plot_comparison

_EXPLAINED = """\
Perplexity, accuracy and speed are those of the saved models. Accuracy is normalised by length where lm-eval
does so, with 0 shots; the number behind ± is a standard error. A difference is the mean over tasks of the
accuracy minus that of {baseline}, on the same questions, with the standard error of the paired differences.
"Above chance" is the mean over those tasks alone that the dense model does better than guessing, by more than
two standard errors. Pruning seconds are those of the rounds, without loading and saving; the peak is the
memory of the process that pruned (on a GPU what was allocated there). Tokens per second are those of a
forward pass of {batch} x {tokens} tokens, before and after, the two models taking turns.
"""


def read_comparison(output: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a comparison, model by model, higher targets first, and what they share."""
    info = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    files = [output / "rows" / f"{name}.json" for name in info["rows"]]
    rows = [Row.load(file) for file in files if file.exists()]
    models = list(dict.fromkeys(row.model for row in rows))
    rows.sort(key=lambda row: (models.index(row.model), -2.0 if row.target is None else -row.target))
    return rows, info


def write_page(output: Path) -> None:
    """Writes the three files anew."""
    rows, info = read_comparison(output)
    lines = table(rows, info)
    share = "non_embedding_kept" if info["settings"]["target_of"] == "non-embedding" else "parameters_kept"
    plotted = plot_comparison(lines, output / "results.png", share=share)
    write_text(output / "results.csv", to_csv(lines))
    write_text(output / "results.md", _page(rows, lines, info, plotted=plotted))


def _page(rows: Sequence[Row], lines: Sequence[Line], info: Mapping[str, Any], *, plotted: bool) -> str:
    settings = info["settings"]
    explained = _EXPLAINED.format(
        baseline=info["baseline"], batch=settings["latency_batch"], tokens=settings["latency_tokens"]
    )
    parts = ["# Comparison of pruning methods\n", explained]
    if plotted:
        parts.append("![Perplexity and mean accuracy over the share that is kept](results.png)\n")
    for model in dict.fromkeys(line["model"] for line in lines):
        parts += _model(model, [line for line in lines if line["model"] == model], info["baseline"])
    parts += ["## How it was made\n", "```sh", *info["calls"], "```\n"]
    parts.append(_table(["setting", "value"], [[f"`{k}`", _plain(v)] for k, v in settings.items()]))
    environments = {
        json.dumps(environment, sort_keys=True): environment
        for row in rows
        for environment in row.environments
    }
    for environment in environments.values():
        parts.append(_environment(environment))
    return "\n".join(parts).rstrip() + "\n"


def _model(model: str, lines: Sequence[Line], baseline: str) -> list[str]:
    header = ["method", "target", "parameters", "kept", "non-embedding kept", "perplexity"]
    tasks = tasks_of(lines)
    means = [name for name in MEANS if any(line.get(name) is not None for line in lines)]
    for name in means:
        title = {"mean": "mean accuracy", "mean_above_chance": "above chance"}[name]
        header += [title, f"minus {baseline}"]
    header += ["pruning s", "rounds", "peak GiB", "tokens/s before", "after"]
    cells = []
    for line in lines:
        row = [
            line["method"],
            _number(line["target"], "g"),
            _number(line["parameters"], ",d"),
            _number(line["parameters_kept"], ".2%"),
            _number(line["non_embedding_kept"], ".2%"),
            _number(line["perplexity"], ".2f" if (line["perplexity"] or 0) < 1e5 else ".2e"),
        ]
        for name in means:
            row += [_measured(line, name), _measured(line, f"{name}_difference", sign="+")]
        row += [
            _number(line["prune_seconds"], ".1f"),
            _number(line["rounds"], "d"),
            _number(None if line["peak_memory_bytes"] is None else line["peak_memory_bytes"] / 2**30, ".2f"),
            _number(line["tokens_per_second_before"], ".0f"),
            _number(line["tokens_per_second"], ".0f"),
        ]
        cells.append(row)
    parts = [f"## {model}\n", _table(header, cells)]
    if tasks:
        rows = [
            [line["method"], _number(line["target"], "g"), *(_measured(line, task) for task in tasks)]
            for line in lines
        ]
        parts.append(_table(["method", "target", *tasks], rows))
    notes = [f"- {_title(line)}: {line['note']}" for line in lines if line["note"]]
    notes += [f"- {_title(line)} failed, {line['failure']}" for line in lines if line["failure"]]
    return [*parts, *([*notes, ""] if notes else [])]


def _title(line: Line) -> str:
    return line["method"] if line["method"] == DENSE else f"{line['method']} at {line['target']:g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _measured(line: Line, name: str, *, sign: str = "") -> str:
    value, error = line.get(name), line.get(f"{name}_stderr")
    if value is None:
        return "-"
    return format(value, f"{sign}.4f") + ("" if error is None else f" ± {error:.4f}")


def _plain(value: Any) -> str:
    return "not given" if value is None else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _environment(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    where = [environment["processor"], f"{environment['threads']} threads", *environment["cuda_devices"]]
    return (
        f"{', '.join(filter(None, where))} ({environment['machine']}); Python {environment['python']}, "
        f"{versions}; revision {environment['revision'] or 'unknown'}.\n"
    )
