"""Allocation: normalised importance, the sparsity trajectory, and landing on the parameter budget."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from adapt_pruner.allocation import (
    UnitBudget,
    allocate,
    allocate_as_published,
    allocate_by_rank,
    allocate_uniform,
    bundle_importance,
    counts_at,
    next_sparsity,
    normalize_importance,
    select_units,
)


def make_budget(layers, *, channel_cost=10, group_cost=300, rest=1000, current=None) -> UnitBudget:
    """A model given as (kv_groups, channels) per layer, and `rest` parameters that are never pruned."""
    initial = tuple({"kv_group": groups, "channel": channels} for groups, channels in layers)
    now = tuple({"kv_group": groups, "channel": channels} for groups, channels in current or layers)
    cost = tuple({"kv_group": group_cost, "channel": channel_cost} for _ in layers)
    parameters = rest + sum(layer[kind] * cost[0][kind] for layer in now for kind in layer)
    return UnitBudget(initial, now, cost, parameters)


def flat_scores(budget: UnitBudget):
    return [{kind: np.ones(count) for kind, count in layer.items()} for layer in budget.current]


# Budget


def test_parameters_and_floor_of_a_budget():
    budget = make_budget([(4, 20), (2, 50)], channel_cost=10, group_cost=300, rest=1000)
    assert budget.num_parameters == 1000 + 6 * 300 + 70 * 10
    counts = ({"kv_group": 3, "channel": 20}, {"kv_group": 2, "channel": 7})
    assert budget.parameters(counts) == 1000 + 5 * 300 + 27 * 10
    assert budget.floor == 1000 + 2 * 300 + 2 * 10


def test_floor_counts_from_the_original_model_and_the_pruned_one_alike():
    layers = [(4, 20), (2, 50)]
    assert make_budget(layers).floor == make_budget(layers, current=[(1, 5), (2, 9)]).floor


# Normalising layer importance


@pytest.mark.parametrize("how", ["max", "rank", "zscore_clip"])
@pytest.mark.parametrize("seed", range(5))
def test_normalised_importance_has_mean_zero_and_reaches_one(how, seed):
    rng = np.random.default_rng(seed)
    importance = rng.normal(rng.normal(), 10.0 ** rng.integers(-6, 6), size=rng.integers(2, 40))
    normalised = normalize_importance(importance, how)
    assert abs(normalised.mean()) < 1e-12
    assert np.abs(normalised).max() == pytest.approx(1, abs=1e-15)
    order = np.argsort(importance)
    assert np.all(np.diff(normalised[order]) >= 0)


@pytest.mark.parametrize("how", ["max", "rank", "zscore_clip"])
@pytest.mark.parametrize("importance", [[0.0] * 5, [-0.99] * 3, [7.0]])
def test_equal_layers_normalise_to_zeros(how, importance):
    assert normalize_importance(np.array(importance), how).tolist() == [0.0] * len(importance)


def test_max_is_centred_and_divided_by_the_largest():
    assert normalize_importance(np.array([1.0, 2.0, 6.0])).tolist() == [-2 / 3, -1 / 3, 1]


def test_rank_is_even_and_ties_share_a_rank():
    assert normalize_importance(np.array([0.1, 500.0, -3.0]), "rank").tolist() == [0, 1, -1]
    # Ranks 0.5, 2, 2, 3.5 around their mean 2.
    assert normalize_importance(np.array([0.0, 4.0, 4.0, 9.0]), "rank").tolist() == [-1, 0, 0, 1]


def test_zscore_clip_takes_the_range_back_from_an_outlier():
    importance = np.array([100.0, *np.linspace(0, 1, 20)])
    clipped, plain = normalize_importance(importance, "zscore_clip"), normalize_importance(importance)
    assert clipped[0] == plain[0] == 1
    assert np.ptp(clipped[1:]) > 1.5 * np.ptp(plain[1:])
    # No outlier: nothing is clipped, so it is the same as max.
    even = np.linspace(-1, 1, 9)
    assert normalize_importance(even, "zscore_clip") == pytest.approx(normalize_importance(even))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_importance_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=f"layer importance is not finite: .*{bad}"):
        normalize_importance(np.array([0.0, bad, 1.0]))


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match=r"normalize is 'softmax', expected one of .*'max', 'rank'"):
        normalize_importance(np.array([0.0, 1.0]), "softmax")


def test_normalising_leaves_its_argument_alone():
    importance = np.array([3.0, 1.0, 2.0])
    for how in ("max", "rank", "zscore_clip"):
        normalize_importance(importance, how)
    assert importance.tolist() == [3.0, 1.0, 2.0]


# The trajectory


def test_next_sparsity_is_the_formula():
    # 0.1 + 1/50 - 0.02 * I
    after = next_sparsity(np.full(3, 0.1), np.array([1.0, 0.0, -1.0]), 50, 0.02)
    assert after.tolist() == pytest.approx([0.1, 0.12, 0.14])


def test_next_sparsity_is_clipped():
    after = next_sparsity(np.array([0.01, 0.98, 0.5]), np.array([1.0, -1.0, 0.0]), 10, 0.2)
    assert after.tolist() == pytest.approx([0.0, 0.99, 0.6])


def test_a_scaled_step_is_that_part_of_the_step():
    after = next_sparsity(np.full(3, 0.3), np.array([1.0, 0.0, -1.0]), 10, 0.05, scale=0.5)
    assert after.tolist() == pytest.approx([0.3 + 0.025, 0.3 + 0.05, 0.3 + 0.075])


@pytest.mark.parametrize(
    ("sparsity", "channels", "groups"),
    [
        (0.0, 88, 3),
        (0.001, 87, 3),  # int(88 * 0.999) = 87: the first channel goes at once
        (0.02, 86, 3),  # 86.24
        (0.3333, 58, 3),  # 3 * 0.3333 is not yet a whole group
        (1 / 3, 58, 2),
        (0.5, 44, 2),  # 3 * 0.5 = 1.5: only one group is due
        (0.6667, 29, 1),
        (0.99, 1, 1),  # int(0.88) and 3 - 2: one of each always stays
    ],
)
def test_counts_at_a_sparsity_by_hand(sparsity, channels, groups):
    budget = make_budget([(3, 88)])
    assert counts_at(budget, np.array([sparsity])) == ({"kv_group": groups, "channel": channels},)


def test_a_group_goes_when_its_full_share_is_reached_in_small_steps():
    # Eight additions of 0.1 stay a little below 0.8; the eighth group of 10 goes all the same.
    sparsity = np.zeros(1)
    for _ in range(8):
        sparsity = next_sparsity(sparsity, np.zeros(1), 10, 0.02)
    assert sparsity[0] < 0.8
    assert counts_at(make_budget([(10, 100)]), sparsity)[0]["kv_group"] == 2
    assert counts_at(make_budget([(10, 100)]), sparsity - 1e-6)[0]["kv_group"] == 3


def test_counts_are_fractions_of_the_original_model_and_never_come_back():
    budget = make_budget([(4, 100), (4, 100)], current=[(2, 40), (4, 90)])
    # Half of the *initial* units: layer 0 is already below that and is left alone.
    assert counts_at(budget, np.array([0.5, 0.5])) == (
        {"kv_group": 2, "channel": 40},
        {"kv_group": 2, "channel": 50},
    )
    assert counts_at(budget, np.zeros(2)) == budget.current


def test_the_last_unit_stays_whatever_the_sparsity():
    counts = counts_at(make_budget([(1, 1), (1, 5), (300, 3)]), np.full(3, 0.99))
    assert counts == (
        {"kv_group": 1, "channel": 1},
        {"kv_group": 1, "channel": 1},
        {"kv_group": 3, "channel": 1},
    )


# One allocation


def test_a_step_that_does_not_reach_the_target_is_the_plain_formula():
    budget = make_budget([(4, 100), (4, 100), (4, 100)])
    importance = np.array([1.0, -0.5, -0.5])
    done = allocate(
        budget, np.zeros(3), importance, flat_scores(budget), target=5000, iterations=10, amplitude=0.1
    )
    assert not done.landed
    assert done.sparsity.tolist() == pytest.approx([0.0, 0.15, 0.15])
    assert [layer["channel"] for layer in done.counts] == [100, 85, 85]
    assert [layer["kv_group"] for layer in done.counts] == [4, 4, 4]


def test_the_last_step_is_scaled_down_not_taken_whole():
    budget = make_budget([(4, 1000), (4, 1000)], channel_cost=10, group_cost=300)
    importance = np.array([0.5, -0.5])
    target = budget.num_parameters - 500
    done = allocate(
        budget, np.zeros(2), importance, flat_scores(budget), target=target, iterations=10, amplitude=0.1
    )
    assert done.landed
    assert budget.parameters(done.counts) == target
    # The full step would be 0.05 and 0.15; the one taken keeps that ratio.
    assert done.sparsity[1] == pytest.approx(3 * done.sparsity[0])
    assert 0 < done.sparsity[1] < 0.15
    assert abs((1000 - done.counts[1]["channel"]) - 3 * (1000 - done.counts[0]["channel"])) <= 4


def test_traded_channels_are_the_least_important_per_parameter():
    # All layers lose a group in the same instant of the step, so the trade starts from an untouched model.
    initial = ({"kv_group": 2, "channel": 6}, {"kv_group": 2, "channel": 6})
    cost = ({"kv_group": 100, "channel": 10}, {"kv_group": 100, "channel": 20})
    budget = UnitBudget(initial, initial, cost, 1000)
    # Just before half of the units are due: 3 channels and no group gone in either layer.
    sparsity = np.full(2, 0.5 - 1e-3)
    budget = UnitBudget(initial, counts_at(budget, sparsity), cost, 1000)
    channels = [np.array([5.0, 1.0, 3.0, 4.0]), np.array([9.0, 4.0, 20.0, 30.0])]
    assert [layer["channel"] for layer in budget.current] == [3, 3]
    scores = [{"kv_group": np.ones(2), "channel": c[:3]} for c in channels]
    # Per parameter: 0.1 0.3 0.5 and 0.2 0.45 1.0. Cheapest first: 0.1 (10), 0.2 (20), 0.3 (10), 0.45 (20).
    # For 20 the cheapest is not needed any more once the second has gone.
    for removed, expected in (
        (5, [2, 3]),
        (10, [2, 3]),
        (20, [3, 2]),
        (25, [2, 2]),
        (40, [1, 2]),
        (60, [1, 1]),
    ):
        done = allocate(
            budget, sparsity, np.zeros(2), scores, target=1000 - removed, iterations=2, amplitude=0.0
        )
        assert [layer["channel"] for layer in done.counts] == expected, removed
        assert [layer["kv_group"] for layer in done.counts] == [2, 2]


def test_groups_are_spared_while_channels_can_carry_the_rest():
    # Six identical layers lose a group at the same instant: 6 * 900 parameters, the target is 100 away.
    budget = make_budget([(2, 100)] * 6, channel_cost=10, group_cost=900)
    sparsity = np.full(6, 0.49)
    budget = make_budget([(2, 100)] * 6, channel_cost=10, group_cost=900, current=[(2, 51)] * 6)
    target = budget.num_parameters - 6 * 10 - 100
    done = allocate(
        budget, sparsity, np.zeros(6), flat_scores(budget), target=target, iterations=50, amplitude=0.02
    )
    assert done.landed
    assert [layer["kv_group"] for layer in done.counts] == [2] * 6
    assert budget.parameters(done.counts) == target


def test_a_group_goes_when_the_channels_cannot_carry_it_and_channels_come_back_for_it():
    # 2 groups and 11 channels: the 10 removable channels are worth 100, the excess is 150.
    budget = make_budget([(2, 11)], channel_cost=10, group_cost=200, rest=0)
    scores = [{"kv_group": np.array([2.0, 1.0]), "channel": np.arange(11.0)}]
    done = allocate(budget, np.zeros(1), np.zeros(1), scores, target=510 - 150, iterations=1, amplitude=0.0)
    assert done.counts == ({"kv_group": 1, "channel": 11},)  # not further channels beside the group
    assert budget.parameters(done.counts) <= 510 - 150


def test_the_least_important_group_per_parameter_goes_first():
    cost = ({"kv_group": 200, "channel": 1}, {"kv_group": 400, "channel": 1})
    initial = ({"kv_group": 2, "channel": 2},) * 2
    budget = UnitBudget(initial, initial, cost, 5000)
    scores = [
        {"kv_group": np.array([50.0, 40.0]), "channel": np.ones(2)},  # 0.2 per parameter
        {"kv_group": np.array([60.0, 90.0]), "channel": np.ones(2)},  # 0.15 per parameter
    ]
    done = allocate(budget, np.zeros(2), np.zeros(2), scores, target=4600, iterations=1, amplitude=0.0)
    assert [layer["kv_group"] for layer in done.counts] == [2, 1]


def test_a_target_below_what_is_possible_is_an_internal_error():
    budget = make_budget([(2, 5)])
    with pytest.raises(AssertionError):
        allocate(
            budget,
            np.zeros(1),
            np.zeros(1),
            flat_scores(budget),
            target=budget.floor - 1,
            iterations=2,
            amplitude=0.0,
        )


# Whole runs


def run_to_target(budget, target, rng, *, fixed_importance=False, limit=2000, **options):
    """The loop of a pruning run over random importance; returns every allocation on the way."""
    sparsity = np.zeros(len(budget.initial))
    importance = normalize_importance(rng.normal(size=len(budget.initial)))
    history = []
    while budget.num_parameters > target:
        assert len(history) < limit, "does not terminate"
        if not fixed_importance:
            importance = normalize_importance(rng.normal(size=len(budget.initial)))
        scores = [{kind: rng.random(count) for kind, count in layer.items()} for layer in budget.current]
        done = allocate(budget, sparsity, importance, scores, target=target, **options)
        for before, after in zip(budget.current, done.counts, strict=True):
            for kind in before:
                assert 1 <= after[kind] <= before[kind]
        left = budget.parameters(done.counts)
        assert done.landed == (left <= target)
        assert np.all((done.sparsity >= 0) & (done.sparsity <= 0.99))
        history.append((budget, done))
        budget = UnitBudget(budget.initial, done.counts, budget.cost, left)
        sparsity = done.sparsity
    return budget, history


def random_budget(rng) -> UnitBudget:
    """Layers of different widths; a group costs many channels, yet less than half of a layer's channels."""
    layers = [(int(rng.integers(1, 9)), int(rng.integers(60, 400))) for _ in range(rng.integers(1, 9))]
    channel = int(rng.integers(3, 300))
    return make_budget(
        layers,
        channel_cost=channel,
        group_cost=channel * int(rng.integers(5, 30)) + int(rng.integers(0, channel)),
        rest=int(rng.integers(0, 50_000)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_runs_land_less_than_one_channel_below_the_target(seed):
    rng = np.random.default_rng(seed)
    whole = random_budget(rng)
    channel = whole.cost[0]["channel"]
    options = {
        "iterations": int(rng.choice([1, 2, 5, 20, 50])),
        "amplitude": float(rng.choice([0.0, 0.02, 0.1])),
        "fixed_importance": bool(rng.integers(2)),
    }
    prunable = whole.num_parameters - whole.floor
    targets = [whole.floor + int(f * prunable) for f in (0.95, 0.8, 0.5, 0.3, 0.1)]
    for target in [*targets, whole.floor + channel + 1, whole.floor + 1, whole.floor]:
        last, history = run_to_target(whole, target, rng, **options)
        below = target - last.num_parameters
        assert below >= 0
        before, done = history[-1]
        if below >= channel:
            # Only where groups had to go for lack of channels, and every channel there was is kept.
            assert before.current != done.counts
            assert [x["channel"] for x in before.current] == [x["channel"] for x in done.counts]
            removable = sum(x["channel"] - 1 for x in before.current) * channel
            assert removable < whole.cost[0]["kv_group"]
        else:
            assert below < channel
        if target >= targets[2]:
            assert below < channel
        if target == whole.floor:
            assert all(layer == {"kv_group": 1, "channel": 1} for layer in last.current)


def test_costs_that_differ_between_layers_land_within_the_smallest_channel():
    rng = np.random.default_rng(5)
    initial = tuple({"kv_group": 3, "channel": 200} for _ in range(4))
    cost = tuple({"kv_group": 700, "channel": c} for c in (7, 12, 30, 31))
    total = 999 + sum(layer[k] * c[k] for layer, c in zip(initial, cost, strict=True) for k in layer)
    for share in (0.9, 0.6, 0.3):
        target = int(share * total)
        last, _ = run_to_target(
            UnitBudget(initial, initial, cost, total), target, rng, iterations=20, amplitude=0.05
        )
        assert 0 <= target - last.num_parameters < 31


def test_a_uniform_run_to_eighty_percent_of_the_units_takes_a_fifth_of_the_iterations():
    budget = make_budget([(1, 1000)] * 4, channel_cost=10, group_cost=10, rest=0)
    target = budget.num_parameters - 4 * 200 * 10
    last, history = run_to_target(budget, target, np.random.default_rng(0), iterations=50, amplitude=0.0)
    assert len(history) == 10
    assert budget.parameters(last.current) == target
    # The last channel of all layers is due in the same instant; importance decides between them.
    assert all(abs(layer["channel"] - 800) <= 4 for layer in last.current)


def test_the_group_of_every_layer_is_gone_at_its_share_of_the_run():
    budget = make_budget([(2, 100)] * 3, channel_cost=10, group_cost=50)
    _, history = run_to_target(budget, budget.floor, np.random.default_rng(0), iterations=10, amplitude=0.0)
    groups = [done.counts[0]["kv_group"] for _, done in history]
    assert groups[:6] == [2, 2, 2, 2, 1, 1]


def test_when_every_layer_is_at_the_largest_sparsity_the_rest_is_traded():
    # 1000 channels: 0.99 leaves 10 of them, and the target asks for fewer.
    budget = make_budget([(1, 1000)] * 2, current=[(1, 10)] * 2)
    scores = [{"kv_group": np.ones(1), "channel": np.arange(1.0, 11.0) + 100 * i} for i in range(2)]
    target = budget.num_parameters - 95
    done = allocate(
        budget, np.full(2, 0.99), np.zeros(2), scores, target=target, iterations=5, amplitude=0.02
    )
    assert done.landed
    assert [layer["channel"] for layer in done.counts] == [1, 9]
    assert budget.parameters(done.counts) == target - 5


@pytest.mark.parametrize("leftover", [0.0, 2e-17, 1e-6])
def test_a_layer_that_no_longer_loses_anything_does_not_keep_the_run_going(leftover):
    # One layer is protected (its increment is zero, or rounding noise), the other has nothing left to give.
    budget = make_budget([(6, 250), (1, 60)])
    importance = np.array([1.0 - 50 * leftover, -1.0])
    sparsity = np.array([0.0, 0.99])
    budget = make_budget([(6, 250), (1, 60)], current=[(6, 249), (1, 1)])
    sparsity[0] = 1e-3
    done = allocate(
        budget,
        sparsity,
        importance,
        flat_scores(budget),
        target=budget.num_parameters - 500,
        iterations=50,
        amplitude=0.02,
    )
    assert done.landed
    assert budget.parameters(done.counts) == budget.num_parameters - 500


def test_a_round_without_a_removal_does_not_end_the_run_early():
    # 500 rounds over 40 channels: most rounds remove nothing, yet the groups must still get their turn.
    budget = make_budget([(2, 40)] * 2, channel_cost=10, group_cost=30)
    target = budget.floor + 3 * 10
    _, history = run_to_target(budget, target, np.random.default_rng(1), iterations=500, amplitude=0.0)
    assert 400 < len(history) <= 500


# Units


def test_the_most_important_units_are_selected_in_order():
    kept = select_units(np.array([0.5, 9.0, 0.1, 3.0, 2.0]), 3)
    assert kept.tolist() == [1, 3, 4]
    assert kept.dtype == np.int64


@pytest.mark.parametrize(("count", "kept"), [(4, [0, 1, 2, 3]), (3, [0, 2, 3]), (2, [2, 3]), (1, [3])])
def test_of_equal_units_the_later_stays(count, kept):
    assert select_units(np.array([2.0, 1.0, 2.0, 2.0]), count).tolist() == kept


def test_select_all_and_one():
    scores = np.random.default_rng(0).random(100)
    assert select_units(scores, 100).tolist() == list(range(100))
    assert select_units(scores, 1).tolist() == [int(scores.argmax())]


def test_unit_importance_that_is_not_finite_is_counted():
    with pytest.raises(ValueError, match="2 unit importances are not finite"):
        select_units(np.array([1.0, math.nan, math.inf]), 1)


# Other allocations


def random_scores(budget: UnitBudget, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return [
        {kind: rng.random(n) * 10 ** rng.random() - shift for kind, n in c.items()} for c in budget.current
    ]


def test_uniform_takes_the_same_share_of_every_layer():
    budget = make_budget([(4, 100), (4, 200), (2, 50)], channel_cost=10, group_cost=100)
    target = budget.parameters(
        tuple({"kv_group": g // 2, "channel": c // 2} for g, c in [(4, 100), (4, 200), (2, 50)])
    )
    done = allocate_uniform(budget, np.zeros(3), random_scores(budget), target=target, iterations=1)
    assert done.landed
    assert done.sparsity.tolist() == pytest.approx([done.sparsity[0]] * 3)
    # At s a touch below one half no group has its full share; the rest is traded.
    rest = budget.parameters(done.counts)
    assert target - 10 < rest <= target
    step = allocate_uniform(budget, np.zeros(3), random_scores(budget), target=target, iterations=10)
    assert step.counts == tuple(
        {"kv_group": g, "channel": c * 9 // 10} for g, c in [(4, 100), (4, 200), (2, 50)]
    )
    assert not step.landed


@pytest.mark.parametrize("per_parameter", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_ranking_takes_the_lowest_units_wherever_they_are(per_parameter, seed):
    budget = make_budget([(4, 20), (3, 30), (2, 15)], channel_cost=10, group_cost=60)
    shift = 0.0 if per_parameter else 2.0  # standardised scores are negative
    scores = random_scores(budget, seed, shift)
    target = int(0.75 * budget.num_parameters)
    done = allocate_by_rank(budget, scores, target=target, iterations=1, per_parameter=per_parameter)
    # One after the other, the lowest first, until the next one would reach the target.
    units = sorted(
        (value / budget.cost[i][kind] if per_parameter else value, i, kind)
        for i, layer in enumerate(scores)
        for kind, values in layer.items()
        for value in sorted(values)[:-1]
    )
    expected = [dict(layer) for layer in budget.current]
    for _, i, kind in units:
        if budget.parameters(expected) - budget.cost[i][kind] <= target:
            break
        expected[i][kind] -= 1
    assert [c["kv_group"] for c in done.counts] == [c["kv_group"] for c in expected]
    assert all(a["channel"] <= b["channel"] for a, b in zip(done.counts, expected, strict=True))
    traded = sum(b["channel"] - a["channel"] for a, b in zip(done.counts, expected, strict=True))
    assert traded <= 6 + 1  # the price of the group that did not fit
    assert target - 10 < budget.parameters(done.counts) <= target
    assert done.landed
    before = [60 * g + 10 * c for g, c in [(4, 20), (3, 30), (2, 15)]]
    after = [60 * c["kv_group"] + 10 * c["channel"] for c in done.counts]
    assert done.sparsity.tolist() == pytest.approx([1 - a / b for a, b in zip(after, before, strict=True)])


def test_importance_per_parameter_and_importance_rank_differently():
    budget = make_budget([(2, 10)], channel_cost=10, group_cost=50)
    scores = [{"kv_group": np.array([2.0, 9.0]), "channel": np.full(10, 1.0)}]
    kept = {}
    for per_parameter in (True, False):
        done = allocate_by_rank(budget, scores, target=1140, iterations=1, per_parameter=per_parameter)
        kept[per_parameter] = done.counts[0]
    assert kept == {True: {"kv_group": 1, "channel": 9}, False: {"kv_group": 2, "channel": 4}}


def test_ranking_in_rounds_removes_an_equal_part_in_each():
    layers = [(4, 40), (2, 60)]
    budget = make_budget(layers, channel_cost=10, group_cost=100)
    target, seen = budget.floor + 300, []
    while budget.num_parameters > target:
        done = allocate_by_rank(
            budget, random_scores(budget), target=target, iterations=5, per_parameter=True
        )
        seen.append(budget.num_parameters - budget.parameters(done.counts))
        assert done.landed == (budget.parameters(done.counts) <= target)
        current = [(c["kv_group"], c["channel"]) for c in done.counts]
        budget = make_budget(layers, channel_cost=10, group_cost=100, current=current)
    part = (make_budget(layers, group_cost=100).num_parameters - budget.floor) / 5
    assert len(seen) == 4  # 276 of 1380 in each, 1080 in all
    assert all(part <= removed < part + 10 for removed in seen[:-1])
    assert target - 10 < budget.num_parameters <= target


@pytest.mark.parametrize("seed", range(4))
def test_protected_layers_keep_everything_under_every_allocation(seed):
    budget = make_budget([(3, 30), (3, 30), (3, 30), (3, 30)], channel_cost=10, group_cost=200)
    budget = dataclasses.replace(budget, protected=frozenset({0, 3}))
    assert budget.floor == 1000 + 2 * (900 - 0) + 2 * 210
    scores, importance = random_scores(budget, seed), np.array([-1.0, 1.0, 0.5, -0.5])
    rounds = {"iterations": 1}
    for target in (budget.floor, budget.floor + 35, budget.num_parameters - 115):
        for done in (
            allocate(budget, np.zeros(4), importance, scores, target=target, amplitude=0.01, **rounds),
            allocate_uniform(budget, np.zeros(4), scores, target=target, **rounds),
            allocate_by_rank(budget, scores, target=target, per_parameter=True, **rounds),
            allocate_by_rank(budget, scores, target=target, per_parameter=False, **rounds),
        ):
            assert done.counts[0] == done.counts[3] == {"kv_group": 3, "channel": 30}
            assert done.sparsity[0] == done.sparsity[3] == 0
            assert min(done.counts[1].values()) >= 1
            if done.landed:
                assert target - 10 < budget.parameters(done.counts) <= target
            else:
                assert target == budget.floor


def test_published_counts_are_of_rows():
    """Of 48 rows int(48 * 0.68) = 32 stay at s = 0.32, which is one group of 16 less, up to a row early."""
    budget = make_budget([(3, 208)], channel_cost=10, group_cost=100)
    for s, groups in ((0.0, 3), (0.3, 3), (0.32, 2), (0.334, 2), (0.64, 2), (0.65, 1), (0.99, 1)):
        assert counts_at(budget, np.array([s]), rows=16)[0]["kv_group"] == groups, s
    # Ours wait until the whole share is due.
    assert counts_at(budget, np.array([0.3333]))[0]["kv_group"] == 3
    assert counts_at(budget, np.array([0.3334]))[0]["kv_group"] == 2


def test_the_published_allocation_overshoots_and_says_when_it_cannot_go_on():
    budget = make_budget([(3, 200)], channel_cost=10, group_cost=100)
    rounds = {"iterations": 4, "amplitude": 0.0, "rows": 16}
    done = allocate_as_published(budget, np.zeros(1), np.zeros(1), target=3200, **rounds)
    assert (done.counts, done.landed) == (({"kv_group": 3, "channel": 150},), True)
    assert budget.parameters(done.counts) == 1000 + 300 + 1500
    again = allocate_as_published(budget, np.zeros(1), np.zeros(1), target=2000, **rounds)
    assert not again.landed
    spent = make_budget([(3, 200)], channel_cost=10, group_cost=100, current=[(1, 2)])
    with pytest.raises(ValueError, match=r"stops at 1,120 parameters, above the target 1,110"):
        allocate_as_published(spent, np.full(1, 0.99), np.zeros(1), target=1110, **rounds)


# Rates of kinds


def test_a_rate_is_a_multiple_of_the_layers_sparsity():
    budget = dataclasses.replace(make_budget([(10, 100)]), rates={"kv_group": 0.5, "channel": 2.0})
    for s, groups, channels in ((0.1, 10, 80), (0.2, 9, 60), (0.4, 8, 19), (0.6, 7, 1), (0.99, 6, 1)):
        assert counts_at(budget, np.array([s])) == ({"kv_group": groups, "channel": channels},), s
    still = dataclasses.replace(budget, rates={"kv_group": 0.0})
    assert counts_at(still, np.array([0.9])) == ({"kv_group": 10, "channel": 9},)
    assert still.floor == budget.floor + 9 * 300


@pytest.mark.parametrize("rate", [0.25, 4.0])
@pytest.mark.parametrize("shift", [0.0, 40.0])  # all prices positive, all negative
def test_a_ranking_divides_the_price_by_the_rate(rate, shift):
    budget = make_budget([(10, 100)] * 2, channel_cost=10, group_cost=100)
    scores = random_scores(budget, 1, shift)
    removed = {}
    for r in (1.0, rate):
        rated = dataclasses.replace(budget, rates={"kv_group": r})
        target = int(0.7 * budget.num_parameters)
        done = allocate_by_rank(rated, scores, target=target, iterations=1, per_parameter=False)
        removed[r] = sum(10 - layer["kv_group"] for layer in done.counts)
    assert (removed[rate] > removed[1.0]) == (rate > 1)
    assert removed[rate] != removed[1.0]


@pytest.mark.parametrize("seed", range(20))
def test_without_channels_landing_trades_the_cheapest_units_that_fit(seed):
    rng = np.random.default_rng(seed)
    initial = tuple({"kv_group": int(n), "channel": 50} for n in rng.integers(2, 9, size=5))
    cost = tuple({"kv_group": int(c), "channel": 10} for c in rng.integers(100, 400, size=5))
    total = 2000 + sum(layer[k] * c[k] for layer, c in zip(initial, cost, strict=True) for k in layer)
    budget = UnitBudget(initial, initial, cost, total, rates={"channel": 0.0})
    scores, importance = random_scores(budget, seed), normalize_importance(rng.normal(size=5))
    for share in (0.3, 0.7, 0.95):
        target = budget.floor + int(share * (total - budget.floor))
        for done in (
            allocate(budget, np.zeros(5), importance, scores, target=target, iterations=1, amplitude=0.05),
            allocate_uniform(budget, np.zeros(5), scores, target=target, iterations=1),
            allocate_by_rank(budget, scores, target=target, iterations=1, per_parameter=True),
        ):
            assert [layer["channel"] for layer in done.counts] == [50] * 5
            assert 0 <= target - budget.parameters(done.counts) < max(c["kv_group"] for c in cost)
            # Nothing that went fits again.
            for before, after, price in zip(initial, done.counts, cost, strict=True):
                fits = budget.parameters(done.counts) + price["kv_group"] <= target
                assert not fits or before == after


# Lanes of units that shrink alike


def test_lanes_lose_their_own_least_important_units():
    scores = np.array([5.0, 1.0, 3.0, 2.0, 9.0, 4.0])  # two lanes of three
    assert select_units(scores, 2, lanes=2).tolist() == [0, 2, 4, 5]
    assert select_units(scores, 1, lanes=2).tolist() == [0, 4]
    assert select_units(scores, 3, lanes=2).tolist() == list(range(6))
    # What goes first costs 1 + 2, then 3 + 4, then 5 + 9.
    assert bundle_importance(scores, 2).tolist() == [3.0, 7.0, 14.0]
    assert bundle_importance(scores, 1) is scores


# Channels in steps


def smollm2() -> UnitBudget:
    """Units and parameters of SmolLM2-135M."""
    layers = tuple({"kv_group": 3, "channel": 1536} for _ in range(30))
    cost = tuple({"kv_group": 8 * 64 * 576, "channel": 3 * 576} for _ in range(30))
    return UnitBudget(layers, layers, cost, 134_515_008)


def random_run(allocation, budget, target, rng, *, iterations, limit=600):
    """A run over random importance that changes in every round; returns the last budget and allocation."""
    sparsity = np.zeros(len(budget.initial))
    for _ in range(limit):
        importance = normalize_importance(rng.normal(size=len(budget.initial)))
        scores = [{kind: rng.random(n) for kind, n in layer.items()} for layer in budget.current]
        rounds = {"target": target, "iterations": iterations}
        if allocation == "adaptive":
            done = allocate(budget, sparsity, importance, scores, amplitude=0.02, **rounds)
        elif allocation == "uniform":
            done = allocate_uniform(budget, sparsity, scores, **rounds)
        else:
            done = allocate_by_rank(budget, scores, per_parameter=allocation == "global", **rounds)
        assert done.landed == (not budget.over(done.counts, target))
        budget = dataclasses.replace(
            budget,
            current=done.counts,
            num_parameters=budget.parameters(done.counts),
            limits=tuple(
                dataclasses.replace(limit, amount=budget.amount(limit, done.counts))
                for limit in budget.limits
            ),
        )
        sparsity = done.sparsity
        if done.landed:
            return budget
    raise AssertionError("does not terminate")


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.5])
@pytest.mark.parametrize("step", [64, 128])
@pytest.mark.parametrize("allocation", ["adaptive", "uniform", "global", "threshold"])
def test_channels_in_steps_land_within_one_step(allocation, step, share):
    budget = dataclasses.replace(smollm2(), round_to=step)
    target = int(share * budget.num_parameters)
    for iterations in (1, 50):
        last = random_run(allocation, budget, target, np.random.default_rng(step), iterations=iterations)
        assert all(layer["channel"] % step == 0 for layer in last.current)
        assert 0 <= target - last.num_parameters < step * 3 * 576


@pytest.mark.parametrize("allocation", ["adaptive", "uniform", "global", "threshold"])
@pytest.mark.parametrize("seed", range(5))
def test_a_layer_that_is_no_multiple_keeps_all_or_a_multiple(allocation, seed):
    rng = np.random.default_rng(seed)
    layers = [(4, int(n)) for n in rng.integers(5, 90, size=6)]
    budget = dataclasses.replace(make_budget(layers, group_cost=90), round_to=8)
    assert [layer["channel"] for layer in budget.least] == [min(n, 8) for _, n in layers]
    for target in (budget.floor, budget.floor + 700, budget.num_parameters - 300):
        last = random_run(allocation, budget, target, rng, iterations=4)
        for (_, initial), layer in zip(layers, last.current, strict=True):
            assert layer["channel"] == initial or layer["channel"] % 8 == 0 < layer["channel"]
        assert 0 <= target - last.num_parameters < 90


def test_the_step_with_the_least_importance_per_parameter_goes_first():
    budget = dataclasses.replace(make_budget([(1, 10), (1, 12)], rest=0), round_to=4)
    # Steps of layer 0: the lowest two (to 8), then four; of layer 1: four and four. The two fit again for 21.
    first = np.array([9, 9, 1, 3, 3, 3, 3, 3, 9, 9.0])  # (1 + 3) / 2 = 2, then 3
    second = np.array([2.5] * 4 + [8.0] * 8)  # 2.5, then 8
    scores = [{"kv_group": np.ones(1), "channel": first}, {"kv_group": np.ones(1), "channel": second}]
    for removed, expected in ((1, [8, 12]), (20, [8, 12]), (21, [10, 8]), (60, [8, 8]), (61, [4, 8])):
        target = budget.num_parameters - removed
        done = allocate(budget, np.zeros(2), np.zeros(2), scores, target=target, iterations=1, amplitude=0)
        ranked = allocate_by_rank(budget, scores, target=target, iterations=1, per_parameter=True)
        assert [layer["channel"] for layer in ranked.counts] == expected
        assert [layer["channel"] for layer in done.counts] == expected
