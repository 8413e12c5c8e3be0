"""Allocation by search: masked losses are those of pruned models; a search never ends above its start."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from test_pruner import bytes_of, channel_cost, settings  # noqa: F401
from tiny import FAMILIES, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt_pruner import prune, summarize
from adapt_pruner.allocation import UnitBudget, allocate, allocate_by_rank, allocate_uniform
from adapt_pruner.allocation_search import _by_weighted_rank, _weights_of, allocate_by_search
from adapt_pruner.data import load_documents, sample_sequences, tokenize
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring.masking import MaskedLoss
from adapt_pruner.surgery import prune_layer

BATCH = torch.randint(3, 260, (5, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_masked_loss_is_that_of_the_pruned_model(model_type, granularity):
    model = make_model(model_type)
    family = find_family(model_type).with_granularity(granularity)
    widths = layer_widths(model.config.to_dict())
    heads = np.array([0, 2, 3] if granularity == "kv_group" else [0, 3, 4, 7])
    keep = [
        {"channel": np.arange(layer, 88, 2), family.unit_kinds[0].name: heads} for layer in range(len(widths))
    ]
    everything = [{kind.name: np.arange(kind.count(w)) for kind in family.unit_kinds} for w in widths]
    with torch.no_grad():
        dense = model(input_ids=BATCH, labels=BATCH).loss.item()
    with MaskedLoss(model, family, widths, BATCH, micro_batch_size=2) as loss:
        assert loss(everything) == pytest.approx(dense, rel=1e-6)
        masked = loss(keep)
        assert loss(everything) == pytest.approx(dense, rel=1e-6), "nothing of a candidate stays behind"
    assert not any(module._forward_pre_hooks for module in model.modules())
    for layer, layer_widths_ in enumerate(widths):
        prune_layer(model, family, layer, layer_widths_, keep[layer])
    with torch.no_grad():
        pruned = model(input_ids=BATCH, labels=BATCH).loss.item()
    assert masked == pytest.approx(pruned, rel=2e-6)
    assert abs(pruned - dense) > 1e-3


# The search on losses that are known


def make_budget(layers=6, *, channels=60, protected=(), current=None):
    initial = tuple({"kv_group": 4, "channel": channels} for _ in range(layers))
    now = current or initial
    cost = tuple({"kv_group": 300, "channel": 10} for _ in range(layers))
    parameters = 1000 + sum(n[kind] * c[kind] for n, c in zip(now, cost, strict=True) for kind in n)
    return UnitBudget(initial, now, cost, parameters, frozenset(protected))


def importances(budget, seed=0, shift=0.0):
    """Alike per parameter, whatever the kind."""
    rng = np.random.default_rng(seed)
    return [
        {kind: cost[kind] * (rng.lognormal(size=n) - shift) for kind, n in layer.items()}
        for layer, cost in zip(budget.current, budget.cost, strict=True)
    ]


def rising(budget, seed=1):
    """A loss that rises with the square of what is removed, by layer and kind more or less steeply."""
    rng = np.random.default_rng(seed)
    steep = [{kind: rng.lognormal(sigma=1.5) for kind in layer} for layer in budget.current]

    def loss(counts):
        return sum(
            steep[i][kind] * ((n - counts[i][kind]) / n) ** 2
            for i, layer in enumerate(budget.initial)
            for kind, n in layer.items()
        )

    return loss


def search(budget, units, loss, *, target, sparsity=None, **changes):
    options = {"iterations": 1, "amplitude": 0.3, "evaluations": 150, "seed": (0, 1), **changes}
    layers = len(budget.initial)
    sparsity = np.zeros(layers) if sparsity is None else sparsity
    return allocate_by_search(
        budget, sparsity, np.linspace(-1, 1, layers), units, loss, target=target, **options
    )


@pytest.mark.parametrize("shift", [0.0, 1.0])  # importance may be negative
@pytest.mark.parametrize("seed", range(4))
def test_it_is_better_than_every_other_allocation_on_the_same_budget(seed, shift):
    budget = make_budget()
    units, loss = importances(budget, seed, shift), rising(budget, seed)
    target = int(0.7 * budget.num_parameters)
    allocation, done = search(budget, units, loss, target=target)
    assert allocation.landed
    assert 0 <= target - budget.parameters(allocation.counts) < 10
    zeros, importance = np.zeros(6), np.linspace(-1, 1, 6)
    others = {
        "adaptive": allocate(budget, zeros, importance, units, target=target, iterations=1, amplitude=0.3),
        "uniform": allocate_uniform(budget, zeros, units, target=target, iterations=1),
        "global": allocate_by_rank(budget, units, target=target, iterations=1, per_parameter=True),
    }
    assert done.start_losses == pytest.approx({name: loss(other.counts) for name, other in others.items()})
    assert done.loss == loss(allocation.counts)
    assert done.loss < 0.95 * min(done.start_losses.values())


@pytest.mark.parametrize("seed", range(4))
def test_weights_repeat_their_start_point_and_change_the_estimator_no_more_than_that_needs(seed):
    budget = make_budget(channels=600)
    units, target = importances(budget, seed), int(0.7 * budget.num_parameters)
    ranked = allocate_by_rank(budget, units, target=target, iterations=1, per_parameter=True)
    weights = _weights_of(budget, units, ranked.counts)
    assert len(weights) == 12
    # 1 but for channels that were traded in the place of a group that did not fit.
    np.testing.assert_allclose([*weights.values()], 1.0, rtol=0.15)
    uniform = allocate_uniform(budget, np.zeros(6), units, target=target, iterations=1)
    for start in (ranked, uniform):
        again = _by_weighted_rank(budget, units, _weights_of(budget, units, start.counts), target)
        for before, after in zip(start.counts, again.counts, strict=True):
            assert before["kv_group"] == after["kv_group"]
            assert abs(before["channel"] - after["channel"]) <= 1


@pytest.mark.parametrize("evaluations", [1, 2, 7, 40])
def test_it_asks_no_more_often_than_it_may_and_never_twice(evaluations):
    budget, asked = make_budget(), []
    known = rising(budget)

    def loss(counts):
        asked.append(tuple(tuple(layer.items()) for layer in counts))
        return known(counts)

    allocation, done = search(
        budget, importances(budget), loss, target=int(0.7 * budget.num_parameters), evaluations=evaluations
    )
    assert len(asked) == len(set(asked)) == done.evaluations <= 3 + evaluations
    assert done.loss == known(allocation.counts) <= min(done.start_losses.values())


def test_where_nothing_is_better_it_returns_the_best_start_point():
    budget, asked = make_budget(), []
    units = importances(budget)
    target = int(0.7 * budget.num_parameters)
    uniform = allocate_uniform(budget, np.zeros(6), units, target=target, iterations=1)

    def loss(counts):
        asked.append(counts)
        return 1.0 if counts == uniform.counts else 2.0

    allocation, done = search(budget, units, loss, target=target)
    assert allocation.landed
    assert allocation.counts == uniform.counts
    assert done.loss == 1.0
    assert len(asked) > 30


def test_rounds_share_the_removals_and_units_never_come_back():
    budget = make_budget(protected={2})
    loss, rounds = rising(budget), 0
    target = int(0.6 * budget.num_parameters)
    sparsity, landed = np.zeros(6), False
    while not landed:
        rounds += 1
        allocation, done = search(
            budget, importances(budget), loss, target=target, iterations=8, sparsity=sparsity, evaluations=30
        )
        assert ("proportional" in done.start_losses) == (rounds > 1)
        for i, (before, after) in enumerate(zip(budget.current, allocation.counts, strict=True)):
            assert all(1 <= after[kind] <= before[kind] for kind in before)
            assert i != 2 or after == before
        parameters = budget.parameters(allocation.counts)
        removed = budget.num_parameters - parameters
        budget = make_budget(protected={2}, current=allocation.counts)
        assert budget.num_parameters == parameters
        sparsity, landed = allocation.sparsity, allocation.landed
        share = (make_budget(protected={2}).num_parameters - make_budget(protected={2}).floor) / 8
        assert landed or share <= removed < share + 10
    assert rounds > 2
    assert 0 <= target - parameters < 10


def test_the_order_is_of_the_seed_alone():
    budget = make_budget()
    target = int(0.7 * budget.num_parameters)

    def run(seed):
        asked = []
        known = rising(budget)
        allocation, _ = search(
            budget, importances(budget), lambda c: asked.append(c) or known(c), target=target, seed=seed
        )
        return asked, allocation.counts

    assert run((0, 1)) == run((0, 1))
    assert run((0, 1))[0] != run((0, 2))[0]


def test_losses_that_are_not_finite_are_never_chosen():
    budget = make_budget()
    units, known = importances(budget), rising(budget)
    target = int(0.7 * budget.num_parameters)
    calls = itertools.count()
    allocation, done = search(
        budget, units, lambda c: float("nan") if next(calls) % 3 == 0 else known(c), target=target
    )
    assert done.loss == known(allocation.counts) < float("inf")
    with pytest.raises(ValueError, match="is not finite, wherever they are removed from"):
        search(budget, units, lambda c: float("nan"), target=target)


# The whole run


def searching(settings, **changes):  # noqa: F811
    options = {"allocation": "search", "search_evaluations": 10, "target": 0.6, **changes}
    return settings("llama", **options)


def test_a_run_lands_and_its_records_are_true(settings, tiny_models, tmp_path):  # noqa: F811
    config = searching(settings, iterations=2, target=0.8)
    result = prune(config)
    dense = summarize(tiny_models["llama"]).parameters
    assert 0 <= int(0.8 * dense) - result.metrics["parameters_after"] < channel_cost(tiny_models["llama"])
    assert result.metrics["iterations"] == 1
    record = json.loads((result.run_directory / "iterations" / "001.json").read_text())["search"]
    assert record["start_losses"].keys() == {"global", "adaptive", "uniform"}
    assert record["loss"] <= min(record["start_losses"].values())
    assert 3 <= record["evaluations"] <= 13
    # The loss it found is that of the saved model on the calibration batch of the round.
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    tokens = tokenize(load_documents(config.calibration), tokenizer)
    batch = sample_sequences(tokens, 8, 16, seed=config.seed, iteration=1)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(result.model_directory)(batch, labels=batch).loss
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
def test_runs_repeat_and_resume_to_the_same_bytes(settings, tmp_path, monkeypatch, granularity):  # noqa: F811
    def config(name, **more):
        return searching(settings, output=str(tmp_path / name), granularity=granularity, **more)

    whole = prune(config("whole"))
    assert whole.metrics["iterations"] >= 3
    assert bytes_of(prune(config("again")).run_directory) == bytes_of(whole.run_directory)
    original = RunDirectory.save_iteration

    def failing(self, number, *args):
        if number == 3:
            raise KeyboardInterrupt
        original(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_iteration", failing)
        with pytest.raises(KeyboardInterrupt):
            prune(config("resumed"))
    resumed = prune(config("resumed", resume=True))
    assert bytes_of(resumed.run_directory) == bytes_of(whole.run_directory)


def test_the_number_of_evaluations_is_checked(settings):  # noqa: F811
    with pytest.raises(ValueError, match="search_evaluations is 0, expected at least 1"):
        searching(settings, search_evaluations=0)
