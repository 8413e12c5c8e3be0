"""PNG figure of a benchmark: rates beside the rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapt_pruner.bench.results import Row

_COLOURS = {"eager": "#999999", "eager_preallocated": "#e08e0b", "compile": "#6f4e9c", "ours": "#3574b2"}
_OTHER_BACKENDS = {"cuda": "#2e8b57", "triton": "#c0392b"}


def plot_rooflines(rows: Sequence[Row], path: Path) -> None:
    """GB/s over the bytes of a tensor, a panel for each op, dtype and device; the roofline is the black line.

    Args:
        rows: at least one of an op, with its rooflines.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.provider != "roofline"]
    ops = list(dict.fromkeys(row.op for row in measured))
    columns = list(dict.fromkeys((row.device, row.dtype) for row in measured))
    figure = Figure(figsize=(4.5 * len(columns) + 1, 2.2 * len(ops) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ops), len(columns), squeeze=False, sharex=True)
    handles = {}
    for i, op in enumerate(ops):
        for j, column in enumerate(columns):
            axis = axes[i][j]
            here = [row for row in measured if row.op == op and (row.device, row.dtype) == column]
            lines: dict[tuple[str, str], list[Row]] = {}
            for row in here:
                lines.setdefault((row.provider, row.backend), []).append(row)
            bound: dict[float, float] = {}
            for row in here:
                bound[_elements(row)] = row.gbps / row.fraction_of_roofline
            (line,) = axis.plot(*zip(*sorted(bound.items()), strict=True), "k_-", ms=14, lw=1)
            handles["roofline"] = line
            for (provider, backend), points in lines.items():
                label = f"ours ({backend})" if provider == "ours" else provider
                colour = _OTHER_BACKENDS.get(backend, "#3574b2") if provider == "ours" else _COLOURS[provider]
                points.sort(key=_elements)
                (line,) = axis.plot(
                    [_elements(p) for p in points], [p.gbps for p in points], "o-", ms=4, lw=1, color=colour
                )
                handles[label] = line
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(op, fontsize=9)
            if j == 0:
                axis.set_ylabel("GB/s")
            if i == 0:
                axis.annotate(
                    f"{column[0]}\n{column[1]}", (0.5, 1.25), xycoords="axes fraction", ha="center", fontsize=9
                )
            if i == len(ops) - 1:
                axis.set_xlabel("elements of the weight")
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False
    )
    figure.savefig(path, dpi=110)


def _elements(row: Row) -> float:
    rows, columns = row.shape.split("x")
    return float(rows) * float(columns)
