"""From layer importance and a parameter budget to the number of units each layer keeps. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = tuple[dict[str, int], ...]
Normalization = Literal["max", "rank", "zscore_clip"]
NORMALIZATIONS: tuple[Normalization, ...] = ("max", "rank", "zscore_clip")
AllocationName = Literal["adaptive", "uniform", "global", "threshold", "search", "reference"]

MAX_SPARSITY = 0.99
FINE_UNIT = "channel"  # there are so many that landing takes no other unit while these suffice
ATTENTION_UNITS = ("kv_group", "query_head")


@dataclass(frozen=True)
class UnitBudget:
    """How many units there are and what they cost.

    Attributes:
        initial, current: per layer, number of units of each kind in the original model and now. Where lanes
            of units shrink alike (query heads, one lane per KV head), one of each lane counts as one.
        cost: per layer, parameters of one unit of each kind.
        num_parameters: parameters of the model now.
        protected: layers that lose nothing.
        rates: by kind, the multiple of a layer's sparsity that its units lose, 1 if not given. Those of a
            kind at rate 0 stay. A ranking divides their price by it, or multiplies where that is negative.
    """

    initial: Counts
    current: Counts
    cost: Counts
    num_parameters: int
    protected: frozenset[int] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate(self, kind: str) -> float:
        return self.rates.get(kind, 1.0)

    def parameters(self, counts: Counts) -> int:
        """Parameters of the model once `counts` units remain."""
        return self.num_parameters - sum(
            (now[kind] - after[kind]) * cost[kind]
            for now, after, cost in zip(self.current, counts, self.cost, strict=True)
            for kind in now
        )

    @property
    def least(self) -> Counts:
        """Units that stay whatever the target: one of each kind, and all that may not go."""
        return tuple(
            {
                kind: n if i in self.protected or self.rate(kind) == 0 else min(n, 1)
                for kind, n in layer.items()
            }
            for i, layer in enumerate(self.current)
        )

    @property
    def floor(self) -> int:
        """Parameters with the least units: no budget below it can be met."""
        return self.parameters(self.least)


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


def counts_at(budget: UnitBudget, sparsity: Floats, rows: int | None = None) -> Counts:
    """Units each layer keeps at a cumulative sparsity; units never come back and one always stays.

    Channels round down; other units go only when their full share is due.

    Args:
        rows: of a kv_group. Given, rows are counted as the published implementation does: those that stay
            round down, so that a group goes up to a row early.
    """
    counts = []
    for i, (initial, current, least) in enumerate(
        zip(budget.initial, budget.current, budget.least, strict=True)
    ):
        layer = {}
        for kind, n in initial.items():
            s = min(float(sparsity[i]) * budget.rate(kind), MAX_SPARSITY)
            if kind == FINE_UNIT:
                due = int(n * (1 - s))
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

    A step that would reach the target is scaled down until it just does not, and the rest goes unit by unit,
    least importance per parameter first: channels as long as they suffice. The result then has at most
    `target` parameters and less than one channel's parameters below it (where channels may not go, one of
    the smallest unit's that may); only where a group had to go that is bigger than all channels left
    together it may be further below.

    Args:
        sparsity: [layers], cumulative sparsity so far, as a fraction of the initial units.
        layer_importance: [layers], normalised.
        unit_importance: per layer and kind, one score per current unit.
        target: parameters to land on; at least `budget.floor`.
    Source: arXiv 2502.03460 section 3.2; landing is ours (algorithm.md section 4).
    """

    def step(scale: float) -> tuple[Floats, Counts]:
        s = _protecting(budget, next_sparsity(sparsity, layer_importance, iterations, amplitude, scale))
        return s, counts_at(budget, s)

    assert target >= budget.floor
    full_sparsity, full_counts = step(1.0)
    if budget.parameters(full_counts) > target:
        # Once the layers that still lose anything are at their largest sparsity, more rounds would score the
        # model for nothing: trade the rest where this round removes no unit and N like it do not get there.
        if full_counts != budget.current or budget.parameters(step(iterations)[1]) <= target:
            return Allocation(full_sparsity, full_counts, landed=False)
        return Allocation(full_sparsity, _trade(budget, full_counts, unit_importance, target), landed=True)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if budget.parameters(step(middle)[1]) > target:
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
        per_parameter: rank by importance per parameter; else by importance itself, which is one threshold
            for all units. Either way a unit counts with its parameters towards the target.
    Source: the threshold is FLAP's, arXiv 2312.11983 section 3.
    """
    assert target >= budget.floor
    share = -((budget.floor - budget.parameters(budget.initial)) // iterations)
    goal = max(target, budget.num_parameters - share)
    least = budget.least
    places = [
        (i, kind) for i, layer in enumerate(budget.current) for kind in layer if layer[kind] > least[i][kind]
    ]
    prices, costs, owners = [], [], []
    for place, (i, kind) in enumerate(places):
        cost, rate = budget.cost[i][kind], budget.rate(kind)
        scores = np.sort(unit_importance[i][kind])[: budget.current[i][kind] - least[i][kind]]
        price = scores / cost if per_parameter else scores
        prices.append(np.where(price < 0, price * rate, price / rate))
        costs.append(np.full(len(scores), cost))
        owners.append(np.full(len(scores), place))
    counts = tuple(dict(layer) for layer in budget.current)
    if places:
        order = np.argsort(np.concatenate(prices), kind="stable")
        removed = np.cumsum(np.concatenate(costs)[order])
        taken = order[: np.searchsorted(removed, budget.num_parameters - goal)]
        for (i, kind), count in zip(
            places, np.bincount(np.concatenate(owners)[taken], minlength=len(places)).tolist(), strict=True
        ):
            counts[i][kind] -= count
    counts = _trade(budget, counts, unit_importance, goal)
    return Allocation(_removed_share(budget, counts), counts, landed=goal == target)


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
        raise ValueError(
            f"the allocation 'reference' stops at {budget.num_parameters:,} parameters, above the target "
            f"{target:,}: it removes no more than {MAX_SPARSITY:.0%} of a layer and does not trade"
        )
    return Allocation(s, counts, landed=budget.parameters(counts) <= target)


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


def _trade(
    budget: UnitBudget, counts: Counts, unit_importance: Sequence[Mapping[str, Floats]], target: int
) -> Counts:
    """Removes single units, least importance per parameter first, until the budget is met.

    Channels go as long as they can carry what is left. Where they may not go, all kinds are traded together:
    the cheapest that fits, and the smallest once none does.
    """
    counts = tuple(dict(layer) for layer in counts)
    least, cost = budget.least, budget.cost
    ascending = [{kind: np.sort(scores) for kind, scores in layer.items()} for layer in unit_importance]

    def next_price(layer: int, kind: str) -> float:
        removed = len(ascending[layer][kind]) - counts[layer][kind]
        return float(ascending[layer][kind][removed]) / cost[layer][kind]

    def removable(fine: bool) -> list[tuple[int, str]]:
        return [
            (i, kind)
            for i, layer in enumerate(counts)
            for kind in layer
            if (kind == FINE_UNIT) == fine and layer[kind] > least[i][kind]
        ]

    excess = budget.parameters(counts) - target
    fine = removable(fine=True)
    carried = sum((counts[i][kind] - least[i][kind]) * cost[i][kind] for i, kind in fine)
    while excess > carried:
        coarse = removable(fine=False)
        if by_price := [(i, kind) for i, kind in coarse if fine or cost[i][kind] <= excess]:
            _, i, kind = min((next_price(i, kind), i, kind) for i, kind in by_price)
        else:
            _, _, i, kind = min((cost[i][kind], next_price(i, kind), i, kind) for i, kind in coarse)
        counts[i][kind] -= 1
        excess -= cost[i][kind]

    prices, owners = [np.empty(0)], [np.empty(0, int)]
    for place, (i, kind) in enumerate(fine):
        scores = ascending[i][kind]
        candidates = scores[len(scores) - counts[i][kind] : len(scores) - least[i][kind]] / cost[i][kind]
        prices.append(candidates)
        owners.append(np.full(len(candidates), place))
    for place in np.concatenate(owners)[np.argsort(np.concatenate(prices), kind="stable")].tolist():
        if excess <= 0:
            break
        i, kind = fine[place]
        counts[i][kind] -= 1
        excess -= cost[i][kind]
    # Where a whole group had to go, what was removed before it may fit again.
    gone = [
        (float(ascending[i][kind][n - counts[i][kind] - 1]), i, kind)
        for i, layer in enumerate(budget.current)
        for kind, n in layer.items()
        if n > counts[i][kind]
    ]
    for _, i, kind in sorted(gone, key=lambda unit: -unit[0]):
        room = min(-excess // cost[i][kind], budget.current[i][kind] - counts[i][kind])
        counts[i][kind] += room
        excess += room * cost[i][kind]
    return counts


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
