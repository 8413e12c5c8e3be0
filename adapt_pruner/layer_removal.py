"""Rounds that remove whole decoder layers: those that change the residual stream least go first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from adapt_pruner.allocation import Floats, normalize_importance
from adapt_pruner.checkpoint import Checkpoint
from adapt_pruner.config import PruneConfig
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.families import Family, layer_widths
from adapt_pruner.plan import PruningPlan


def layer_parameters(checkpoint: Checkpoint, family: Family) -> list[int]:
    """Parameters of each layer."""
    layers = range(len(layer_widths(checkpoint.config)))
    prefixes = [family.layer_prefix.format(layer=layer) + "." for layer in layers]
    return [
        sum(info.numel for name, info in checkpoint.tensors.items() if name.startswith(prefix))
        for prefix in prefixes
    ]


def removable_parameters(sizes: Sequence[int], protected: Collection[int]) -> int:
    """Parameters that can always go by whole layers, one of which stays.

    Args:
        sizes: parameters of each layer.
        protected: numbers of layers that stay.
    """
    free = [size for layer, size in enumerate(sizes) if layer not in protected]
    return sum(free) - (0 if protected else max(free))


def select_layers(
    importance: Floats, sizes: Sequence[int], protected: Collection[int], excess: int
) -> list[int]:
    """The least important layers that have at least `excess` parameters together; of equal ones the first.

    Without the last one taken they have fewer.

    Args:
        importance, sizes: [layers], importance and parameters of each.
        protected: numbers of layers that are not taken.
        excess: at most `removable_parameters`.
    Returns:
        Numbers of layers, ascending.
    """
    taken: list[int] = []
    for layer in np.argsort(importance, kind="stable").tolist():
        if sum(sizes[i] for i in taken) >= excess:
            break
        if layer not in protected:
            taken.append(layer)
    return sorted(taken)


def remove_layers(
    config: PruneConfig,
    engine: InMemoryEngine,
    batch: Tensor,
    plan: PruningPlan,
    *,
    sizes: Sequence[int],
    protected: Collection[int],
    target: int,
    iteration: int,
) -> tuple[dict[str, Any], PruningPlan]:
    """One round: score the layers that are there, remove the least important; returns its record and plan.

    Of `iterations` equal parts of what can be removed at all it removes one, but at least a layer, and stops
    at the first layer that brings the model to the target or below.

    Args:
        plan: what is gone already.
        sizes: parameters of each layer of the base model.
        protected: numbers of layers of the base model that stay.
        target: parameters of the whole model.
    Source: arXiv 2403.03853 section 3, where all go in one round.
    """
    clock = [time.perf_counter()]
    scores = engine.score_layers(batch, micro_batch_size=config.micro_batch_size, metric=config.layer_metric)
    clock.append(time.perf_counter())
    assert config.iterations is not None  # resolved
    there = plan.kept_layers
    share = -(-removable_parameters(sizes, protected) // config.iterations)
    chosen = select_layers(
        scores.layer_importance,
        [sizes[i] for i in there],
        [now for now, layer in enumerate(there) if layer in protected],
        min(engine.num_parameters - target, share),
    )
    clock.append(time.perf_counter())
    engine.keep_layers([now for now in range(len(there)) if now not in chosen])
    clock.append(time.perf_counter())
    removed = [there[now] for now in chosen]
    plan = dataclasses.replace(plan, removed_layers=tuple(sorted({*plan.removed_layers, *removed})))
    gone = set(plan.removed_layers)
    record = {
        "iteration": iteration,
        "loss": scores.loss,
        "parameters": engine.num_parameters,
        "landed": engine.num_parameters <= target,
        "sparsity": [float(i in gone) for i in range(len(sizes))],
        "layer_importance": _of_all_layers(scores.layer_importance, there, len(sizes)),
        "layer_importance_normalised": _of_all_layers(
            normalize_importance(scores.layer_importance, config.normalize), there, len(sizes)
        ),
        "removed_layers": removed,
        "units": [
            {kind: 0 if i in gone else count for kind, count in layer.items()}
            for i, layer in enumerate(plan.initial_units)
        ],
        "seconds": dict(zip(("score", "allocate", "surgery"), np.diff(clock).round(4).tolist(), strict=True)),
    }
    return record, plan


def _of_all_layers(values: Floats, there: Sequence[int], layers: int) -> list[float | None]:
    """Values of the layers that are there, None for those that are gone."""
    result: list[float | None] = [None] * layers
    for layer, value in zip(there, values.tolist(), strict=True):
        result[layer] = value
    return result
