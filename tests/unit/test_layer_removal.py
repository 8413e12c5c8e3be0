"""Whole decoder layers: which go, budgets, saved models, plans replayed, against plain float64."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_pruner import bytes_of, settings  # noqa: F401
from tiny import FAMILIES, make_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from adapt_pruner import EvaluateConfig, PruneConfig, PruningPlan, apply_plan, evaluate, prune, summarize
from adapt_pruner.config import InspectConfig
from adapt_pruner.data import load_documents, sample_sequences, tokenize
from adapt_pruner.families import find_family
from adapt_pruner.inspection import inspect_model
from adapt_pruner.layer_removal import removable_parameters, select_layers
from adapt_pruner.methods import Method, resolve
from adapt_pruner.modeling.conversion import keep_config_layers
from adapt_pruner.report.console import show_inspected
from adapt_pruner.surgery import keep_layers

IDS = torch.arange(3, 20)[None]


def by_layers(settings, family="qwen2", **changes):  # noqa: F811
    return settings(family, **{"method": "shortgpt", "num_sequences": 4, "target": 0.6, **changes})


def block_influence(model, batch):
    """1 - mean cosine similarity of every layer's input and output, in float64."""
    with torch.no_grad():
        hidden = model.double()(batch, output_hidden_states=True).hidden_states
        # The last of these is behind the final norm: take what the last layer gives instead.
        seen = []
        hook = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
        model(batch)
        hook.remove()
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    stream = [*hidden[:-1], last]
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in pairwise(stream)]
    return np.array([1 - c.mean().item() for c in cosines])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_layers_of_least_block_influence_go(settings, tmp_path, tokenizer, family):  # noqa: F811
    model = make_model(family, seed=5, num_hidden_layers=6, layer_types=None)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = by_layers(settings, family, model=str(tmp_path / "base"))
    result = prune(config)
    tokens = tokenize(load_documents(config.calibration), tokenizer)
    influence = block_influence(model, sample_sequences(tokens, 4, 16, seed=0, iteration=1))
    gone = result.plan.removed_layers
    assert 1 < len(gone) < 5
    assert sorted(np.argsort(influence)[: len(gone)]) == list(gone)
    record = json.loads((result.run_directory / "iterations" / "001.json").read_text())
    np.testing.assert_allclose(record["layer_importance"], influence - 1, rtol=1e-4)
    assert result.metrics["iterations"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_prunes_saves_loads_generates_evaluates_and_applies(
    settings,  # noqa: F811
    tiny_models,
    tmp_path,
    calibration_file,
    family,
):
    result = prune(by_layers(settings, family))
    dense, summary = summarize(tiny_models[family]), summarize(result.model_directory)
    assert 0 <= int(0.6 * dense.parameters) - summary.parameters < dense.layers[0].parameters
    kept = result.plan.kept_layers
    assert 0 < len(kept) < 4
    assert summary.parameters == result.metrics["parameters_after"]
    config = json.loads((result.model_directory / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == (family, len(kept))
    stock = AutoConfig.from_pretrained(tiny_models[family])
    if hasattr(stock, "layer_types"):
        assert config["layer_types"] == [stock.layer_types[i] for i in kept]
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    original = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    for ours, theirs in zip(model.model.layers, [original.model.layers[i] for i in kept], strict=True):
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        assert getattr(ours.self_attn, "sliding_window", 0) == getattr(theirs.self_attn, "sliding_window", 0)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)
    options = {"data": str(calibration_file), "context": 32, "max_tokens": 200}
    perplexity = evaluate(EvaluateConfig(str(result.model_directory), **options)).perplexity
    assert perplexity is not None
    assert 1 < perplexity.perplexity < 1e6
    applied = apply_plan(PruningPlan.load(result.run_directory), tiny_models[family], tmp_path / "applied")
    ours, theirs = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (result.model_directory, applied))
    assert theirs.pop("checksums.json")
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_without_layers_computes_what_the_rest_computes(family, tmp_path):
    """Layers that do nothing can go: in the live model and in the saved one the logits stay the same bits."""
    model = make_model(family)
    for layer in (0, 2):
        for name, parameter in model.model.layers[layer].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                parameter.data.zero_()
    with torch.no_grad():
        expected = model(IDS).logits
        keep_layers(model, find_family(family), [1, 3])
        assert torch.equal(model(IDS).logits, expected)
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_layers_of_different_widths(settings, tmp_path, family):  # noqa: F811
    """A model pruned by units, with biases of its own, loses layers and keeps the widths of the rest."""
    first = prune(settings(family, target=0.8, iterations=3, num_sequences=4, compensation="bias"))
    changes = {"model": str(first.model_directory), "target": 0.7, "output": str(tmp_path / "second")}
    second = prune(by_layers(settings, family, **changes))
    before, after = summarize(first.model_directory), summarize(second.model_directory)
    kept = second.plan.kept_layers
    assert [layer.widths for layer in after.layers] == [before.layers[i].widths for i in kept]
    below = int(0.7 * before.parameters) - after.parameters
    assert 0 <= below < max(before.layers[i].parameters for i in second.plan.removed_layers)
    model = AutoModelForCausalLM.from_pretrained(second.model_directory)
    assert model.num_parameters() == after.parameters
    cached, uncached = (
        model.generate(IDS, use_cache=c, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for c in (True, False)
    )
    assert torch.equal(cached, uncached)
    applied = apply_plan(second.plan, first.model_directory, tmp_path / "applied")
    ours, theirs = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (second.model_directory, applied))
    assert theirs.pop("checksums.json")
    assert ours == theirs


def test_rounds_score_again_and_resume_to_the_same_bytes(settings, tmp_path):  # noqa: F811
    def config(name, **more):
        changes = {"method": "adapt-pruner", "granularity": "layer", "target": 0.4, "iterations": 20}
        return by_layers(settings, "gemma2", output=str(tmp_path / name), **changes, **more)

    whole = prune(config("whole"))
    records = [
        json.loads((whole.run_directory / "iterations" / f"{i:03}.json").read_text())
        for i in range(1, whole.metrics["iterations"] + 1)
    ]
    assert len(records) == len(whole.plan.removed_layers) > 1  # one at a time
    gone: set[int] = set()
    for record in records:
        scored = {i: v for i, v in enumerate(record["layer_importance"]) if v is not None}
        assert set(scored) == set(range(4)) - gone
        (removed,) = record["removed_layers"]
        assert removed == min(scored, key=scored.get)
        gone.add(removed)
    assert gone == set(whole.plan.removed_layers)
    second = [v for v in records[1]["layer_importance"] if v is not None]
    first = [v for i, v in enumerate(records[0]["layer_importance"]) if i != records[0]["removed_layers"][0]]
    assert first != second

    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(config("broken"), on_iteration=interrupt)
    resumed = prune(config("broken", resume=True))
    assert bytes_of(resumed.run_directory) == bytes_of(whole.run_directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(settings, tiny_models, family, tmp_path):  # noqa: F811
    full = prune(by_layers(settings, family, target=1.0))
    assert full.plan.removes_nothing()
    applied = apply_plan(full.plan, tiny_models[family], tmp_path / "applied")
    original = load_file(tiny_models[family] / "model.safetensors")
    for directory in (full.model_directory, applied):
        kept = load_file(directory / "model.safetensors")
        assert original.keys() == kept.keys()
        assert all(torch.equal(kept[name], original[name]) for name in original)


def test_protected_layers_stay_and_the_smallest_target_is_one_layer(settings, tmp_path):  # noqa: F811
    result = prune(by_layers(settings, protected_layers="0,-1"))
    assert result.plan.removed_layers == (1, 2)
    with pytest.raises(ValueError, match="below what one layer leaves") as error:
        prune(by_layers(settings, target="2", output=str(tmp_path / "none")))
    floor = str(error.value).rpartition("expected ")[2].partition(" to")[0].replace(",", "")
    smallest = prune(by_layers(settings, target=floor, output=str(tmp_path / "floor")))
    assert smallest.metrics["parameters_after"] == int(floor)
    assert len(smallest.plan.kept_layers) == 1
    with pytest.raises(ValueError, match="below what one layer leaves"):
        prune(by_layers(settings, target=floor, protected_layers="0-1", output=str(tmp_path / "none")))


def test_inspect_shows_the_layers_that_are_gone(settings):  # noqa: F811
    result = prune(by_layers(settings))
    after, before = inspect_model(InspectConfig(str(result.run_directory)))
    assert before is not None
    assert (len(before.layers), after.removed_layers) == (4, result.plan.removed_layers)
    console = Console(record=True, width=120)
    show_inspected(console, after, before, {})
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    assert ["removed" in row for row in rows[:4]] == [i in after.removed_layers for i in range(4)]
    assert "88 → 88" in rows[result.plan.kept_layers[0]]
    alone, nothing = inspect_model(InspectConfig(str(result.model_directory)))
    assert nothing is None
    assert alone == dataclasses.replace(after, removed_layers=())


def test_selection_by_hand():
    importance, sizes = np.array([0.5, 0.1, 0.3, 0.1]), [10, 20, 5, 40]
    assert select_layers(importance, sizes, (), 0) == []
    assert select_layers(importance, sizes, (), 20) == [1]
    assert select_layers(importance, sizes, (), 21) == [1, 3]
    assert select_layers(importance, sizes, (), 61) == [1, 2, 3]
    assert select_layers(importance, sizes, (1, 3), 6) == [0, 2]
    assert removable_parameters(sizes, ()) == 35
    assert removable_parameters(sizes, (3,)) == 35
    assert removable_parameters(sizes, (0, 1, 2, 3)) == 0


def test_configs_keep_what_belongs_to_a_layer():
    config = Gemma3TextConfig(num_hidden_layers=8, sliding_window_pattern=4)
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    assert config.layer_types == 2 * kinds
    keep_config_layers(config, range(8))
    assert config.to_dict()["sliding_window_pattern"] == 4  # nothing is gone
    keep_config_layers(config, [0, 3, 4, 7])
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert "sliding_window_pattern" not in config.to_dict()
    keep_config_layers(config, [0, 2])
    assert Gemma3TextConfig(**config.to_dict()).layer_types == ["sliding_attention"] * 2
    qwen = AutoConfig.for_model(
        "qwen2", num_hidden_layers=6, max_window_layers=3, use_sliding_window=True, sliding_window=8
    )
    keep_config_layers(qwen, [0, 2, 4, 5])
    assert qwen.max_window_layers == 2
    assert qwen.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    experts = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=4
    )  # layers 1 and 5 have experts
    keep_config_layers(experts, [0, 1, 3, 5])
    assert (experts.mlp_only_layers, experts.decoder_sparse_step) == ([0, 2], 1)


def test_one_kind_of_attention_may_be_left(tmp_path):
    """Gemma 3 has rotary frequencies for each kind of layer."""
    from adapt_pruner.families import layer_widths
    from adapt_pruner.modeling.conversion import convert_pruned_model

    for kept in ([0, 2], [1]):
        model = make_model("gemma3_text")
        keep_layers(model, find_family("gemma3_text"), kept)
        expected = model(IDS).logits
        widths = layer_widths(model.config.to_dict())
        directory = tmp_path / str(len(kept))
        convert_pruned_model(model, widths).save_pretrained(directory)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(directory)(IDS).logits, expected)


def test_settings_about_units_are_refused(tmp_path):
    config = PruneConfig("m", 0.5, str(tmp_path), method="shortgpt")
    resolved, estimator = resolve(config, 4)
    assert estimator is None
    assert (resolved.estimator, resolved.allocation, resolved.compensation) == (None, None, "none")
    assert (resolved.granularity, resolved.iterations) == ("layer", 1)
    for change in (
        {"estimator": "wanda"}, {"allocation": "global"}, {"gqa_credit": "modulo"}, {"gradients": "fused"},
        {"compensation": "bias"}, {"round_to": 8}, {"mlp_granularity": "expert"}, {"carry_over": 1.0},
    ):  # fmt: skip
        ((name, value),) = change.items()
        wrong = dataclasses.replace(config, micro_batch_size=512, **change)
        with pytest.raises(ValueError, match=f"which removes no units: expected no .*'{name}': {value!r}"):
            resolve(wrong, 4)
    assert resolve(resolved, 4)[0] == resolved  # what config.yaml has is accepted again
    by_flap = dataclasses.replace(config, method="flap", granularity="layer")
    assert resolve(by_flap, 4)[0].compensation == "none"
    with pytest.raises(ValueError, match="shortgpt removes whole layers: expected granularity layer, or"):
        resolve(dataclasses.replace(config, granularity="kv_group"), 4)
    units = dataclasses.replace(config, granularity="kv_group", estimator="wanda")
    found = resolve(units, 4)[1]
    assert found is not None
    assert found.name == "wanda"
    assert Method("mine", "-", "-", granularity="layer").to_dict()["granularity"] == "layer"
