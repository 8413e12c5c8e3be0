"""PNG figures of a pruning run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    from matplotlib.ticker import LogFormatter

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
                        fmt="o-",
                        ms=4,
                        capsize=2,
                        color=f"C{number}",
                    )
            axis.set_title(model, fontsize=9)
            axis.set_xlabel(f"{share.removesuffix('_kept').replace('_', '-')} parameters kept")
            axis.set_ylabel(title)
            if column == "perplexity" and measured:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(LogFormatter())
                axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
    return True
