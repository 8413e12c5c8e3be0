"""What a model costs: parameters, FLOPs and KV cache from the headers, against the model itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SPARSE_FAMILIES, VOCABULARY, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from adapt_pruner.apply import apply_plan
from adapt_pruner.checkpoint import config_hash, open_checkpoint
from adapt_pruner.config import InspectConfig
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.families import find_family
from adapt_pruner.inspection import attended_tokens, inspect_model, ratios, summarize
from adapt_pruner.plan import PruningPlan

KEEP = [([0, 2, 3], 60), ([1], 7), ([0, 1, 2, 3], 88), ([0, 3], 33)]  # kv_groups, channels


def make_plan(directory) -> PruningPlan:
    """A plan that leaves every layer with its own widths."""
    checkpoint = open_checkpoint(directory)
    return PruningPlan(
        base_model=str(directory),
        config_hash=config_hash(checkpoint.config),
        weight_fingerprint=checkpoint.fingerprint(),
        family=find_family(checkpoint.config["model_type"]).name,
        settings={},
        initial_units=({"kv_group": 4, "channel": 88},) * 4,
        keep_indices=tuple(
            {"kv_group": np.array(groups), "channel": np.arange(channels)} for groups, channels in KEEP
        ),
    )


@pytest.fixture(scope="module", params=[*FAMILIES, *SPARSE_FAMILIES, "pruned"])
def directory(request, tiny_models, tmp_path_factory):
    if request.param != "pruned":
        return tiny_models[request.param]
    base = tiny_models["llama"]
    return apply_plan(make_plan(base), base, tmp_path_factory.mktemp("pruned") / "model")


def test_parameters_are_those_of_the_model(directory):
    summary, model = summarize(directory), load_model(directory)
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert summary.non_embedding_parameters == summary.parameters - VOCABULARY * 48
    assert [layer.parameters for layer in summary.layers] == [
        sum(p.numel() for p in layer.parameters()) for layer in model.model.layers
    ]


def test_an_untied_head_is_an_embedding_too(tmp_path):
    make_model("mistral", tied=False).save_pretrained(tmp_path)
    summary = summarize(tmp_path)
    assert summary.parameters - summary.non_embedding_parameters == 2 * VOCABULARY * 48


@pytest.mark.parametrize("context", [1, 33])
def test_flops_are_those_of_decoding_one_token(directory, context):
    # torch counts every matrix product of a real forward pass, as 2 FLOPs per multiply-add, and nothing
    # else: no norms, activations or bias additions, which the summary leaves out as well. With eager
    # attention the one new token at the end of `context` tokens attends to all of them (itself included), so
    # both attention products are counted in full. The one product that belongs to no weight and no attention,
    # positions times rotary frequencies, is taken off where transformers forms it as a matrix product.
    model = load_model(directory)
    model.set_attn_implementation("eager")
    if any(layer.widths.num_experts for layer in summarize(directory).layers):
        model.set_experts_implementation("eager")  # plain matrix products of the chosen experts
    ids = torch.arange(context)[None] % VOCABULARY
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if context > 1:
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
        counter = FlopCounterMode(display=False)
        with counter:
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    per_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    rotary = sum(flops for name, flops in per_module.items() if name.endswith("rotary_emb"))
    summary = summarize(directory, context=context)
    assert summary.flops_per_token == counter.get_total_flops() - rotary
    for i, layer in enumerate(summary.layers):
        counted = next(f for name, f in per_module.items() if name.endswith(f"model.layers.{i}"))
        assert layer.flops_per_token == counted
    assert summary.context == context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_bytes_are_those_of_a_real_cache(tmp_path, dtype):
    make_model("qwen2", dtype=dtype).save_pretrained(tmp_path / "base")
    pruned = apply_plan(make_plan(tmp_path / "base"), tmp_path / "base", tmp_path / "pruned")
    tokens = 13
    for directory in (tmp_path / "base", pruned):
        model = load_model(directory)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.arange(tokens)[None], past_key_values=cache, use_cache=True)
        per_layer = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        summary = summarize(directory)
        assert [tokens * layer.kv_cache_bytes_per_token for layer in summary.layers] == per_layer
        assert tokens * summary.kv_cache_bytes_per_token == sum(per_layer)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "qwen2"])
def test_windows_are_those_of_a_real_cache_without_a_list_of_layers(tmp_path, family):
    window, tokens = 8, 13
    more = {"use_sliding_window": True, "max_window_layers": 2} if family == "qwen2" else {}
    make_model(family, sliding_window=window, **more).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("layer_types", None)  # as older checkpoints have it
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(tokens)[None], past_key_values=cache, use_cache=True)
    windows = [window if layer.is_sliding else tokens for layer in cache.layers]
    assert window in windows
    assert attended_tokens(open_checkpoint(tmp_path), tokens) == windows


def test_a_summary_as_json(tiny_models):
    summary = summarize(tiny_models["qwen2"])
    back = json.loads(json.dumps(summary.to_dict()))
    assert back["parameters"] == summary.parameters
    assert back["model_type"] == "qwen2"
    assert back["dtype"] == "F32"
    assert len(back["layers"]) == 4
    assert back["layers"][0]["widths"] == {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 88,
        "head_dim": 10,
    }


@pytest.fixture
def run_directory(tiny_models, tmp_path):
    """What a pruning run leaves: plan.json and model/."""
    base, run = tiny_models["llama"], tmp_path / "run"
    plan = make_plan(base)
    run.mkdir()
    plan.save(run / "plan.json")
    apply_plan(plan, base, run / "model")
    return run


def test_a_run_directory_shows_its_model_before_and_after(run_directory, tiny_models):
    after, before = inspect_model(InspectConfig(str(run_directory), context=64))
    assert before == summarize(tiny_models["llama"], context=64)
    assert after == summarize(run_directory / "model", context=64)
    assert [
        (layer.widths.num_attention_heads, layer.widths.num_key_value_heads, layer.widths.intermediate_size)
        for layer in after.layers
    ] == [(2 * len(groups), len(groups), channels) for groups, channels in KEEP]


def test_a_base_that_has_changed_or_is_gone_is_not_compared_with(tiny_models, tmp_path):
    base = shutil.copytree(tiny_models["llama"], tmp_path / "base")
    plan = make_plan(base)
    (tmp_path / "run").mkdir()
    plan.save(tmp_path / "run" / "plan.json")
    apply_plan(plan, base, tmp_path / "run" / "model")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.warns(UserWarning, match="nothing to compare with: .*its weights have changed"):
        assert inspect_model(InspectConfig(str(tmp_path / "run")))[1] is None
    shutil.rmtree(base)
    with pytest.warns(UserWarning, match="nothing to compare with"):
        assert inspect_model(InspectConfig(str(tmp_path / "run")))[1] is None


def test_ratios_are_what_is_left(run_directory):
    after, before = inspect_model(InspectConfig(str(run_directory)))
    left = ratios(after, before)
    assert set(left) == {
        "parameters",
        "non_embedding_parameters",
        "flops_per_token",
        "kv_cache_bytes_per_token",
        "kv_cache_bytes",
    }
    assert left["kv_cache_bytes_per_token"] == 10 / 16  # kv_groups
    assert left["parameters"] == pytest.approx(after.parameters / before.parameters)
    assert left["non_embedding_parameters"] < left["parameters"] < 1


def test_a_model_has_nothing_before_it_unless_asked(tiny_models, run_directory):
    after, before = inspect_model(InspectConfig(str(tiny_models["llama"])))
    assert before is None
    assert after.parameters == summarize(tiny_models["llama"]).parameters
    pruned = str(run_directory / "model")
    after, before = inspect_model(InspectConfig(pruned, base=str(tiny_models["llama"])))
    assert before is not None
    assert before.parameters > after.parameters


def test_a_base_with_other_layers_is_refused(tiny_models, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    small = MistralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    MistralForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 4 layers, .* has 2: expected a model pruned from it"):
        inspect_model(InspectConfig(str(tiny_models["mistral"]), base=str(tmp_path)))


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, tiny_models):
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match=r"gate_proj\.weight has shape \(88, 48\), the config asks for 80"):
        summarize(tmp_path / "model")


def test_an_unfinished_run_says_so(run_directory):
    (run_directory / "config.yaml").write_text("model: m\n")
    shutil.rmtree(run_directory / "model")
    with pytest.raises(ValueError, match="is a run directory without model/: the run is not finished"):
        inspect_model(InspectConfig(str(run_directory)))
