"""From layer importance and a parameter budget to the number of units each layer keeps. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = tuple[dict[str, int], ...]
Normalization = Literal["max", "rank", "zscore_clip"]
NORMALIZATIONS: tuple[Normalization, ...] = ("max", "rank", "zscore_clip")
AllocationName = Literal["adaptive", "uniform", "global", "threshold", "search", "reference"]

MAX_SPARSITY = 0.99
FINE_UNIT = "channel"  # the unit that is traded one by one to land on the budget


@dataclass(frozen=True)
class UnitBudget:
    """How many units there are and what they cost.

    Attributes:
        initial, current: per layer, number of units of each kind in the original model and now. Where lanes
            of units shrink alike (query heads, one lane per KV head), one of each lane counts as one.
        cost: per layer, parameters of one unit of each kind.
        num_parameters: parameters of the model now.
        protected: layers that lose nothing.
    """

    initial: Counts
    current: Counts
    cost: Counts
    num_parameters: int
    protected: frozenset[int] = frozenset()

    def parameters(self, counts: Counts) -> int:
        """Parameters of the model once `counts` units remain."""
        return self.num_parameters - sum(
            (now[kind] - after[kind]) * cost[kind]
            for now, after, cost in zip(self.current, counts, self.cost, strict=True)
            for kind in now
        )

    @property
    def floor(self) -> int:
        """Parameters with one unit of each kind per unprotected layer: no budget below it can be met."""
        return self.parameters(
            tuple(
                layer if i in self.protected else dict.fromkeys(layer, 1)
                for i, layer in enumerate(self.current)
            )
        )


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

    Channels round down; kv_groups go only when their full share is due.

    Args:
        rows: of a kv_group. Given, rows are counted as the published implementation does: those that stay
            round down, so that a group goes up to a row early.
    """
    counts = []
    for i, (initial, current) in enumerate(zip(budget.initial, budget.current, strict=True)):
        s, layer = float(sparsity[i]), {}
        for kind, n in initial.items():
            if kind == FINE_UNIT:
                due = int(n * (1 - s))
            elif rows is None:
                due = n - int(np.floor(n * s + 1e-9))
            else:
                due = current[kind] - (current[kind] * rows - int(n * rows * (1 - s))) // rows
            layer[kind] = min(current[kind], max(1, due))
        counts.append(dict(current) if i in budget.protected else layer)
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

    A step that would reach the target is scaled down until it just does not, and the rest goes channel by
    channel, least importance per parameter first. The result then has at most `target` parameters and less
    than one channel's parameters below it; only where a group had to go that is bigger than all channels
    left together it may be further below.

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
    places = [
        (i, kind)
        for i, layer in enumerate(budget.current)
        for kind in layer
        if i not in budget.protected and layer[kind] > 1
    ]
    prices, costs, owners = [], [], []
    for place, (i, kind) in enumerate(places):
        scores, cost = np.sort(unit_importance[i][kind])[:-1], budget.cost[i][kind]
        prices.append(scores / cost if per_parameter else scores)
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
    """Removes single channels, least importance per parameter first, until the budget is met.

    kv_groups go only if the channels cannot carry what is left.
    """
    counts = tuple(dict(layer) for layer in counts)
    free = [i for i in range(len(counts)) if i not in budget.protected]
    ascending = [{kind: np.sort(scores) for kind, scores in layer.items()} for layer in unit_importance]

    def next_price(layer: int, kind: str) -> float:
        removed = len(ascending[layer][kind]) - counts[layer][kind]
        return float(ascending[layer][kind][removed]) / budget.cost[layer][kind]

    def removable(kind: str) -> list[int]:
        return [i for i in free if counts[i][kind] > 1]

    coarse = [kind for kind in counts[0] if kind != FINE_UNIT]
    while budget.parameters(counts) - target > sum(
        (counts[i][FINE_UNIT] - 1) * budget.cost[i][FINE_UNIT] for i in free
    ):
        _, layer, kind = min((next_price(i, kind), i, kind) for kind in coarse for i in removable(kind))
        counts[layer][kind] -= 1

    prices, owners = [], []
    for i in free:
        scores = ascending[i][FINE_UNIT]
        removed = len(scores) - counts[i][FINE_UNIT]
        candidates = scores[removed : len(scores) - 1] / budget.cost[i][FINE_UNIT]
        prices.append(candidates)
        owners.append(np.full(len(candidates), i))
    owner = np.concatenate(owners)[np.argsort(np.concatenate(prices), kind="stable")]
    excess = budget.parameters(counts) - target
    for i in owner.tolist():
        if excess <= 0:
            break
        counts[i][FINE_UNIT] -= 1
        excess -= budget.cost[i][FINE_UNIT]
    # Where a whole group had to go, channels removed before it may fit again.
    for i in sorted(free, key=lambda i: -_last_removed(ascending[i][FINE_UNIT], counts[i])):
        room = min(-excess // budget.cost[i][FINE_UNIT], budget.current[i][FINE_UNIT] - counts[i][FINE_UNIT])
        if room > 0:
            counts[i][FINE_UNIT] += room
            excess += room * budget.cost[i][FINE_UNIT]
    return counts


def _last_removed(ascending: Floats, counts: Mapping[str, int]) -> float:
    removed = len(ascending) - counts[FINE_UNIT]
    return float(ascending[removed - 1]) if removed else -np.inf


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
