"""Limits on several resources at once: what is met, what waits, and how closely a run lands on them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_allocation import random_run, smollm2

from adapt_pruner.budget import Limit, UnitBudget, needed, pace_of_kinds

ALLOCATIONS = ["adaptive", "uniform", "global", "threshold"]


def with_limits(budget: UnitBudget, **shares: float) -> UnitBudget:
    """The budget with fractions of the KV cache (128 bytes per token and group) and of FLOPs as limits."""
    prices = {
        "kv_cache_bytes": {"kv_group": 128, "channel": 0},
        "flops": {
            kind: 2 * n + (4 * 3 * 64 * 1024 if kind == "kv_group" else 0)
            for kind, n in budget.cost[0].items()
        },
    }
    limits = []
    for name, share in shares.items():
        cost = tuple(prices[name] for _ in budget.initial)
        whole = sum(
            n * price[k] for layer, price in zip(budget.initial, cost, strict=True) for k, n in layer.items()
        )
        whole += 56_623_104 if name == "flops" else 0  # the head
        limits.append(Limit(name, cost, whole, int(share * whole)))
    return dataclasses.replace(budget, limits=tuple(limits))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(
    ("parameters", "shares"),
    [
        (1.0, {"flops": 0.7}),
        (1.0, {"kv_cache_bytes": 0.5}),
        (0.8, {"kv_cache_bytes": 0.5}),
        (0.6, {"kv_cache_bytes": 0.9}),
        (0.8, {"flops": 0.75}),
        (0.8, {"flops": 0.7, "kv_cache_bytes": 0.45}),
    ],
)
def test_all_limits_are_met_and_one_is_tight(allocation, parameters, shares):
    whole = with_limits(smollm2(), **shares)
    target = int(parameters * whole.num_parameters)
    for iterations in (1, 20):
        last = random_run(allocation, whole, target, np.random.default_rng(3), iterations=iterations)
        slack = {limit.resource: (limit.target - limit.amount, limit) for limit in last.limits}
        slack["parameters"] = (target - last.num_parameters, Limit("parameters", last.cost, 0, 0))
        assert all(left >= 0 for left, _ in slack.values())
        # Less than the smallest unit that uses the resource.
        assert any(
            left < min(price for price in limit.cost[0].values() if price) for left, limit in slack.values()
        )
        if "kv_cache_bytes" in shares and parameters == 1.0:
            assert all(layer["channel"] == 1536 for layer in last.current)
        if "kv_cache_bytes" in shares and "flops" not in shares and parameters < 1:
            # The wider limit is not overshot on the way to the narrower: at most a round's loss below.
            assert target - last.num_parameters < 0.02 * whole.num_parameters


def test_kinds_go_at_the_pace_that_meets_all_limits_together():
    budget = with_limits(smollm2(), kv_cache_bytes=0.5)
    cap = 30 * (1536 - 1) * 1728
    # 45 of 90 groups have to go, which is 75% of the 60 that can, with 45 * 294912 parameters.
    for share in (0.8, 0.7):
        target = int(share * budget.num_parameters)
        channels = (budget.num_parameters - target - 45 * 294_912) / cap
        pace = pace_of_kinds(budget, target)
        assert pace["kv_group"] == 1
        assert pace["channel"] == pytest.approx(channels / 0.75, rel=1e-6)
    # Alone, the cache needs no channel; without it, everything goes at its own rate.
    assert pace_of_kinds(budget, budget.num_parameters) == {"kv_group": 1, "channel": 0}
    assert pace_of_kinds(smollm2(), int(0.8 * budget.num_parameters)) == {}
    # What limits need most of does not wait for its own low rate.
    slow = dataclasses.replace(budget, rates={"kv_group": 0.25})
    assert pace_of_kinds(slow, budget.num_parameters) == {"kv_group": 4, "channel": 0}


def test_what_narrower_limits_still_need_counts_for_the_wider():
    budget = with_limits(smollm2(), kv_cache_bytes=0.5)
    parameters = Limit("parameters", budget.cost, budget.num_parameters, 0)
    assert needed(budget, budget.current, budget.limits, parameters) == pytest.approx(45 * 294_912, abs=1)


def test_a_kind_that_no_limit_needs_any_more_waits():
    current = tuple({"kv_group": 3, "channel": 1300} for _ in range(30))
    budget = with_limits(smollm2(), kv_cache_bytes=0.5)
    budget = dataclasses.replace(budget, current=current, num_parameters=budget.parameters(current))
    # 45 groups less bring the parameters below the target: the channels have done their part.
    target = budget.num_parameters - 45 * 294_912 + 1
    assert pace_of_kinds(budget, target)["channel"] == 0
    assert pace_of_kinds(budget, target - 10_000)["channel"] > 0
