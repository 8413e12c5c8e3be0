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
