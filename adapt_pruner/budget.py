"""What may be removed and what that saves: units, their costs, and limits on several resources at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adapt_pruner.families import Family, LayerWidths, removal_counts, unit_costs

Counts = tuple[dict[str, int], ...]

FINE_UNIT = "channel"  # there are so many that landing takes no other unit while these suffice
ATTENTION_UNITS = ("kv_group", "query_head")


@dataclass(frozen=True)
class Limit:
    """How much of one resource the model may use. Integers, so that sums are exact.

    Attributes:
        resource: its name.
        cost: per layer, what one unit of each kind uses; counted as `UnitBudget.cost` is.
        amount: what the model uses now.
        target: what it may use.
    """

    resource: str
    cost: Counts
    amount: int
    target: int


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
        round_to: the channels that stay in a layer are a multiple of this, or all that there were.
        limits: on resources other than parameters.
    """

    initial: Counts
    current: Counts
    cost: Counts
    num_parameters: int
    protected: frozenset[int] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 1
    limits: tuple[Limit, ...] = ()

    def rate(self, kind: str) -> float:
        return self.rates.get(kind, 1.0)

    def step(self, kind: str) -> int:
        """How many units of a kind go together."""
        return self.round_to if kind == FINE_UNIT else 1

    def parameters(self, counts: Counts) -> int:
        """Parameters of the model once `counts` units remain."""
        return self.num_parameters - used(self.current, self.cost) + used(counts, self.cost)

    def amount(self, limit: Limit, counts: Counts) -> int:
        """What the model uses of a resource once `counts` units remain."""
        return limit.amount - used(self.current, limit.cost) + used(counts, limit.cost)

    def binding(self, target: int) -> tuple[Limit, ...]:
        """The limits that the original model exceeds, that on parameters included.

        Those that the fewest kinds of units can meet come first: what goes for them counts for the others.
        """
        limits = (Limit("parameters", self.cost, self.num_parameters, target), *self.limits)
        exceeded = [limit for limit in limits if self.amount(limit, self.initial) > limit.target]
        return tuple(sorted(exceeded, key=lambda limit: len(self.kinds(limit))))

    def kinds(self, limit: Limit) -> set[str]:
        """The kinds of units that may go and use the resource."""
        return {
            kind
            for i, cost in enumerate(limit.cost)
            for kind in cost
            if cost[kind] > 0 and self.rate(kind) > 0 and i not in self.protected
        }

    def over(self, counts: Counts, target: int) -> bool:
        """Whether a limit is exceeded, that on parameters (`target`) or another."""
        return any(self.amount(limit, counts) > limit.target for limit in self.binding(target))

    @property
    def least(self) -> Counts:
        """Units that stay whatever the target: one step of each kind, and all that may not go."""
        return tuple(
            {
                kind: n if i in self.protected or self.rate(kind) == 0 else min(n, self.step(kind))
                for kind, n in layer.items()
            }
            for i, layer in enumerate(self.current)
        )

    @property
    def floor(self) -> int:
        """Parameters with the least units: no budget below it can be met."""
        return self.parameters(self.least)


def used(counts: Counts, cost: Counts) -> int:
    """What these units use together."""
    return sum(
        n * price[kind] for layer, price in zip(counts, cost, strict=True) for kind, n in layer.items()
    )


def _shares(budget: UnitBudget, counts: Counts, limits: Sequence[Limit]) -> dict[str, float]:
    """By kind, the share of what may still go that the limits need, the kinds going at their rates."""
    least = budget.least
    shares = {kind: 0.0 for layer in counts for kind in layer}
    for limit in limits:
        room = dict.fromkeys(shares, 0)
        for now, after, cost in zip(counts, least, limit.cost, strict=True):
            for kind in now:
                room[kind] += (now[kind] - after[kind]) * cost[kind]
        excess = budget.amount(limit, counts) - limit.target
        if sum(room[kind] * share for kind, share in shares.items()) >= excess:
            continue
        low, high = 0.0, 1 / min((budget.rate(kind) for kind in shares if room[kind]), default=1.0)
        for _ in range(60):
            middle = (low + high) / 2
            tried = _at_least(budget, shares, room, middle)
            enough = sum(room[kind] * share for kind, share in tried.items()) >= excess
            low, high = (low, middle) if enough else (middle, high)
        shares = _at_least(budget, shares, room, high)
    return shares


def _at_least(
    budget: UnitBudget, shares: Mapping[str, float], room: Mapping[str, int], time: float
) -> dict[str, float]:
    """The shares, and where there is room no less than the kinds lose in some time at their rates."""
    return {
        kind: max(share, min(1.0, budget.rate(kind) * time)) if room[kind] else share
        for kind, share in shares.items()
    }


def needed(budget: UnitBudget, counts: Counts, limits: Sequence[Limit], of: Limit) -> int:
    """How much of a resource goes with what other limits still need."""
    shares = _shares(budget, counts, limits)
    return int(
        sum(
            shares[kind] * (now[kind] - after[kind]) * cost[kind]
            for now, after, cost in zip(counts, budget.least, of.cost, strict=True)
            for kind in now
        )
    )


def pace_of_kinds(budget: UnitBudget, target: int) -> dict[str, float]:
    """By kind, what to multiply its rate with so that all limits are met at the same time.

    A limit that only some kinds can meet (the KV cache) may need more of them than the others do. The kind
    that loses most goes at the highest rate of all. A kind that no limit needs any more waits.
    """
    limits = budget.binding(target)
    kinds = {kind for layer in budget.initial for kind in layer if budget.rate(kind) > 0}
    if all(budget.kinds(limit) == kinds for limit in limits):
        return {}
    start, now = (_shares(budget, counts, limits) for counts in (budget.initial, budget.current))
    rate_of_all = max(map(budget.rate, kinds)) / max(start[kind] for kind in kinds)
    return {kind: start[kind] * rate_of_all / budget.rate(kind) if now[kind] else 0.0 for kind in kinds}


def model_budget(
    family: Family,
    widths: Sequence[LayerWidths],
    shapes: Mapping[str, Sequence[int]],
    initial: Counts | None = None,
) -> UnitBudget:
    """Units of a model and their cost in parameters.

    Args:
        shapes: of all its tensors by name, tied ones once.
        initial: units of the original model; those of this one if not given.
    Raises:
        ValueError: a tensor is missing, or its shape does not fit the widths.
    """
    counts = removal_counts(family, widths)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    costs = unit_costs(family, widths, shapes)
    return UnitBudget(counts if initial is None else initial, counts, costs, parameters)
