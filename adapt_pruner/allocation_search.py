"""Allocation by search: layers and unit kinds share a round's removals so that the loss rises least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adapt_pruner.allocation import Allocation, Counts, Floats, UnitBudget, allocate, allocate_by_rank

Place = tuple[int, str]  # a layer and a unit kind
Weights = dict[Place, float]

STEPS = (1.25, 1.1)  # factors that weights are changed by, one after the other


@dataclass(frozen=True)
class Search:
    """What a search did: the loss of each start point and of the outcome, and how often one was measured.

    Start points whose loss is not finite are left out.
    """

    start_losses: dict[str, float]
    loss: float
    evaluations: int


def allocate_by_search(
    budget: UnitBudget,
    sparsity: Floats,
    layer_importance: Floats,
    unit_importance: Sequence[Mapping[str, Floats]],
    loss: Callable[[Counts], float],
    *,
    target: int,
    iterations: int,
    amplitude: float,
    evaluations: int,
    seed: Sequence[int],
) -> tuple[Allocation, Search]:
    """One iteration that removes as much as `allocate_by_rank` does, from where the loss rises least.

    What it removes are units ranked over all layers and kinds by importance per parameter times a weight of
    their layer and kind, and the search is for these weights. It starts at the best of the other allocations
    on the same budget. Then the weights of one kind are changed in runs of layers, of all, of half, and so on
    down to single ones, up or else down, for as long as the loss falls; and again with a smaller step.

    Args:
        sparsity: [layers], cumulative sparsity so far, as a fraction of the initial units.
        layer_importance: [layers], normalised.
        unit_importance: per layer and kind, one score per current unit.
        loss: of the model with so many units left, those of the largest importance.
        target: parameters to land on; at least `budget.floor`.
        iterations, amplitude: of `allocate`.
        evaluations: how often `loss` may be asked, beyond once for each start point.
        seed: of the order of the runs.
    Returns:
        The allocation, whose loss is at most that of every start point, and what the search did.
    Raises:
        ValueError: no start point has a finite loss.
    """
    ranked = allocate_by_rank(
        budget, unit_importance, target=target, iterations=iterations, per_parameter=True
    )
    goal = target if ranked.landed else budget.parameters(ranked.counts)
    starts = {"global": ranked}
    for name, (importance, spread) in _directions(sparsity, layer_importance, iterations * amplitude).items():
        # Of one round, so that the goal is within its reach.
        start = allocate(
            budget, sparsity, importance, unit_importance, target=goal, iterations=1, amplitude=spread
        )
        if start.landed:
            starts[name] = start
    seen: dict[tuple[tuple[int, ...], ...], float] = {}

    def measured(counts: Counts) -> float:
        key = tuple(tuple(layer.values()) for layer in counts)
        if key not in seen:
            value = loss(counts)
            seen[key] = value if math.isfinite(value) else math.inf
        return seen[key]

    losses = {name: measured(start.counts) for name, start in starts.items()}
    start_losses = {name: value for name, value in losses.items() if value < math.inf}
    if not start_losses:
        raise ValueError(f"the loss with {goal:,} parameters is not finite, wherever they are removed from")
    first = min(start_losses, key=lambda name: start_losses[name])
    best, lowest = starts[first], start_losses[first]
    positive = [
        {kind: scores - min(0.0, float(scores.min())) for kind, scores in layer.items()}
        for layer in unit_importance
    ]
    weights = _weights_of(budget, positive, best.counts)
    limit = len(seen) + evaluations

    def improve(places: Sequence[Place], factor: float) -> bool:
        nonlocal best, lowest, weights
        if len(seen) >= limit:
            return False
        tried = weights | {place: weights[place] * factor for place in places}
        candidate = _by_weighted_rank(budget, positive, tried, goal)
        reached = measured(candidate.counts)
        if reached >= lowest:
            return False
        best, lowest, weights = candidate, reached, tried
        return True

    for places, step in _moves(weights, len(budget.current), seed):
        factor = next((factor for factor in (step, 1 / step) if improve(places, factor)), None)
        while factor and improve(places, factor):
            pass
    return replace(best, landed=ranked.landed), Search(start_losses, lowest, len(seen))


def _directions(
    sparsity: Floats, layer_importance: Floats, amplitude: float
) -> dict[str, tuple[Floats, float]]:
    """Layer importance and amplitude of what `allocate` can do, by name."""
    directions = {"adaptive": (layer_importance, amplitude), "uniform": (np.zeros(len(sparsity)), 0.0)}
    if sparsity.any():  # as the rounds before have shared the removals
        directions["proportional"] = (1 - sparsity / sparsity.mean(), 1.0)
    return directions


def _weights_of(
    budget: UnitBudget, unit_importance: Sequence[Mapping[str, Floats]], counts: Counts
) -> Weights:
    """Weights by which ranking gives these counts, or nearly, each as close to 1 as that allows.

    Between the last unit that goes and the first that stays there is room, much of it where units are few: a
    weight that used it up would forget how the estimator compares the layers.
    """
    between: dict[Place, tuple[float, float]] = {}  # importance per parameter of these two units
    for i, layer in enumerate(budget.current):
        for kind, now in layer.items():
            if i not in budget.protected and now > 1:
                prices = np.sort(unit_importance[i][kind]) / budget.cost[i][kind]
                removed = now - counts[i][kind]
                last_stays = removed == now - 1  # whatever its price
                between[i, kind] = (
                    float(prices[removed - 1]) if removed else 0.0,
                    math.inf if last_stays else float(prices[removed]),
                )
    # Of a start point that is itself such a ranking it is the price that all of its units are cut at.
    threshold = float(np.median([*between.values()])) if between else 1.0
    if not math.isfinite(threshold):  # one unit is left anywhere
        threshold = 1.0
    weights = {}
    for place, (low, high) in between.items():
        # A tenth off either end if there is room: at the very end, rounding would decide what goes.
        least, most = 1.1 * threshold / max(high, 1e-30), threshold / max(low, 1e-30) / 1.1
        weights[place] = min(max(1.0, least), most) if least <= most else math.sqrt(least * most)
    return weights


def _by_weighted_rank(
    budget: UnitBudget, unit_importance: Sequence[Mapping[str, Floats]], weights: Weights, goal: int
) -> Allocation:
    weighted = [
        {kind: scores * weights.get((i, kind), 1.0) for kind, scores in layer.items()}
        for i, layer in enumerate(unit_importance)
    ]
    return allocate_by_rank(budget, weighted, target=goal, iterations=1, per_parameter=True)


def _moves(places: Weights, num_layers: int, seed: Sequence[int]) -> Iterator[tuple[list[Place], float]]:
    """Runs of layers of one kind, from coarse to fine, with the factor to change their weights by."""
    generator = np.random.default_rng(np.random.SeedSequence([*seed]))
    kinds = list(dict.fromkeys(kind for _, kind in places))
    for step in STEPS:
        width = num_layers
        while width:
            runs = [
                [(i, kind) for i in range(start, start + width) if (i, kind) in places]
                for kind in kinds
                for start in range(0, num_layers, width)
            ]
            for number in generator.permutation(len(runs)).tolist():
                if runs[number]:
                    yield runs[number], step
            width //= 2
