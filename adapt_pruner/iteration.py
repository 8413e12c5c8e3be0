"""One round of pruning: score -> allocate -> choose units -> surgery."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from adapt_pruner.allocation import (
    Allocation,
    Counts,
    Floats,
    allocate,
    allocate_as_published,
    allocate_by_rank,
    allocate_uniform,
    bundle_importance,
    normalize_importance,
    select_units,
)
from adapt_pruner.allocation_search import Search, allocate_by_search
from adapt_pruner.budget import UnitBudget
from adapt_pruner.calibration import draw
from adapt_pruner.config import PruneConfig
from adapt_pruner.data import TokenizedDocuments
from adapt_pruner.engines import Engine, InMemoryEngine
from adapt_pruner.latency import Keep, Latency, usage
from adapt_pruner.resources import Resource
from adapt_pruner.scoring import Estimator, Scores

SEARCHED = 64  # calibration sequences that the allocation search measures losses of, at most


def iterate(
    config: PruneConfig,
    estimator: Estimator,
    engine: Engine,
    tokens: TokenizedDocuments,
    budget: UnitBudget,
    sparsity: Floats,
    target: int,
    iteration: int,
    *,
    resources: tuple[Resource, ...] = (),
    latency: Latency | None = None,
    earlier: Scores | None = None,
) -> tuple[dict[str, Any], Keep, Floats, Scores | None]:
    """One round of score, allocate and surgery.

    Args:
        earlier: what the rounds before measured at the units there are now, if it counts.
    Returns:
        Its record, the kept units, the sparsity, and what counts in the next round.
    """
    assert config.iterations is not None  # resolved
    carry_over = config.carry_over or 0.0
    clock = [time.perf_counter()]
    batch = draw(config, tokens, iteration)
    scores = engine.score(
        batch,
        micro_batch_size=config.micro_batch_size,
        metric=config.layer_metric,
        gradients=config.gradients,
        estimator=estimator,
        gqa_credit=config.gqa_credit or "owner",
        seed=(config.seed, iteration),
        grams=config.compensation == "least_squares",
        means=config.compensation == "bias",
        ridge=config.ridge,
        earlier=earlier,
        share=1 / sum(carry_over**age for age in range(iteration)),
    )
    clock.append(time.perf_counter())
    layer_importance = normalize_importance(scores.layer_importance, config.normalize)
    lanes = [{kind.name: kind.lanes(w) for kind in engine.family.kinds_in(w)} for w in engine.widths]
    mean = config.allocation == "threshold"  # which is one for units, and they go by bundles
    bundled = tuple(
        {
            kind: bundle_importance(values, layer_lanes[kind]) / (layer_lanes[kind] if mean else 1)
            for kind, values in layer.items()
        }
        for layer, layer_lanes in zip(scores.unit_importance, lanes, strict=True)
    )
    rows = engine.widths[0].head_dim

    def kept(counts: Counts) -> Keep:
        return tuple(
            {kind: select_units(importance[kind], count, layer_lanes[kind]) for kind, count in layer.items()}
            for importance, layer, layer_lanes in zip(scores.unit_importance, counts, lanes, strict=True)
        )

    def choose(budget: UnitBudget) -> tuple[Allocation, Keep]:
        allocation = _allocate(config, budget, sparsity, layer_importance, bundled, target, rows)
        return allocation, kept(allocation.counts)

    search: Search | None = None
    if config.allocation == "search":
        assert isinstance(engine, InMemoryEngine)
        with engine.masked_loss(batch[:SEARCHED], micro_batch_size=config.micro_batch_size) as loss:
            allocation, search = allocate_by_search(
                budget,
                sparsity,
                layer_importance,
                bundled,
                lambda counts: loss(kept(counts)),
                target=target,
                iterations=config.iterations,
                amplitude=config.amplitude,
                evaluations=config.search_evaluations,
                seed=(config.seed, iteration),
            )
        keep = kept(allocation.counts)
    elif latency:
        assert isinstance(engine, InMemoryEngine)
        allocation, keep = latency.settle(budget, target, choose, engine)
    else:
        allocation, keep = choose(budget)
    clock.append(time.perf_counter())
    widths = engine.widths
    engine.remove_units(
        keep,
        grams=scores.grams if config.compensation == "least_squares" else None,
        means=scores.means,
        ridge=config.ridge,
    )
    clock.append(time.perf_counter())
    record = {
        "iteration": iteration,
        "loss": scores.loss,
        "parameters": engine.num_parameters,
        "resources": usage(resources, latency, dataclasses.replace(budget, current=allocation.counts)),
        "landed": allocation.landed,
        "sparsity": allocation.sparsity.tolist(),
        "layer_importance": scores.layer_importance.tolist(),
        "layer_importance_normalised": layer_importance.tolist(),
        "units": [{kind: len(indices) for kind, indices in layer.items()} for layer in keep],
        "unit_importance": [
            {
                kind: {"min": float(v.min()), "mean": float(v.mean()), "max": float(v.max())}
                for kind, v in layer.items()
            }
            for layer in scores.unit_importance
        ],
        "seconds": dict(zip(("score", "allocate", "surgery"), np.diff(clock).round(4).tolist(), strict=True)),
    }
    if engine.measured:
        record["engine"] = engine.measured
    if search is not None:
        record["search"] = dataclasses.asdict(search)
    carried = scores.kept(engine.model, engine.family, widths, keep) if carry_over else None
    return record, keep, allocation.sparsity, carried


def _allocate(
    config: PruneConfig,
    budget: UnitBudget,
    sparsity: Floats,
    layer_importance: Floats,
    units: tuple[dict[str, Floats], ...],
    target: int,
    rows_of_head: int,
) -> Allocation:
    assert config.iterations is not None  # resolved
    rounds: dict[str, int] = {"target": target, "iterations": config.iterations}
    if config.allocation == "uniform":
        return allocate_uniform(budget, sparsity, units, **rounds)
    if config.allocation in ("global", "threshold"):
        return allocate_by_rank(budget, units, per_parameter=config.allocation == "global", **rounds)
    adaptive: dict[str, Any] = {**rounds, "amplitude": config.amplitude}
    if config.allocation == "reference":
        return allocate_as_published(budget, sparsity, layer_importance, rows=rows_of_head, **adaptive)
    assert config.allocation == "adaptive"
    return allocate(budget, sparsity, layer_importance, units, **adaptive)
