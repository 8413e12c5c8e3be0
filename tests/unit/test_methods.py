"""Methods end to end on tiny models: budgets, presets, what overrides them, resuming, one of one's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import METHODS, Estimator, Method, PruneConfig, apply_plan, cli, prune, summarize
from adapt_pruner.methods import find_method, parse_layers, resolve
from adapt_pruner.scoring import weights_alone

NAMES = [method.name for method in METHODS]
OF_UNITS = [method for method in METHODS if method.removes == "units"]  # the other: test_slicegpt_run.py
CHANNEL = 3 * 48  # parameters of a channel of the tiny models, without biases


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(family="qwen2", **changes):
        options = {
            "model": str(tiny_models[family]), "target": 0.7, "output": str(tmp_path / "run"),
            "calibration": str(calibration_file), "iterations": 8, "amplitude": 0.05, "num_sequences": 8,
            "sequence_length": 16, "micro_batch_size": 4, "device": "cpu", **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


def kept(plan):
    units = [{kind: keep.tolist() for kind, keep in layer.items()} for layer in plan.keep_indices]
    return [units[layer] for layer in plan.kept_layers]


def rounds(result):
    return len(list((result.run_directory / "iterations").glob("*.json")))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", OF_UNITS, ids=lambda m: m.name)
def test_every_method_prunes_to_the_budget_and_its_model_loads(
    settings, tiny_models, tmp_path, family, method
):
    result = prune(settings(family, method=method.name))
    target = int(0.7 * summarize(tiny_models[family]).parameters)
    below = target - result.metrics["parameters_after"]
    layer = summarize(tiny_models[family]).layers[0].parameters
    assert 0 <= below < {"reference": 40000, "shortgpt": layer}.get(method.name, CHANNEL + 2)
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert model.num_parameters() == result.metrics["parameters_after"]
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()
    compensated = method.compensation != "none"
    applied = apply_plan(result.plan, tiny_models[family], tmp_path / "applied", uncompensated=compensated)
    biases = method.compensation == "bias" and family == "qwen2"  # tiny Llama has them already
    added = 4 * 2 * 48 if biases else 0
    assert summarize(applied).parameters == result.metrics["parameters_after"] - added
    decided = result.plan.settings
    assert decided["method"] == method.name
    if method.name == "shortgpt":
        assert [decided[key] for key in ("estimator", "allocation", "gqa_credit")] == [None] * 3
        assert result.plan.removed_layers
    else:
        assert decided["estimator"] == method.estimator.name
        assert (decided["allocation"], decided["gqa_credit"]) == (method.allocation, method.gqa_credit)
        assert (len(result.plan.keep_indices[0]["channel"]) == 88) == (method.name == "llm-pruner")
    assert decided["iterations"] == (1 if method.one_shot else 8)
    assert rounds(result) == 1 if method.one_shot else rounds(result) > 1


def test_methods_decide_differently(settings, tmp_path):
    names = [method.name for method in OF_UNITS]
    plans = [kept(prune(settings(method=n, output=str(tmp_path / n))).plan) for n in names]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_what_is_given_overrides_the_method(settings, tmp_path):
    def run(name, **changes):
        return prune(settings(output=str(tmp_path / name), **changes)).plan

    wanda = run("a", method="wanda-sp", estimator="magnitude_l2")
    magnitude = run("b", method="magnitude")
    assert kept(wanda) == kept(magnitude)
    assert wanda.hash != magnitude.hash  # the name is part of what decided
    protected = run("c", method="llm-pruner", protected_layers="none")
    assert len(protected.keep_indices[0]["channel"]) < 88
    owner = run(
        "d", method="adapt-pruner", estimator="taylor_first", allocation="adaptive", gqa_credit="owner"
    )
    assert owner.hash == run("e").hash
    modulo = run("f", gqa_credit="modulo", attention_rate=1.0)
    assert kept(modulo) != kept(run("g", attention_rate=1.0))


@pytest.mark.parametrize("allocation", ["global", "threshold", "uniform"])
def test_other_allocations_also_go_in_rounds(settings, allocation):
    result = prune(settings(allocation=allocation))
    assert rounds(result) > 2
    assert result.metrics["parameters_below_target"] < CHANNEL + 2


def test_protected_layers_lose_nothing(settings, tmp_path):
    for method in ("adapt-pruner", "flap", "magnitude", "reference"):
        changes = {"target": 0.8} | ({"allocation": "global"} if method == "magnitude" else {})
        output = str(tmp_path / method)
        result = prune(settings(method=method, protected_layers="1,-1", output=output, **changes))
        sizes = [(len(k["kv_group"]), len(k["channel"])) for k in result.plan.keep_indices]
        assert sizes[1] == sizes[3] == (4, 88)
        assert max(sizes[0][1], sizes[2][1]) < 88
        assert result.plan.settings["protected_layers"] == "1,-1"


def test_protecting_too_much_is_refused_with_what_is_left(settings):
    with pytest.raises(ValueError, match=r"per layer leaves beside layers 0-2 \(protected\): exp"):
        prune(settings(protected_layers="0-2", target=0.5))


@pytest.mark.parametrize("allocation", ["adaptive", "uniform", "global", "threshold"])
@pytest.mark.parametrize(
    ("rate", "pruned", "whole"), [("mlp", "kv_group", "channel"), ("attention", "channel", "kv_group")]
)
def test_what_has_the_rate_zero_loses_nothing(settings, allocation, rate, pruned, whole):
    one_unit = (
        CHANNEL + 2 if pruned == "channel" else 48 * 60 + 2 * 60
    )  # 4 heads of 10 rows, 2 of which query
    changes = {"attention_rate" if rate == "attention" else "mlp_rate": 0.0}
    result = prune(settings(target=0.85, allocation=allocation, **changes))
    initial = result.plan.initial_units[0]
    assert all(len(layer[whole]) == initial[whole] for layer in result.plan.keep_indices)
    assert any(len(layer[pruned]) < initial[pruned] for layer in result.plan.keep_indices)
    assert 0 <= result.metrics["parameters_below_target"] < one_unit


@pytest.mark.parametrize("allocation", ["adaptive", "global", "reference"])
def test_channels_go_in_steps(settings, allocation):
    result = prune(settings(round_to=16, allocation=allocation))  # 88 channels are no multiple
    widths = {len(layer["channel"]) for layer in result.plan.keep_indices}
    assert widths <= {88, 80, 64, 48, 32, 16}
    assert len(widths) > 1
    assert result.metrics["parameters_below_target"] >= 0
    if allocation != "reference":
        assert result.metrics["parameters_below_target"] < 16 * CHANNEL


def test_one_threshold_is_for_single_units(settings, tmp_path):
    """Query heads go in bundles of one per KV head; a bundle counts as a unit of their mean importance."""
    changes = {"method": "flap", "granularity": "query_head", "compensation": "none", "target": 0.6}
    result = prune(settings("llama", **changes))
    heads = [len(layer["query_head"]) for layer in result.plan.keep_indices]
    assert min(heads) < result.plan.initial_units[0]["query_head"]


def test_what_stays_is_part_of_the_message(settings):
    with pytest.raises(ValueError, match=r"leaves beside all of channel \(mlp_rate 0\): expected 7"):
        prune(settings(mlp_rate=0, target=0.5))


@pytest.mark.parametrize("method", OF_UNITS, ids=lambda m: m.name)
def test_an_interrupted_run_of_every_method_resumes_with_the_same_bytes(settings, tmp_path, method):
    def bytes_of(result):
        weights = result.model_directory / "model.safetensors"
        return weights.read_bytes(), (result.run_directory / "plan.json").read_bytes()

    class Interrupted(Exception):
        pass

    def interrupt(report):
        raise Interrupted

    whole = prune(settings(method=method.name))
    config = settings(method=method.name, output=str(tmp_path / "again"))
    with pytest.raises(Interrupted):
        prune(config, on_iteration=interrupt)
    if not method.one_shot:
        with pytest.raises(ValueError, match="estimator is 'random', the run was started with"):
            prune(dataclasses.replace(config, estimator="random", resume=True))
    resumed = prune(dataclasses.replace(config, resume=True))
    assert bytes_of(resumed) == bytes_of(whole)


def test_random_units_differ_from_round_to_round_and_resume(settings, tmp_path):
    changes = {"estimator": "random", "allocation": "uniform", "target": 0.6}
    whole = prune(settings(**changes))
    config, seen = settings(**changes, output=str(tmp_path / "again")), []

    def interrupt(report):
        seen.append(report)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(config, on_iteration=interrupt)
    resumed = prune(dataclasses.replace(config, resume=True))
    assert resumed.plan.hash == whole.plan.hash
    other = prune(settings(**changes, seed=1, output=str(tmp_path / "other")))
    assert kept(other.plan) != kept(whole.plan)


def test_a_one_shot_method_says_that_it_ignores_iterations(settings, caplog, tmp_path):
    caplog.set_level("INFO", logger="adapt_pruner")
    many = prune(settings(method="magnitude", iterations=30)).plan
    assert "magnitude prunes in one shot: iterations 30 is ignored" in caplog.text
    caplog.clear()
    one = prune(settings(method="magnitude", iterations=1, output=str(tmp_path / "one"))).plan
    prune(settings(output=str(tmp_path / "rounds")))
    assert "ignored" not in caplog.text
    assert one.hash == many.hash


def test_unknown_names_are_refused_with_the_list(settings):
    with pytest.raises(
        ValueError, match=r"method is 'prune', expected one of \['adapt-pruner', .*'reference'\]"
    ):
        prune(settings(method="prune"))
    with pytest.raises(ValueError, match="estimator is 'taylor', expected one of"):
        prune(settings(estimator="taylor"))
    with pytest.raises(ValueError, match="allocation is 'fair', expected one of"):
        settings(allocation="fair")


def test_gradients_that_cannot_be_fused_are_refused_before_the_run_starts(settings, tmp_path):
    with pytest.raises(ValueError, match="the estimator fluctuation cannot be scored so"):
        prune(settings(method="flap", gradients="fused", micro_batch_size=8))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("none", []),
        ("0", [0]),
        ("0-3,30", [0, 1, 2, 3, 30]),
        ("-1", [31]),
        (" 2 , -2", [2, 30]),
        ("5-5,5", [5]),
    ],
)
def test_layers_are_numbers_and_ranges(text, layers):
    assert sorted(parse_layers(text, 32)) == layers


@pytest.mark.parametrize("text", ["", "all", "3-1", "32", "-33", "0-32", "1,,2", "1.5"])
def test_what_are_no_layers_is_refused(text):
    with pytest.raises(ValueError, match=f"protected_layers is {text!r}, expected none, or layers of 0-31"):
        parse_layers(text, 32)


@pytest.mark.parametrize(("layers", "protected"), [(32, "0-3,30-31"), (30, "0-3,28-29"), (4, "0-0,3-3")])
def test_llm_pruner_keeps_the_ends(layers, protected):
    config = PruneConfig("m", 0.8, "o", method="llm-pruner")
    assert resolve(config, layers)[0].protected_layers == protected
    assert resolve(PruneConfig("m", 0.8, "o"), layers)[0].protected_layers == "none"


def test_the_example_of_a_method_of_ones_own_runs(settings, tmp_path, capsys):
    docs = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    example = docs.partition("```python\n")[2].partition("```")[0]
    assert len(example.splitlines()) < 60
    given = 'PruneConfig("smollm2-135m", 0.8, "runs/peak", num_sequences=16)'
    assert given in example
    names = {"tiny": settings(output=str(tmp_path / "peak"))}
    exec(example.replace(given, "tiny"), names)
    plan = json.loads((tmp_path / "peak" / "plan.json").read_text())
    assert (plan["settings"]["method"], plan["settings"]["estimator"]) == ("peak", "largest_weight")
    printed = int(capsys.readouterr().out)
    assert printed == summarize(tmp_path / "peak" / "model").parameters
    # Its scores decide: the channel with the largest weight of the layer stays, its smallest goes.
    model = AutoModelForCausalLM.from_pretrained(names["tiny"].model)
    for layer, keep in zip(model.model.layers, plan["layers"], strict=True):
        mlp = layer.mlp
        rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1).abs().amax(1)
        runs = keep["channel"]["keep_runs"]
        stay = np.concatenate([np.arange(first, first + n) for first, n in runs])
        gone = np.setdiff1d(np.arange(88), stay)
        assert rows[stay].min() >= rows[gone].max()


def test_a_method_of_ones_own_can_be_resumed(settings):
    """Under its own name; the built-in ones are not asked."""
    flat = Estimator(
        "flat", weights_alone(lambda s: [torch.ones(4 if len(m) > 5 else 88) for m in s.sets]), "1", "-"
    )
    mine = Method("mine", "keeps the last", "-", estimator=flat, allocation="uniform")

    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(settings(), method=mine, on_iteration=interrupt)
    with pytest.raises(ValueError, match="method is 'adapt-pruner', the run was started with 'mine'"):
        prune(settings(resume=True))
    with pytest.raises(ValueError, match="method is 'mine', expected one of"):
        find_method("mine")


def test_granularity_and_compensation_of_a_method_are_what_is_done(settings, tmp_path):
    mine = dataclasses.replace(
        find_method("adapt-pruner"), name="mine", granularity="query_head", compensation="least_squares"
    )
    result = prune(settings(target=0.8), method=mine)
    assert set(result.plan.keep_indices[0]) == {"query_head", "channel"}
    decided = result.plan.settings
    assert (decided["granularity"], decided["compensation"]) == ("query_head", "least_squares")
    by_options = prune(
        settings(
            target=0.8, granularity="query_head", compensation="least_squares", output=str(tmp_path / "b")
        )
    )
    assert kept(by_options.plan) == kept(result.plan)
    given = settings(target=0.8, granularity="kv_group", compensation="none", output=str(tmp_path / "c"))
    assert kept(prune(given, method=mine).plan) == kept(
        prune(settings(target=0.8, output=str(tmp_path / "d"))).plan
    )


def test_the_command_line_lists_methods_and_estimators(capsys):
    assert cli.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in listed["methods"]] == NAMES
    assert all(m["summary"] and m["source"] for m in listed["methods"] + listed["estimators"])
    estimators = {m["estimator"] for m in listed["methods"] if m["removes"] == "units"} - {None}
    assert estimators <= {e["name"] for e in listed["estimators"]}
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert "taylor_vectorize" in shown


def test_the_command_line_takes_a_method(settings, tiny_models, calibration_file, tmp_path, capsys):
    arguments = ["prune", tiny_models["qwen2"], "--target", "0.8", "--output", tmp_path / "cli", "--json"]
    arguments += ["--method", "wanda-sp", "--allocation", "global", "--calibration", calibration_file]
    arguments += ["--num-sequences", "4", "--sequence-length", "16"]
    assert cli.main([str(a) for a in arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["iterations"] == 1
    plan = json.loads((tmp_path / "cli" / "plan.json").read_text())
    assert (plan["settings"]["estimator"], plan["settings"]["allocation"]) == ("wanda", "global")
