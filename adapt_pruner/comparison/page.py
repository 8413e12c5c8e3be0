"""The page of a comparison, its CSV and its figures, from the JSON files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint import write_text
from adapt_pruner.comparison.paths import without_paths
from adapt_pruner.comparison.rows import DENSE, Row
from adapt_pruner.comparison.table import MEANS, Line, table, tasks_of, to_csv
from adapt_pruner.comparison.variants import curve_name, method_name
from adapt_pruner.report.plots import plot_calibration, plot_comparison

_OFF = 0.005  # of its target, beyond which the share that a row keeps is noted

_EXPLAINED = """\
Perplexity, accuracy and speed are those of the saved models. Accuracy is normalised by length where lm-eval
does so, with 0 shots; the number behind ± is a standard error. A difference is the mean over tasks of the
accuracy minus that of {baseline}, on the same questions, with the standard error of the paired differences.
"Above chance" is the mean over those tasks alone that the dense model does better than guessing, by more than
two standard errors. Pruning seconds are those of the rounds, without loading and saving; the peak is the
memory of the process that pruned (on a GPU what was allocated there). Calibration tokens are those that all
rounds have read: rounds x sequences x tokens of each. Tokens per second are those of a forward pass of
{batch} x {tokens} tokens, before and after, the two models taking turns.
A target is a share of {share}; rows that miss theirs by more than {off:.1%} of it are noted.
"""


def read_comparison(output: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a comparison, model by model, higher targets first, and what they share."""
    info = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    files = [output / "rows" / f"{name}.json" for name in info["rows"]]
    rows = [Row.load(file) for file in files if file.exists()]
    models = list(dict.fromkeys(row.model for row in rows))
    rows.sort(key=lambda row: (models.index(row.model), -2.0 if row.target is None else -row.target))
    return rows, info


def write_page(output: Path, page: Path | None = None) -> None:
    """Writes results.md and what belongs to it anew, and the same under the name of another page."""
    rows, info = read_comparison(output)
    names = info.get("models", {})
    lines = [
        {
            **line,
            "model": names.get(line["model"], line["model"]),
            "note": line["note"] and without_paths(line["note"]),
            "failure": line["failure"] and without_paths(line["failure"]),
        }
        for line in table(rows, info)
    ]
    for path in filter(None, (output / "results.md", page)):
        figures = _plot(lines, path, share=_share(info))
        write_text(path.with_suffix(".csv"), to_csv(lines))
        write_text(path, _page(rows, lines, info, figures))


def _share(info: Mapping[str, Any]) -> str:
    """Column of what the targets are about."""
    of_all = info["settings"]["target_of"] == "all"
    return "parameters_kept" if of_all else "non_embedding_kept"


def _plot(lines: Sequence[Line], path: Path, *, share: str) -> list[str]:
    """The figures beside a page, in Markdown."""
    over_share, over_tokens = path.with_suffix(".png"), path.with_name(f"{path.stem}-calibration.png")
    figures = []
    if plot_comparison(lines, over_share, share=share):
        figures.append(f"![Perplexity and mean accuracy over the share that is kept]({over_share.name})\n")
    if plot_calibration(lines, over_tokens, curve=curve_name):
        figures.append(f"![Perplexity over the calibration tokens read in all]({over_tokens.name})\n")
    return figures


def _page(rows: Sequence[Row], lines: Sequence[Line], info: Mapping[str, Any], figures: Sequence[str]) -> str:
    settings = info["settings"]
    share = "all parameters" if settings["target_of"] == "all" else "the non-embedding parameters"
    explained = _EXPLAINED.format(
        baseline=info["baseline"],
        batch=settings["latency_batch"],
        tokens=settings["latency_tokens"],
        share=share,
        off=_OFF,
    )
    parts = ["# Comparison of pruning methods\n", _summary(rows, lines, share), explained, *figures]
    for model in dict.fromkeys(line["model"] for line in lines):
        parts += _model(model, [line for line in lines if line["model"] == model], info)
    parts += ["## How it was made\n", "```sh", *info["calls"], "```\n"]
    parts.append(markdown_table(["setting", "value"], [[f"`{k}`", _plain(v)] for k, v in settings.items()]))
    environments = {
        json.dumps(environment, sort_keys=True): environment
        for row in rows
        for environment in row.environments
    }
    for environment in environments.values():
        parts.append(environment_line(environment))
    return "\n".join(parts).rstrip() + "\n"


def _summary(rows: Sequence[Row], lines: Sequence[Line], share: str) -> str:
    """What was measured, and how long it took, in a sentence."""
    models = ", ".join(dict.fromkeys(line["model"] for line in lines))
    methods = {row.method for row in rows if row.target is not None}
    targets = sorted({row.target for row in rows if row.target is not None}, reverse=True)
    measured = ["Size", "speed"]
    if any("perplexity" in row.steps for row in rows):
        measured.append("perplexity")
    if tasks := {task for row in rows for task in row.tasks}:
        measured.append(f"accuracy on {len(tasks)} task{'s' * (len(tasks) > 1)}")
    pruned = ""
    if methods:
        kinds = {method_name(method) for method in methods}
        ways = f"{len(kinds)} method{'s' * (len(kinds) > 1)}"
        if len(methods) > len(kinds):
            ways += f" in {len(methods)} variants"
        pruned = f" and pruned by {ways} to {', '.join(f'{t:g}' for t in targets)} of {share}"
    minutes = sum(result["wall_seconds"] for row in rows for result in row.results.values()) / 60
    return (
        f"{', '.join(measured[:-1])} and {measured[-1]} of {models}, before pruning{pruned}: "
        f"{len(rows)} rows, whose steps took {minutes:.1f} minutes in all.\n"
    )


def _model(model: str, lines: Sequence[Line], info: Mapping[str, Any]) -> list[str]:
    header = ["method", "target", "parameters", "kept", "non-embedding kept", "perplexity"]
    tasks = tasks_of(lines)
    means = [name for name in MEANS if any(line.get(name) is not None for line in lines)]
    for name in means:
        title = {"mean": "mean accuracy", "mean_above_chance": "above chance"}[name]
        header += [title, f"minus {info['baseline']}"]
    header += ["pruning s", "calibration tokens", "rounds", "peak GiB", "tokens/s before", "after"]
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
            _number(line["calibration_tokens"], ",d"),
            _number(line["rounds"], "d"),
            _number(None if line["peak_memory_bytes"] is None else line["peak_memory_bytes"] / 2**30, ".2f"),
            _number(line["tokens_per_second_before"], ".0f"),
            _number(line["tokens_per_second"], ".0f"),
        ]
        cells.append(row)
    parts = [f"## {model}\n", markdown_table(header, cells)]
    if tasks:
        rows = [
            [line["method"], _number(line["target"], "g"), *(_measured(line, task) for task in tasks)]
            for line in lines
        ]
        parts.append(markdown_table(["method", "target", *tasks], rows))
    notes = [f"- {_title(line)}: {line['note']}" for line in lines if line["note"]]
    notes += [f"- {_title(line)} {missed}" for line in lines if (missed := _missed(line, _share(info)))]
    notes += [f"- {_title(line)} failed, {line['failure']}" for line in lines if line["failure"]]
    return [*parts, *([*notes, ""] if notes else [])]


def _title(line: Line) -> str:
    return line["method"] if line["method"] == DENSE else f"{line['method']} at {line['target']:g}"


def _missed(line: Line, share: str) -> str | None:
    """How far what is kept is from the target, if that is too far."""
    kept, target = line[share], line["target"]
    if kept is None or target is None or abs(kept - target) <= _OFF * target:
        return None
    relation = "above" if kept > target else "below"
    return f"keeps {kept:.2%}, {abs(kept / target - 1):.1%} {relation} its target: compare with care"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _measured(line: Line, name: str, *, sign: str = "") -> str:
    value, error = line.get(name), line.get(f"{name}_stderr")
    if value is None:
        return "-"
    return format(value, f"{sign}.4f") + ("" if error is None else f" ± {error:.4f}")


def _plain(value: Any) -> str:
    return "not given" if value is None else str(value)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells as Markdown."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def environment_line(environment: Mapping[str, Any]) -> str:
    """Hardware, versions and revision of a run in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    where = [environment["processor"], f"{environment['threads']} threads", *environment["cuda_devices"]]
    return (
        f"{', '.join(filter(None, where))} ({environment['machine']}); Python {environment['python']}, "
        f"{versions}; revision {environment['revision'] or 'unknown'}.\n"
    )
