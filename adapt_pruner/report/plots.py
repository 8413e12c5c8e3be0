"""PNG figures of a pruning run and of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "kv_group": "KV groups", "query_head": "query heads", "channel": "MLP channels", "expert": "experts"
}  # fmt: skip


def plot_run(records: Sequence[dict[str, Any]], path: Path, *, initial: Sequence[dict[str, int]]) -> None:
    """Widths per layer after each iteration, and layer importance of the first and last iteration.

    Args:
        records: contents of iterations/NNN.json, in order; at least one.
        path: PNG file to write.
        initial: per layer, number of units of each kind before pruning.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for layer in initial for kind in layer))
    layers = np.arange(len(initial))
    figure = Figure(figsize=(10, 2.6 * (len(kinds) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds) + 1, 1, sharex=True)
    for axis, kind in zip(axes, kinds, strict=False):
        before = [layer.get(kind, 0) for layer in initial]
        after = [layer.get(kind, 0) for layer in records[-1]["units"]]
        axis.bar(layers, before, color="#d9d9d9", label="before")
        axis.bar(layers, after, color="#3574b2", label="after")
        axis.set_ylabel(NAMES[kind])
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    importance = axes[-1]
    first, last = records[0], records[-1]
    importance.plot(layers, first["layer_importance_normalised"], "o-", ms=3, color="#999999")
    importance.plot(layers, last["layer_importance_normalised"], "o-", ms=3, color="#c0392b")
    importance.legend([f"iteration {first['iteration']}", f"iteration {last['iteration']}"], frameon=False)
    importance.set_ylabel("layer importance\n(normalised)")
    importance.set_xlabel("decoder layer")
    figure.savefig(path, dpi=120)


def plot_comparison(lines: Sequence[dict[str, Any]], path: Path, *, share: str) -> bool:
    """Perplexity and mean accuracy over the share that is kept, a row of panels for each model.

    Args:
        lines: of the table of a comparison.
        path: PNG file to write.
        share: column of the share that is kept.
    Returns:
        whether there was anything to plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (column, title)
        for column, title in (("perplexity", "perplexity"), ("mean", "mean accuracy"))
        if any(line.get(column) is not None for line in lines)
    ]
    models = list(dict.fromkeys(line["model"] for line in lines))
    if not panels:
        path.unlink(missing_ok=True)
        return False
    figure = Figure(figsize=(5 * len(panels), 3.6 * len(models) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models), len(panels), squeeze=False)
    methods = list(dict.fromkeys(line["method"] for line in lines if line["target"] is not None))
    handles = {}
    for i, model in enumerate(models):
        for j, (column, title) in enumerate(panels):
            axis = axes[i][j]
            measured = [line for line in lines if line["model"] == model and line.get(column) is not None]
            for line in measured:
                if line["target"] is None:
                    handles["dense"] = axis.axhline(line[column], color="black", ls="--", lw=1)
            for number, method in enumerate(methods):
                points = sorted((p for p in measured if p["method"] == method), key=lambda p: p[share])
                if points:
                    errors = [p.get(f"{column}_stderr") or 0.0 for p in points]
                    handles[method] = axis.errorbar(
                        [p[share] for p in points],
                        [p[column] for p in points],
                        errors if any(errors) else None,
                        capsize=2,
                        **_style(number),
                    )
            axis.set_title(model, fontsize=9)
            axis.set_xlabel(f"{share.removesuffix('_kept').replace('_', '-')} parameters kept")
            axis.set_ylabel(title)
            if column == "perplexity" and measured:
                _logarithmic(axis)
    _save(figure, handles, path)
    return True


def plot_calibration(lines: Sequence[dict[str, Any]], path: Path, *, curve: Callable[[str], str]) -> bool:
    """Perplexity over the calibration tokens of all rounds, a row of panels for each model, one per target.

    Args:
        lines: of the table of a comparison.
        path: PNG file to write.
        curve: of the name of a method, the name of the curve that it is a point of.
    Returns:
        whether there was a curve: two points of one that differ in their tokens. The figure would say no more
        than the table without, and is not written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[tuple[str, float], dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        if line["calibration_tokens"] is not None and line["perplexity"] is not None:
            panel = curves.setdefault((line["model"], line["target"]), {})
            point = (line["calibration_tokens"], line["perplexity"])
            panel.setdefault(curve(line["method"]), []).append(point)
    several = [any(len({x for x, _ in p}) > 1 for p in panel.values()) for panel in curves.values()]
    if not any(several):
        path.unlink(missing_ok=True)
        return False
    models = list(dict.fromkeys(model for model, _ in curves))
    targets = sorted({target for _, target in curves}, reverse=True)
    names = list(dict.fromkeys(name for panel in curves.values() for name in panel))
    figure = Figure(figsize=(5 * len(targets), 3.6 * len(models) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models), len(targets), squeeze=False)
    handles = {}
    for i, model in enumerate(models):
        for j, target in enumerate(targets):
            axis, panel = axes[i][j], curves.get((model, target), {})
            for name, points in panel.items():
                x, y = zip(*sorted(points), strict=True)
                handles[name] = axis.errorbar(x, y, **_style(names.index(name)))
            axis.set_title(f"{model} at {target:g}", fontsize=9)
            axis.set_xlabel("calibration tokens read in all")
            axis.set_ylabel("perplexity")
            if panel:
                axis.set_xscale("log")
                _logarithmic(axis)
    _save(figure, handles, path)
    return True


def _style(number: int) -> dict[str, Any]:
    """Of one of many curves: ten colours, then another marker."""
    return {"fmt": f"{'os^D'[number // 10 % 4]}-", "ms": 4, "color": f"C{number % 10}"}


def _logarithmic(axis: Axes) -> None:
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _save(figure: Figure, handles: dict[str, Any], path: Path) -> None:
    """Writes a figure with its legend, in as many columns as the longest name leaves room for."""
    longest = 0.7 + 0.085 * max(map(len, handles))  # inches
    columns = max(1, min(4, int(figure.get_figwidth() / longest)))
    height = 0.22 * (math.ceil(len(handles) / columns) - 1)  # of the lines beyond the first
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False
    )
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
