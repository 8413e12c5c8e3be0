"""Targets for FLOPs and KV cache: counted as `inspect` counts the saved model, met, resumed, refused."""

from __future__ import annotations

import json

import pytest

from adapt_pruner import PruneConfig, cli, prune, summarize
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.families import find_family, layer_widths, removal_counts
from adapt_pruner.resources import unit_cache, unit_flops


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(family="qwen2", **changes):
        options = {
            "model": str(tiny_models[family]), "output": str(tmp_path / "run"), "method": "magnitude",
            "calibration": str(calibration_file), "num_sequences": 4, "sequence_length": 16,
            "micro_batch_size": 4, "device": "cpu", "target_context": 100, **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"target_flops": 0.6}),
        ("qwen2", {"target_kv_cache": 0.5}),
        ("gemma2", {"target_flops": 0.7, "target_kv_cache": 0.6}),  # windows of 8 of the 100 tokens
        ("llama", {"target": 0.8, "target_flops": 0.7, "granularity": "query_head"}),
        ("mistral", {"target": 0.85, "target_kv_cache": 0.5, "method": "adapt-pruner", "iterations": 8}),
        ("phi3", {"target_flops": 0.6, "round_to": 8, "allocation": "global"}),
    ],
)
def test_the_saved_model_meets_its_targets_by_another_count(settings, tiny_models, family, changes):
    result = prune(settings(family, **changes))
    before = summarize(tiny_models[family], context=100)
    after = summarize(result.model_directory, context=100)
    slack = {}
    for setting, key, unit in (
        ("target", "parameters", 160),
        ("target_flops", "flops_per_token", 320 * changes.get("round_to", 1)),
        ("target_kv_cache", "kv_cache_bytes", 2 * 10 * 4 * 100),
    ):
        if setting in changes:
            target = int(changes[setting] * getattr(before, key))
            slack[key] = (target - getattr(after, key)) / unit
    assert min(slack.values()) >= 0
    assert min(slack.values()) < 1
    reported = result.metrics["resources"]
    assert ("flops" in reported) == ("target_flops" in changes)
    for name, key in (("flops", "flops_per_token"), ("kv_cache_bytes", "kv_cache_bytes")):
        if name in reported:
            assert reported[name]["before"] == getattr(before, key)
            assert reported[name]["after"] == getattr(after, key)
    if "target" not in changes:
        assert result.metrics["parameters_target"] is None
        if list(changes) == ["target_kv_cache"]:
            assert all(layer.widths.intermediate_size == 88 for layer in after.layers)


@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
def test_costs_of_units_are_differences_of_the_whole(tiny_models, granularity):
    checkpoint = open_checkpoint(tiny_models["gemma2"])
    family = find_family("gemma2").with_granularity(granularity)
    widths = layer_widths(checkpoint.config)
    matrices = {n: t.shape for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
    flops = unit_flops(family, widths, matrices, [100, 8, 100, 8])
    cache = unit_cache(family, widths, [400, 32, 400, 32])
    heads = {"kv_group": 2, "query_head": 4}[
        granularity
    ]  # query heads that go at a time, of 8 for 4 KV heads
    kv_heads = {"kv_group": 1, "query_head": 0}[granularity]
    for i, attended in enumerate((100, 8, 100, 8)):
        weights = 48 * 10 * (2 * heads + 2 * kv_heads)
        assert flops[i] == {granularity: 2 * weights + 4 * heads * 10 * attended, "channel": 2 * 3 * 48}
        assert cache[i] == {granularity: 2 * kv_heads * 10 * 4 * attended, "channel": 0}
    assert removal_counts(family, widths)[0][granularity] == {"kv_group": 4, "query_head": 2}[granularity]


def test_a_size_is_of_the_cache_in_the_dtype_of_the_run(settings, tiny_models):
    # 4 layers, 4 heads of 10 values, keys and values, 2 bytes, 100 tokens.
    result = prune(settings(target_kv_cache="40KB", dtype="bf16"))
    assert result.metrics["resources"]["kv_cache_bytes"] == {"before": 64000, "target": 40000, "after": 40000}
    assert summarize(result.model_directory, context=100).kv_cache_bytes == 40000


def test_an_interrupted_run_with_several_targets_ends_with_the_same_bytes(settings, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(report):
        assert report.resources["kv_cache_bytes"]["target"] == 32000 * 4 * 0.6 // 1
        raise Interrupted

    changes = {"target": 0.8, "target_kv_cache": 0.6, "method": "adapt-pruner", "iterations": 8}
    whole = prune(settings(**changes))
    config = settings(output=str(tmp_path / "again"), **changes)
    for _ in range(3):
        with pytest.raises(Interrupted):
            prune(config, on_iteration=interrupt)
        config = settings(output=str(tmp_path / "again"), resume=True, **changes)
    again = prune(config)
    for name in ("plan.json", "model/model.safetensors"):
        assert (again.run_directory / name).read_bytes() == (whole.run_directory / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_kv_cache": 0.5, "granularity": "query_head"},
            "no unit that may go uses kv_cache_bytes; .* granularity kv_group",
        ),
        (
            {"target_kv_cache": 0.5, "attention_rate": 0.0},
            "no unit that may go uses kv_cache_bytes; .* attention_rate above 0",
        ),
        (
            {"target_kv_cache": 0.1},
            "target_kv_cache is 12,800 kv_cache_bytes, below what stays: .* 32,000 to",
        ),
        ({"target_flops": "1T"}, "target_flops is 1,000,000,000,000 flops, above what the model uses"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_written(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prune(settings(**changes))
    assert not (tmp_path / "run").exists()


def test_on_the_command_line(settings, tiny_models, calibration_file, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [
        "prune",
        tiny_models["qwen2"],
        "--target-flops",
        "0.7",
        "--output",
        run,
        "--method",
        "random",
    ]
    arguments += ["--calibration", calibration_file, "--num-sequences", "4", "--sequence-length", "16"]
    assert cli.main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert "FLOPs" in out
    assert "(target " in err
    assert cli.main(["inspect", str(run), "--json"]) == 0
    limits = json.loads(capsys.readouterr().out)["limits"]
    assert 0.6 < limits["flops"]["after"] / limits["flops"]["before"] <= 0.7
    assert cli.main(["inspect", str(run)]) == 0
    assert "limits of the run" in capsys.readouterr().out
