"""Attention pruned by query heads: as many from every KV group of a layer, keys and values untouched."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, VOCABULARY, make_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from adapt_pruner import PruneConfig, apply_plan, prune, summarize
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.families import LayerWidths, find_family, layer_widths, removal_counts, unit_costs
from adapt_pruner.modeling.conversion import convert_pruned_model
from adapt_pruner.scoring import score
from adapt_pruner.surgery import prune_layer

HEADS, KV, HEAD_DIM = 16, 4, 10
IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
# Which of 16 query heads, four to a KV group, stay in each layer.
KEEP = [[0, 3, 5, 6, 8, 9, 14, 15], list(range(16)), [3, 4, 9, 14], [1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 15]]


def model_of(family, **changes):
    return make_model(family, num_attention_heads=HEADS, **changes)


def by_query_heads(model):
    return find_family(model.config.model_type).with_granularity("query_head")


def cut(model, keep=KEEP):
    """Prunes in place; the widths afterwards."""
    return [
        prune_layer(
            model, by_query_heads(model), i, widths, {"query_head": np.array(heads), "channel": np.arange(88)}
        )
        for i, (heads, widths) in enumerate(zip(keep, layer_widths(model.config.to_dict()), strict=True))
    ]


@pytest.fixture
def settings(tokenizer, calibration_file, tmp_path):
    def make(family, tiny=None, **changes):
        directory = tmp_path / f"tiny-{family}"
        if not directory.exists():
            (tiny or model_of(family)).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        options = {
            "model": str(directory), "target": 0.7, "output": str(tmp_path / "run"), "device": "cpu",
            "calibration": str(calibration_file), "granularity": "query_head", "attention_rate": 1.0,
            "iterations": 10, "amplitude": 0.05, "num_sequences": 8, "sequence_length": 16,
            "micro_batch_size": 8, **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_equals_zeroing_and_survives_saving(family, tmp_path):
    zeroed = model_of(family)
    for layer, heads in zip(zeroed.model.layers, KEEP, strict=True):
        for head in set(range(HEADS)) - set(heads):
            with torch.no_grad():
                layer.self_attn.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
    model = model_of(family)
    widths = cut(model)
    assert [w.num_attention_heads for w in widths] == [8, 16, 4, 12]
    assert {w.num_key_value_heads for w in widths} == {KV}
    logits = model(IDS).logits  # the live model works as it is, before it is converted
    torch.testing.assert_close(logits, zeroed(IDS).logits, rtol=1e-4, atol=1e-5)
    convert_pruned_model(model, widths).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, logits)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (loaded.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)
    for implementation in ("eager", *(["sdpa"] if family != "gemma2" else [])):
        loaded.set_attn_implementation(implementation)
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_model_whose_modules_read_widths_from_the_config_can_be_copied():
    model = model_of("phi3")
    converted = convert_pruned_model(model, cut(model))
    twin = copy.deepcopy(converted)
    twin.set_attn_implementation("eager")
    assert twin.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert converted.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    torch.testing.assert_close(twin(IDS).logits, converted(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", ["fused", "materialised"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_importance_is_that_of_the_rows_of_q_and_the_columns_of_o(family, gradients):
    model = model_of(family)
    widths = layer_widths(model.config.to_dict())
    scores = score(model, by_query_heads(model), widths, IDS, micro_batch_size=2, gradients=gradients)
    exact = model_of(family).double().requires_grad_(True)
    logits = exact(input_ids=IDS).logits[:, :-1]
    functional.cross_entropy(logits.reshape(-1, VOCABULARY), IDS[:, 1:].reshape(-1)).backward()
    for layer, seen in zip(exact.model.layers, scores.unit_importance, strict=True):
        attention = layer.self_attn
        q = attention.qkv_proj if family == "phi3" else attention.q_proj
        rows = (q.weight * q.weight.grad).abs().sum(1)[: HEADS * HEAD_DIM]
        if q.bias is not None:
            rows = rows + (q.bias * q.bias.grad).abs()
        columns = (attention.o_proj.weight * attention.o_proj.weight.grad).abs().sum(0)
        expected = (rows + columns).view(HEADS, HEAD_DIM).sum(1).detach().numpy()
        np.testing.assert_allclose(seen["query_head"], expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("target", [0.85, 0.6])
def test_lands_on_the_target_with_whole_groups(settings, family, target, tmp_path):
    config = settings(family, target=target)
    result = prune(config)
    dense, pruned = summarize(config.model), summarize(result.model_directory)
    channel = 3 * 48 + (2 if family == "llama" else 0)
    assert 0 <= int(target * dense.parameters) - pruned.parameters < channel
    assert {layer.widths.num_key_value_heads for layer in pruned.layers} == {KV}
    counts = [layer.widths.num_attention_heads for layer in pruned.layers]
    assert all(count % KV == 0 for count in counts)
    assert min(counts) < HEADS
    assert [len(keep["query_head"]) for keep in result.plan.keep_indices] == counts
    assert {layer["query_head"] for layer in result.plan.initial_units} == {HEADS}
    for keep in result.plan.keep_indices:
        assert len(set(np.bincount(keep["query_head"] // (HEADS // KV)))) == 1
    records = sorted((result.run_directory / "iterations").glob("*.json"))
    assert [layer["query_head"] for layer in json.loads(records[-1].read_text())["units"]] == counts
    applied = apply_plan(result.plan, config.model, tmp_path / "applied")
    ours, theirs = (load_file(d / "model.safetensors") for d in (result.model_directory, applied))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    original = load_file(f"{config.model}/model.safetensors")
    for name, tensor in ours.items():  # keys and values; Phi-3 has them behind the queries
        if ".k_proj" in name or ".v_proj" in name:
            assert torch.equal(tensor, original[name])
        elif ".qkv_proj" in name:
            assert torch.equal(tensor[-2 * KV * HEAD_DIM :], original[name][-2 * KV * HEAD_DIM :])


def test_the_smallest_model_has_one_query_head_per_group(settings, tmp_path):
    with pytest.raises(ValueError, match="below what one unit per layer leaves") as error:
        prune(settings("mistral", target="2"))
    floor = int(str(error.value).rpartition("expected ")[2].partition(" to")[0].replace(",", ""))
    smallest = prune(settings("mistral", target=str(floor), iterations=3))
    assert smallest.metrics["parameters_after"] == floor
    for keep in smallest.plan.keep_indices:
        assert (keep["query_head"] // (HEADS // KV)).tolist() == list(range(KV))
        assert len(keep["channel"]) == 1


def test_attention_with_one_kv_head_shrinks_by_query_heads(settings):
    model = make_model("gemma3_text", num_attention_heads=4, num_key_value_heads=1)
    config = settings("gemma3_text", model, target=0.7)
    by_group = prune(dataclasses.replace(config, granularity="kv_group", output=config.output + "-group"))
    assert {layer.widths.num_attention_heads for layer in summarize(by_group.model_directory).layers} == {4}
    by_head = prune(config)
    heads = [layer.widths.num_attention_heads for layer in summarize(by_head.model_directory).layers]
    assert min(heads) < 4
    assert all(1 <= count <= 4 for count in heads)
    model = AutoModelForCausalLM.from_pretrained(by_head.model_directory)
    assert model(IDS).logits.isfinite().all()


def test_query_heads_with_a_kv_head_each_are_kv_groups(settings):
    model = make_model("llama", num_attention_heads=4, num_key_value_heads=4)
    result = prune(settings("llama", model, attention_rate=2.0, target=0.6))
    assert result.plan.granularity == result.plan.settings["granularity"] == "kv_group"
    after = summarize(result.model_directory).layers
    assert min(layer.widths.num_key_value_heads for layer in after) < 4
    assert all(layer.widths.num_attention_heads == layer.widths.num_key_value_heads for layer in after)


def test_a_model_pruned_by_kv_groups_is_pruned_on_by_query_heads(settings, tmp_path):
    first = prune(settings("llama", target=0.8, granularity="kv_group"))
    widths = [layer.widths for layer in summarize(first.model_directory).layers]
    assert len({w.num_key_value_heads for w in widths}) > 1
    second = prune(
        settings("llama", model=str(first.model_directory), target=0.7, output=str(tmp_path / "second"))
    )
    after = [layer.widths for layer in summarize(second.model_directory).layers]
    assert [w.num_key_value_heads for w in after] == [w.num_key_value_heads for w in widths]
    assert [w.num_attention_heads for w in after] != [w.num_attention_heads for w in widths]
    model = AutoModelForCausalLM.from_pretrained(second.model_directory)
    assert model(IDS).logits.isfinite().all()


def test_an_interrupted_run_ends_with_the_same_bytes(settings, tmp_path, monkeypatch):
    whole = prune(settings("qwen3"))
    config = settings("qwen3", output=str(tmp_path / "broken"))
    removed = []

    def interrupt(engine, keep, original=InMemoryEngine.remove_units, **more):
        removed.append(keep)
        if len(removed) == 3:
            raise KeyboardInterrupt
        original(engine, keep, **more)

    with monkeypatch.context() as patch:
        patch.setattr(InMemoryEngine, "remove_units", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(config)
    resumed = prune(dataclasses.replace(config, resume=True))
    assert resumed.plan.hash == whole.plan.hash
    name = "model.safetensors"
    assert (resumed.model_directory / name).read_bytes() == (whole.model_directory / name).read_bytes()


def test_a_plan_that_leaves_groups_of_different_sizes_is_refused(settings, tmp_path):
    config = settings("mistral", target=0.9)
    plan = prune(config).plan
    layers = [dict(layer) for layer in plan.keep_indices]
    layers[2]["query_head"] = np.array([0, 1, 4, 8, 12])
    uneven = dataclasses.replace(plan, keep_indices=tuple(layers))
    with pytest.raises(
        ValueError, match=r"layer 2: the plan keeps \[2, 1, 1, 1\] units of query_head per KV g"
    ):
        apply_plan(uneven, config.model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_the_parameters_a_smaller_model_does_not_have(family):
    whole, smaller = model_of(family), make_model(family, num_attention_heads=12)
    widths = layer_widths(whole.config.to_dict())
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    costs = unit_costs(by_query_heads(whole), widths, shapes)
    lost = whole.num_parameters() - smaller.num_parameters()  # one head of each group of each layer
    assert sum(cost["query_head"] for cost in costs) == lost
    assert removal_counts(by_query_heads(whole), widths)[0] == {"query_head": 4, "channel": 88}


def test_widths():
    kind = by_query_heads(model_of("llama")).unit_kinds[0]
    widths = LayerWidths(16, 4, 88, 10)
    assert (kind.count(widths), kind.lanes(widths)) == (16, 4)
    assert kind.resized(widths, 8) == LayerWidths(8, 4, 88, 10)
