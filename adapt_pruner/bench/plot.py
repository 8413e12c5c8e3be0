"""PNG figure of a benchmark: rates beside the rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapt_pruner.bench.results import Row

_COLOURS = {"eager": "#999999", "eager_preallocated": "#e08e0b", "compile": "#6f4e9c"}
_COLOURS_OF_OURS = {"cpu": "#3574b2", "cuda": "#2e8b57", "triton": "#c0392b"}


def plot_rooflines(rows: Sequence[Row], path: Path) -> None:
    """GB/s on each shape, a panel for each op, dtype and device; rooflines are the black bars.

    Args:
        rows: at least one of an op.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.provider != "roofline"]
    ops = list(dict.fromkeys(row.op for row in measured))
    columns = list(dict.fromkeys((row.device, row.dtype) for row in measured))
    shapes = sorted({row.shape for row in measured}, key=_size)
    width = max(3.5, 0.4 * len(shapes))
    figure = Figure(figsize=(width * len(columns) + 1, 2.2 * len(ops) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ops), len(columns), squeeze=False, sharex=True, sharey="row")
    handles = {}
    for i, op in enumerate(ops):
        for j, column in enumerate(columns):
            axis = axes[i][j]
            here = [row for row in measured if row.op == op and (row.device, row.dtype) == column]
            lines: dict[tuple[str, str], list[Row]] = {}
            for row in here:
                lines.setdefault((row.provider, row.backend), []).append(row)
            limits = [row.gbps / row.fraction_of_roofline for row in here]
            places = [shapes.index(row.shape) for row in here]
            (handles["roofline"],) = axis.plot(places, limits, "k_", ms=22, mew=1.5)
            for (provider, backend), points in lines.items():
                ours = provider == "ours"
                (handles[f"ours ({backend})" if ours else provider],) = axis.plot(
                    [shapes.index(point.shape) for point in points],
                    [point.gbps for point in points],
                    "o",
                    ms=5,
                    color=_COLOURS_OF_OURS[backend] if ours else _COLOURS[provider],
                )
            axis.set_yscale("log")
            axis.set_xlim(-0.5, len(shapes) - 0.5)
            axis.set_xticks(range(len(shapes)), shapes, rotation=90 if len(shapes) > 3 else 0)
            axis.set_title(op if i else f"{column[0]}, {column[1]}\n\n{op}", fontsize=9)
        axes[i][0].set_ylabel("GB/s")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def _size(shape: str) -> tuple[int, int]:
    rows, columns = (int(n) for n in shape.split("x"))
    return rows * columns, rows
