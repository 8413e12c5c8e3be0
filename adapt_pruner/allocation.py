"""From layer importance and a parameter budget to the number of units each layer keeps. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from adapt_pruner.budget import FINE_UNIT, Counts, Limit, UnitBudget, needed, pace_of_kinds

Floats = npt.NDArray[np.float64]
Normalization = Literal["max", "rank", "zscore_clip"]
NORMALIZATIONS: tuple[Normalization, ...] = ("max", "rank", "zscore_clip")
MAX_SPARSITY = 0.99


@dataclass(frozen=True)
class Allocation:
    """The outcome of one iteration: cumulative sparsity and units to keep per layer, and whether it is the
    last iteration because the budget is met."""

    sparsity: Floats
    counts: Counts
    landed: bool


def normalize_importance(importance: Floats, how: Normalization = "max") -> Floats:
    """Layer importance brought to mean 0 within [-1, 1]; all equal gives all zeros.

    `max` subtracts the mean and divides by the largest absolute value (arXiv 2502.03460 section 3.2). `rank`
    first replaces importance by its rank, `zscore_clip` first clips it at two standard deviations.

    Raises:
        ValueError: unknown `how`, or importance that is not finite.
    """
    if how not in NORMALIZATIONS:
        raise ValueError(f"normalize is {how!r}, expected one of {NORMALIZATIONS}")
    if not np.all(np.isfinite(importance)):
        raise ValueError(f"layer importance is not finite: {importance.tolist()}")
    if np.all(importance == importance[0]):
        return np.zeros(len(importance))  # their mean may be off by a rounding error, which would become 1
    if how == "rank":
        # Equal layers share the mean of the ranks they cover.
        importance = np.array([(importance < v).sum() + (importance == v).sum() / 2 for v in importance])
    elif how == "zscore_clip":
        importance = np.clip((importance - importance.mean()) / importance.std(), -2, 2)
    centred = importance - importance.mean()
    return centred / np.abs(centred).max()


def next_sparsity(
    sparsity: Floats, importance: Floats, iterations: int, amplitude: float, scale: float = 1.0
) -> Floats:
    """s_i + scale * (1/N - A * I_i), clipped to [0, 0.99]; algorithm.md section 4."""
    return np.clip(sparsity + scale * (1 / iterations - amplitude * importance), 0.0, MAX_SPARSITY)


def counts_at(
    budget: UnitBudget, sparsity: Floats, rows: int | None = None, pace: Mapping[str, float] | None = None
) -> Counts:
    """Units each layer keeps at a cumulative sparsity; units never come back and one always stays.

    Channels round down; other units, and channels that go several at a time, go only when their full share
    is due.

    Args:
        pace: by kind, what its rate is multiplied with.
        rows: of a kv_group. Given, rows are counted as the published implementation does: those that stay
            round down, so that a group goes up to a row early.
    """
    counts = []
    for i, (initial, current, least) in enumerate(
        zip(budget.initial, budget.current, budget.least, strict=True)
    ):
        layer = {}
        for kind, n in initial.items():
            s = min(float(sparsity[i]) * budget.rate(kind) * (pace or {}).get(kind, 1.0), MAX_SPARSITY)
            if kind == FINE_UNIT:
                due = -(-int(n * (1 - s)) // budget.round_to) * budget.round_to
            elif rows is None:
                due = n - int(np.floor(n * s + 1e-9))
            else:
                due = current[kind] - (current[kind] * rows - int(n * rows * (1 - s))) // rows
            layer[kind] = min(current[kind], max(least[kind], due))
        counts.append(layer)
    return tuple(counts)


def allocate(
    budget: UnitBudget,
    sparsity: Floats,
    layer_importance: Floats,
    unit_importance: Sequence[Mapping[str, Floats]],
    *,
    target: int,
    iterations: int,
    amplitude: float,
) -> Allocation:
    """One iteration of the adaptive allocation, landing on the budget when this iteration reaches it.

    A step that would meet all limits is scaled down until it just does not, and the rest goes unit by unit,
    least importance per parameter first: channels as long as they suffice. The result then has at most
    `target` parameters and less than one channel's parameters below it (with `round_to`, less than one
    step's; where channels may not go, less than one of the smallest unit that may); only where a group had
    to go that is bigger than all channels left together it may be further below. With several limits all
    are met, and at least one of them as closely as that.

    Args:
        sparsity: [layers], cumulative sparsity so far, as a fraction of the initial units.
        layer_importance: [layers], normalised.
        unit_importance: per layer and kind, one score per current unit.
        target: parameters to land on; at least `budget.floor`. `budget.limits` has those of other resources.
    Source: arXiv 2502.03460 section 3.2; landing is ours (algorithm.md section 4).
    """

    pace = pace_of_kinds(budget, target)

    def step(scale: float) -> tuple[Floats, Counts]:
        s = _protecting(budget, next_sparsity(sparsity, layer_importance, iterations, amplitude, scale))
        return s, counts_at(budget, s, pace=pace)

    assert not budget.over(budget.least, target)
    full_sparsity, full_counts = step(1.0)
    if budget.over(full_counts, target):
        # Once the layers that still lose anything are at their largest sparsity, more rounds would score the
        # model for nothing: trade the rest where this round removes no unit and N like it do not get there.
        if full_counts != budget.current or not budget.over(step(iterations)[1], target):
            return Allocation(full_sparsity, full_counts, landed=False)
        return Allocation(full_sparsity, _trade(budget, full_counts, unit_importance, target), landed=True)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if budget.over(step(middle)[1], target):
            low = middle
        else:
            high = middle
    landed_sparsity, counts = step(low)
    return Allocation(landed_sparsity, _trade(budget, counts, unit_importance, target), landed=True)


def allocate_uniform(
    budget: UnitBudget,
    sparsity: Floats,
    unit_importance: Sequence[Mapping[str, Floats]],
    *,
    target: int,
    iterations: int,
) -> Allocation:
    """One iteration that takes the same share of every layer, landing as `allocate` does."""
    equal = np.zeros(len(sparsity))
    return allocate(
        budget, sparsity, equal, unit_importance, target=target, iterations=iterations, amplitude=0.0
    )


def allocate_by_rank(
    budget: UnitBudget,
    unit_importance: Sequence[Mapping[str, Floats]],
    *,
    target: int,
    iterations: int,
    per_parameter: bool,
) -> Allocation:
    """One iteration that ranks the units of all layers and kinds together and removes them from the lowest.

    Of `iterations` equal parts of what can be removed at all it removes one, and lands like `allocate` on
    the target or on what that part leaves.

    Args:
        per_parameter: rank by importance per parameter (or what else is limited); else by importance itself,
            which is one threshold for all units. Either way a unit counts with its parameters towards the
            target.
    Source: the threshold is FLAP's, arXiv 2312.11983 section 3.
    """
    assert not budget.over(budget.least, target)
    counts = tuple(dict(layer) for layer in budget.current)
    ascending = _ascending(unit_importance)
    limits, goals = budget.binding(target), []
    for n, limit in enumerate(limits):
        removable = budget.amount(limit, budget.initial) - budget.amount(limit, budget.least)
        # What the limits before this one have yet to take counts for it too.
        reserved = needed(budget, counts, limits[:n], limit)
        share = -(-removable // iterations)
        goal = replace(limit, target=max(limit.target + reserved, limit.amount - share))
        goals.append(goal)
        places = [(i, kind) for i, layer in enumerate(counts) for kind in layer if limit.cost[i][kind] > 0]
        prices, costs, owners = [np.empty(0)], [np.empty(0, int)], [np.empty(0, int)]
        for place, (i, kind) in enumerate(places):
            scores, sizes = _removable(budget, counts, ascending, i, kind)
            price = scores / (sizes * limit.cost[i][kind]) if per_parameter else scores / sizes
            rate = budget.rate(kind)
            prices.append(np.where(price < 0, price * rate, price / rate) if len(price) else price)
            costs.append(sizes * limit.cost[i][kind])
            owners.append(np.full(len(scores), place))
        order = np.argsort(np.concatenate(prices), kind="stable")
        removed = np.cumsum(np.concatenate(costs)[order])
        taken = order[: np.searchsorted(removed, budget.amount(limit, counts) - goal.target)]
        for place in np.concatenate(owners)[taken].tolist():
            _remove(budget, counts, *places[place])
        _meet(budget, counts, ascending, goal)
    _give_back(budget, counts, ascending, goals)
    return Allocation(_removed_share(budget, counts), counts, landed=not budget.over(counts, target))


def allocate_as_published(
    budget: UnitBudget,
    sparsity: Floats,
    layer_importance: Floats,
    *,
    target: int,
    iterations: int,
    amplitude: float,
    rows: int,
) -> Allocation:
    """One iteration as the published implementation does it: rows are counted, and nothing lands.

    The last iteration is the first that brings the model to the target or below, by up to a whole iteration.

    Args:
        rows: of a kv_group, as in `counts_at`.
    Raises:
        ValueError: no further iteration would remove anything, and the target is not met.
    Source: the published implementation of arXiv 2502.03460.
    """
    s = _protecting(budget, next_sparsity(sparsity, layer_importance, iterations, amplitude))
    counts = counts_at(budget, s, rows)
    if counts == budget.current and np.array_equal(s, sparsity):
        limit = next(limit for limit in budget.binding(target) if limit.amount > limit.target)
        raise ValueError(
            f"the allocation 'reference' stops at {limit.amount:,} {limit.resource}, above the target "
            f"{limit.target:,}: it removes no more than {MAX_SPARSITY:.0%} of a layer and does not trade"
        )
    return Allocation(s, counts, landed=not budget.over(counts, target))


def _protecting(budget: UnitBudget, sparsity: Floats) -> Floats:
    sparsity[list(budget.protected)] = 0.0
    return sparsity


def _removed_share(budget: UnitBudget, counts: Counts) -> Floats:
    """Per layer, fraction of the parameters of its initial units that are gone."""
    shares = []
    for initial, after, cost in zip(budget.initial, counts, budget.cost, strict=True):
        before = sum(initial[kind] * cost[kind] for kind in initial)
        shares.append(1 - sum(after[kind] * cost[kind] for kind in initial) / before)
    return np.array(shares)


def _ascending(unit_importance: Sequence[Mapping[str, Floats]]) -> list[dict[str, Floats]]:
    return [{kind: np.sort(scores) for kind, scores in layer.items()} for layer in unit_importance]


def _removable(
    budget: UnitBudget, counts: Counts, ascending: Sequence[Mapping[str, Floats]], layer: int, kind: str
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """What may still go of a kind in a layer, one step after the other: summed importance, and units."""
    scores, count, step = ascending[layer][kind], counts[layer][kind], budget.step(kind)
    least = budget.least[layer][kind]
    sizes = np.full(-(-(count - least) // step), step)
    if not len(sizes):
        return np.empty(0), sizes
    sizes[0] = count % step or step  # to the next multiple
    first = len(scores) - count
    return np.add.reduceat(scores[: len(scores) - least], first + np.cumsum(sizes) - sizes), sizes


def _remove(budget: UnitBudget, counts: Counts, layer: int, kind: str) -> int:
    """Takes one step of units from `counts`; returns how many."""
    step = budget.step(kind)
    size = counts[layer][kind] % step or step
    counts[layer][kind] -= size
    return size


def _trade(
    budget: UnitBudget, counts: Counts, unit_importance: Sequence[Mapping[str, Floats]], target: int
) -> Counts:
    """Removes single units (or steps of them), least importance for what they cost first, until all limits
    are met."""
    counts = tuple(dict(layer) for layer in counts)
    ascending, limits = _ascending(unit_importance), budget.binding(target)
    for limit in limits:
        _meet(budget, counts, ascending, limit)
    _give_back(budget, counts, ascending, limits)
    return counts


def _meet(
    budget: UnitBudget, counts: Counts, ascending: Sequence[Mapping[str, Floats]], limit: Limit
) -> None:
    """Removes units from `counts` until one limit is met.

    Channels go as long as they can carry what is left. Where they may not go, all kinds are traded together:
    the cheapest that fits, and the smallest once none does.
    """
    least, cost = budget.least, limit.cost
    excess = budget.amount(limit, counts) - limit.target

    def removable(fine: bool) -> list[tuple[int, str]]:
        return [
            (i, kind)
            for i, layer in enumerate(counts)
            for kind in layer
            if (kind == FINE_UNIT) == fine and layer[kind] > least[i][kind] and cost[i][kind] > 0
        ]

    def next_price(layer: int, kind: str) -> float:
        scores = ascending[layer][kind]
        return float(scores[len(scores) - counts[layer][kind]]) / cost[layer][kind]

    fine = removable(fine=True)
    carried = sum((counts[i][kind] - least[i][kind]) * cost[i][kind] for i, kind in fine)
    while excess > carried:
        coarse = removable(fine=False)
        if by_price := [(i, kind) for i, kind in coarse if fine or cost[i][kind] <= excess]:
            _, i, kind = min((next_price(i, kind), i, kind) for i, kind in by_price)
        else:
            _, _, i, kind = min((cost[i][kind], next_price(i, kind), i, kind) for i, kind in coarse)
        excess -= _remove(budget, counts, i, kind) * cost[i][kind]

    prices, owners = [np.empty(0)], [np.empty(0, int)]
    for place, (i, kind) in enumerate(fine):
        scores, sizes = _removable(budget, counts, ascending, i, kind)
        prices.append(scores / (sizes * cost[i][kind]))
        owners.append(np.full(len(scores), place))
    for place in np.concatenate(owners)[np.argsort(np.concatenate(prices), kind="stable")].tolist():
        if excess <= 0:
            break
        i, kind = fine[place]
        excess -= _remove(budget, counts, i, kind) * cost[i][kind]


def _give_back(
    budget: UnitBudget,
    counts: Counts,
    ascending: Sequence[Mapping[str, Floats]],
    limits: Sequence[Limit],
) -> None:
    """Where a whole group had to go, what was removed before it may fit again."""
    gone = [
        (float(ascending[i][kind][n - counts[i][kind] - 1]), i, kind)
        for i, layer in enumerate(budget.current)
        for kind, n in layer.items()
        if n > counts[i][kind]
    ]
    slack = [limit.target - budget.amount(limit, counts) for limit in limits]
    for _, i, kind in sorted(gone, key=lambda unit: -unit[0]):
        before, most = counts[i][kind], budget.current[i][kind]
        costs = [limit.cost[i][kind] for limit in limits]
        room = min((left // cost for left, cost in zip(slack, costs, strict=True) if cost), default=most)
        count = min(most, before + room)
        counts[i][kind] = count if count == most else count - count % budget.step(kind)
        slack = [left - (counts[i][kind] - before) * cost for left, cost in zip(slack, costs, strict=True)]


def bundle_importance(importance: Floats, lanes: int) -> Floats:
    """Importance of what goes at a time where several lanes of units must shrink alike.

    Args:
        importance: [lanes * units per lane].
    Returns:
        [units per lane], ascending: the sum over the lanes of the r-th least important unit of each. With
        one lane, `importance` itself.
    """
    if lanes == 1:
        return importance
    together: Floats = np.sort(importance.reshape(lanes, -1), axis=1).sum(axis=0)
    return together


def select_units(importance: Floats, count: int, lanes: int = 1) -> npt.NDArray[np.int64]:
    """Sorted indices of the `count` most important units of each lane; of equal ones the later stays.

    Raises:
        ValueError: scores that are not finite.
    """
    if not np.all(np.isfinite(importance)):
        raise ValueError(f"{int((~np.isfinite(importance)).sum())} unit importances are not finite")
    order = np.argsort(importance.reshape(lanes, -1), axis=1, kind="stable")
    first = np.arange(lanes)[:, None] * order.shape[1]
    return np.sort((order[:, order.shape[1] - count :] + first).ravel()).astype(np.int64)
