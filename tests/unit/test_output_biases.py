"""Bias compensation against plain float64: means of what was removed go into biases, saved and budgeted."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_modeling import run_python
from test_pruner import bytes_of, channel_cost, settings  # noqa: F401
from tiny import FAMILIES, make_model
from transformers import AutoModelForCausalLM

from adapt_pruner import EvaluateConfig, apply_plan, evaluate, prune, summarize
from adapt_pruner.compensation import add_output_biases, compensated_biases, replace_weights
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.kernels import ActivationStats, NonFiniteError
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring.gram import InputMeans
from adapt_pruner.surgery import prune_layer

ADDED = 4 * 2 * 48  # o_proj and down_proj of four layers
KEEP = {"kv_group": np.array([0, 3]), "query_head": np.array([1, 2, 4, 7]), "channel": np.arange(5, 60, 2)}
SMALL = {"iterations": 3, "num_sequences": 4}


def outputs(model, names, batch):
    """What each of the linear modules receives and returns for the batch, [rows, ...] in float64."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0], output)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: tuple(t.flatten(0, 1).double() for t in pair) for name, pair in seen.items()}


@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_and_bias_give_the_mean_output_of_all(family, granularity):
    model = make_model(family, num_key_value_heads=2 if granularity == "query_head" else 4)
    described = find_family(family).with_granularity(granularity)
    widths = layer_widths(model.config.to_dict())
    add_output_biases(model, described, widths)
    modules = [f"model.layers.{i}.{m}" for i in range(4) for m in ("self_attn.o_proj", "mlp.down_proj")]
    batch = torch.randint(4, 260, (6, 16), generator=torch.Generator().manual_seed(1))
    dense = outputs(model, modules, batch)
    with torch.no_grad(), InputMeans(model, described, widths) as means:
        for part in batch.split(4):
            model(part)
    weights = {name: model.get_submodule(name).weight.detach().double() for name in modules}
    for i in range(4):
        biases = compensated_biases(model, described, i, widths[i], KEEP, means)
        prune_layer(model, described, i, widths[i], KEEP)
        replace_weights(model, biases)
    for name in modules:
        x, before = dense[name]
        module = model.get_submodule(name)
        if "down_proj" in name:
            columns = KEEP["channel"]
        else:
            rows = widths[0].span("group" if granularity == "kv_group" else "head")
            columns = (KEEP[granularity][:, None] * rows + np.arange(rows)).ravel()
        assert torch.equal(module.weight.double(), weights[name][:, columns])
        after = x[:, columns] @ module.weight.detach().double().T + module.bias.detach().double()
        torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-5, atol=1e-5)
        without = x[:, columns] @ module.weight.detach().double().T
        assert (without.mean(0) - before.mean(0)).abs().max() > 1e-3


def test_biases_of_several_rounds_add_up(settings, monkeypatch):  # noqa: F811
    """The bias is the sum over the rounds of W[:, removed] times the mean input, all in float64."""
    expected, removed = {}, InMemoryEngine.remove_units

    def watch(engine, keep, *, means=None, **more):
        for layer, kept in enumerate(keep):
            name = f"model.layers.{layer}.mlp.down_proj"
            weight = engine.model.get_submodule(name).weight.detach().double()
            gone = np.setdiff1d(np.arange(weight.shape[1]), kept["channel"])
            shift = weight[:, gone] @ means[f"{name}.weight"].mean[gone]
            expected[name] = expected.get(name, 0.0) + shift
        removed(engine, keep, means=means, **more)

    monkeypatch.setattr(InMemoryEngine, "remove_units", watch)
    result = prune(settings(compensation="bias"))
    assert result.metrics["iterations"] > 2
    saved = load_file(result.model_directory / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(saved[f"{name}.bias"].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "granularity"), [*((f, "kv_group") for f in FAMILIES), ("gemma3_text", "query_head")]
)
def test_every_family_lands_with_its_biases_and_loads_generates_evaluates(
    settings,  # noqa: F811
    tiny_models,
    calibration_file,
    family,
    granularity,
):
    result = prune(settings(family, target=0.8, compensation="bias", granularity=granularity, **SMALL))
    dense, summary = summarize(tiny_models[family]), summarize(result.model_directory)
    assert 0 <= int(0.8 * dense.parameters) - summary.parameters < channel_cost(tiny_models[family])
    assert summary.parameters == result.metrics["parameters_after"]
    config = json.loads((result.model_directory / "config.json").read_text())
    saved = load_file(result.model_directory / "model.safetensors")
    biases = [n for n in saved if n.endswith(("o_proj.bias", "down_proj.bias"))]
    assert len(biases) == 8
    assert summary.layers[0].parameters == sum(
        t.numel() for n, t in saved.items() if n.startswith("model.layers.0.")
    )
    assert any(saved[name].count_nonzero() for name in biases)
    # Tiny Llama has both biases already; the others' config cannot say so.
    expected = None if family == "llama" else ["mlp.down_proj", "self_attn.o_proj"]
    assert config.get("output_biases") == expected
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert model.num_parameters() == summary.parameters
    ids = torch.arange(3, 20)[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)
    options = {"data": str(calibration_file), "context": 32, "max_tokens": 200}
    perplexity = evaluate(EvaluateConfig(str(result.model_directory), **options)).perplexity
    assert perplexity is not None
    assert 1 < perplexity.perplexity < 1e6
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name])


def test_biases_load_with_remote_code(settings):  # noqa: F811
    result = prune(settings("mistral", compensation="bias", **SMALL))
    ids = torch.arange(3, 20)[None]
    logits = AutoModelForCausalLM.from_pretrained(result.model_directory)(ids).logits
    torch.save({"ids": ids, "logits": logits}, result.run_directory / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
expected = torch.load("expected.pt", weights_only=True)
model = AutoModelForCausalLM.from_pretrained({str(result.model_directory)!r}, trust_remote_code=True)
assert "adapt_pruner" not in sys.modules
assert model.model.layers[0].mlp.down_proj.bias.count_nonzero()
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
"""
    done = run_python(code, result.run_directory)
    assert done.returncode == 0, done.stderr


def test_layers_of_equal_widths_keep_their_biases(settings, tmp_path):  # noqa: F811
    """All layers at one group and one channel are uniform, which alone would be saved as stock."""
    with pytest.raises(ValueError, match="below what one unit per layer leaves") as error:
        prune(settings(target="2", compensation="bias"))
    floor = int(str(error.value).rpartition("expected ")[2].partition(" to")[0].replace(",", ""))
    config = settings(target=str(floor), compensation="bias", iterations=1)
    smallest = prune(config)
    assert smallest.metrics["parameters_after"] == floor
    without = settings(target=str(floor - ADDED), iterations=1, output=str(tmp_path / "without"))
    assert prune(without).metrics["parameters_after"] == floor - ADDED
    assert summarize(smallest.model_directory).model_type == "adapt_qwen2"
    model = AutoModelForCausalLM.from_pretrained(smallest.model_directory)
    assert model.model.layers[0].mlp.down_proj.bias.count_nonzero()


def test_a_model_with_added_biases_can_be_pruned_on(settings, tmp_path):  # noqa: F811
    first = prune(settings(compensation="bias", target=0.8, **SMALL))
    again = {"model": str(first.model_directory), "target": 0.8, **SMALL}
    for compensation in ("bias", "none"):
        result = prune(settings(compensation=compensation, output=str(tmp_path / compensation), **again))
        assert result.metrics["parameters_before"] == first.metrics["parameters_after"]
        assert result.metrics["parameters_after"] <= 0.8 * first.metrics["parameters_after"]
        model = AutoModelForCausalLM.from_pretrained(result.model_directory)
        assert model.num_parameters() == result.metrics["parameters_after"]
    before, after = (load_file(r.model_directory / "model.safetensors") for r in (first, result))
    name = "model.layers.2.mlp.down_proj.bias"
    assert torch.equal(before[name], after[name])  # without compensation they stay as they are


@pytest.mark.parametrize("targets", [{"target": 1.0}, {"target": None, "target_kv_cache": 1.0}])
def test_nothing_to_remove_needs_no_biases(settings, tiny_models, targets):  # noqa: F811
    result = prune(settings("mistral", compensation="bias", **targets))
    original = load_file(tiny_models["mistral"] / "model.safetensors")
    kept = load_file(result.model_directory / "model.safetensors")
    assert original.keys() == kept.keys()
    assert all(torch.equal(kept[name], original[name]) for name in original)


def test_an_interrupted_run_resumes_to_the_same_bytes(settings, tmp_path, monkeypatch):  # noqa: F811
    def config(name, **more):
        changes = {"target": 0.6, "compensation": "bias", "dtype": "bf16", "num_sequences": 4}
        return settings("phi3", output=str(tmp_path / name), **changes, **more)

    whole = prune(config("whole"))
    assert whole.metrics["iterations"] >= 3
    saved, calls = RunDirectory.save_iteration, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return saved(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_iteration", failing)
        with pytest.raises(KeyboardInterrupt):
            prune(config("broken"))
    tensors = load_file(tmp_path / "broken" / "state" / "tensors-002.safetensors")
    scores = {name for name in tensors if name.startswith("scores.")}  # what later rounds average with
    assert sum(t.numel() for name, t in tensors.items() if name not in scores) == ADDED  # the biases alone
    resumed = prune(config("broken", resume=True))
    assert bytes_of(resumed.run_directory) == bytes_of(whole.run_directory)


@pytest.mark.parametrize("other", [{"target_flops": 0.8}, {"target_kv_cache": 0.5}])
def test_all_parameters_beside_another_target(settings, tiny_models, other):  # noqa: F811
    result = prune(settings("mistral", target=1.0, compensation="bias", **other))
    assert result.metrics["parameters_after"] <= summarize(tiny_models["mistral"]).parameters
    (used,) = result.metrics["resources"].values()
    assert used["after"] <= used["target"]


def test_biases_that_are_there_already_survive_a_resume(settings, tmp_path):  # noqa: F811
    """Tiny Llama has them, and parameters are not what is limited."""

    class Interrupted(Exception):
        pass

    def interrupt(report):
        if report.iteration == 2:
            raise Interrupted

    changes = {"target": None, "target_kv_cache": 0.25, "compensation": "bias", "amplitude": 0.0}
    whole = prune(settings("llama", output=str(tmp_path / "whole"), **changes))
    changes["output"] = str(tmp_path / "broken")
    with pytest.raises(Interrupted):
        prune(settings("llama", **changes), on_iteration=interrupt)
    resumed = prune(settings("llama", resume=True, **changes))
    assert whole.metrics["iterations"] > 2
    assert bytes_of(resumed.run_directory) == bytes_of(whole.run_directory)


def test_a_plan_with_biases_is_not_replayed_silently(settings, tiny_models, tmp_path):  # noqa: F811
    result = prune(settings(method="flap"))
    assert result.plan.settings["compensation"] == "bias"
    with pytest.raises(ValueError, match=r"compensation 'bias', .* not the compensated weights"):
        apply_plan(result.plan, tiny_models["qwen2"], tmp_path / "applied")
    applied = apply_plan(result.plan, tiny_models["qwen2"], tmp_path / "applied", uncompensated=True)
    ours, theirs = (load_file(d / "model.safetensors") for d in (result.model_directory, applied))
    assert {n for n in ours if n not in theirs} == {
        f"model.layers.{i}.{m}.bias" for i in range(4) for m in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert "output_biases" not in json.loads((applied / "config.json").read_text())
    without = prune(settings(method="flap", compensation="none", output=str(tmp_path / "none")))
    assert without.metrics["parameters_after"] > summarize(applied).parameters


def test_means_and_biases_that_are_not_finite_are_named():
    model = make_model("mistral", dtype=torch.float16)
    family, widths = find_family("mistral"), layer_widths(model.config.to_dict())
    add_output_biases(model, family, widths)
    name = "model.layers.0.mlp.down_proj"
    keep = {"kv_group": np.arange(4), "channel": np.arange(44)}
    stats = ActivationStats.zeros(88)
    stats.update(torch.full((3, 88), 60000.0))
    means = {f"{name}.weight": stats}
    with torch.no_grad():
        model.get_submodule(name).weight.fill_(1.0)
    with pytest.raises(ValueError, match=rf"the compensated {name}.bias is not finite in torch.float16"):
        compensated_biases(model, family, 0, widths[0], keep, means)
    stats.update(torch.full((3, 88), torch.nan))
    with pytest.raises(NonFiniteError, match=f"the input of {name}.weight"):
        compensated_biases(model, family, 0, widths[0], keep, means)


def test_the_budget_refuses_a_target_that_has_no_room_for_biases(settings, tmp_path):  # noqa: F811
    config = settings("mistral", target=0.7, protected_layers="0-2")
    with pytest.raises(ValueError, match="below what one unit per layer leaves") as error:
        prune(config)
    floor = int(str(error.value).rpartition("expected ")[2].partition(" to")[0].replace(",", ""))
    with pytest.raises(ValueError, match=f"expected {floor + ADDED:,} to"):
        prune(dataclasses.replace(config, compensation="bias"))
