"""The pruning loop on tiny models: budgets, determinism, saved results, plans replayed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import FAMILIES, SPARSE_FAMILIES
from transformers import AutoModelForCausalLM

from adapt_pruner import (
    EvaluateConfig,
    PruneConfig,
    PruningPlan,
    apply_plan,
    evaluate,
    prune,
    summarize,
)
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.families import find_family, layer_widths, unit_costs

SETTINGS = {
    "iterations": 10, "amplitude": 0.05, "num_sequences": 8, "sequence_length": 16, "micro_batch_size": 4,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(family="qwen2", **changes):
        options = {
            "model": str(tiny_models[family]), "target": 0.7, "output": str(tmp_path / "run"),
            "calibration": str(calibration_file), **SETTINGS, **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


def channel_cost(directory):
    checkpoint = open_checkpoint(directory)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    family = find_family(checkpoint.config["model_type"])
    return unit_costs(family, layer_widths(checkpoint.config), shapes)[0]["channel"]


def bytes_of(run):
    files = {"plan.json": run / "plan.json", **{p.name: p for p in (run / "model").iterdir()}}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((family, 0.7) for family in (*FAMILIES, *SPARSE_FAMILIES)),
        ("llama", 0.9),
        ("mistral", 0.8),
        ("qwen2", 0.5),
        ("phi3", 0.5),
    ],
)
def test_lands_on_the_target(settings, tiny_models, family, target):
    seen = []
    result = prune(settings(family, target=target), on_iteration=seen.append)
    dense = summarize(tiny_models[family]).parameters
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    parameters = model.num_parameters()
    assert parameters == summarize(result.model_directory).parameters == result.metrics["parameters_after"]
    assert 0 <= int(target * dense) - parameters < channel_cost(tiny_models[family])
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()
    assert len({tuple(w.items()) for w in json_layers(result)}) > 1  # layers got widths of their own
    assert [report.iteration for report in seen] == list(range(1, len(seen) + 1))
    assert all(a.parameters > b.parameters for a, b in pairwise(seen))


@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE_FAMILIES])
@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
def test_keeping_everything_changes_no_bit(settings, tiny_models, family, granularity, tmp_path):
    full = prune(settings(family, target=1.0, granularity=granularity))
    assert full.plan.removes_nothing()
    applied = apply_plan(full.plan, tiny_models[family], tmp_path / "applied")
    original = load_file(tiny_models[family] / "model.safetensors")
    for directory in (full.model_directory, applied):
        kept = load_file(directory / "model.safetensors")
        assert original.keys() == kept.keys()
        assert all(torch.equal(kept[name], original[name]) for name in original)
        assert json.loads((directory / "config.json").read_text())["model_type"] == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_of_every_family_can_be_evaluated_and_applied(
    settings, tiny_models, family, calibration_file, tmp_path
):
    result = prune(settings(family, target=0.8))
    options = {"data": str(calibration_file), "context": 32, "max_tokens": 200, "dtype": "fp32"}
    seen = evaluate(EvaluateConfig(model=str(result.model_directory), **options)).perplexity
    assert seen is not None
    assert 1 < seen.perplexity < 1e6
    applied = apply_plan(result.plan, tiny_models[family], tmp_path / "applied")
    ours, theirs = (load_file(d / "model.safetensors") for d in (result.model_directory, applied))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def json_layers(result):
    return json.loads((result.run_directory / "iterations" / "001.json").read_text())["units"]


def test_target_as_a_count_and_of_non_embedding_parameters(settings, tiny_models, tmp_path):
    dense = summarize(tiny_models["qwen2"])
    count = dense.parameters * 3 // 4
    by_count = prune(settings(target=str(count), output=str(tmp_path / "count")))
    assert 0 <= count - by_count.metrics["parameters_after"] < channel_cost(tiny_models["qwen2"])
    embeddings = dense.parameters - dense.non_embedding_parameters
    part = prune(settings(target=0.75, target_of="non-embedding", output=str(tmp_path / "part")))
    expected = int(0.75 * dense.non_embedding_parameters) + embeddings
    assert 0 <= expected - part.metrics["parameters_after"] < channel_cost(tiny_models["qwen2"])


def test_the_smallest_target(settings, tiny_models, tmp_path):
    checkpoint = open_checkpoint(tiny_models["qwen2"])
    with pytest.raises(ValueError, match="below what one unit per layer leaves") as error:
        prune(settings(target="2", output=str(tmp_path / "none")))
    floor = int(str(error.value).rpartition("expected ")[2].partition(" to")[0].replace(",", ""))
    assert floor < 0.5 * checkpoint.num_parameters
    smallest = prune(settings(target=str(floor), output=str(tmp_path / "floor")))
    assert smallest.metrics["parameters_after"] == floor
    assert {len(i) for layer in smallest.plan.keep_indices for i in layer.values()} == {1}


def test_pruned_weights_are_those_of_the_kept_units(settings, tiny_models):
    result = prune(settings("llama"))
    original = load_file(tiny_models["llama"] / "model.safetensors")
    pruned = load_file(result.model_directory / "model.safetensors")
    for layer, keep in enumerate(result.plan.keep_indices):
        prefix = f"model.layers.{layer}."
        channels = torch.from_numpy(keep["channel"])
        rows = torch.from_numpy((keep["kv_group"][:, None] * 10 + np.arange(10)).ravel())
        query_rows = torch.from_numpy((keep["kv_group"][:, None] * 20 + np.arange(20)).ravel())
        for name, dim, index in [
            ("mlp.gate_proj.weight", 0, channels), ("mlp.up_proj.bias", 0, channels),
            ("mlp.down_proj.weight", 1, channels), ("self_attn.k_proj.weight", 0, rows),
            ("self_attn.v_proj.bias", 0, rows), ("self_attn.q_proj.weight", 0, query_rows),
            ("self_attn.q_proj.bias", 0, query_rows), ("self_attn.o_proj.weight", 1, query_rows),
        ]:  # fmt: skip
            expected = original[prefix + name].index_select(dim, index)
            assert torch.equal(pruned[prefix + name], expected), prefix + name
        for name in ("mlp.down_proj.bias", "self_attn.o_proj.bias", "input_layernorm.weight"):
            assert torch.equal(pruned[prefix + name], original[prefix + name])


def test_same_seed_same_bytes_another_seed_another_plan(settings, tmp_path):
    runs = [
        prune(settings("llama", output=str(tmp_path / name), seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, second, other = (bytes_of(run.run_directory) for run in runs)
    assert first == second
    assert first["plan.json"] != other["plan.json"]


def test_run_directory_holds_what_it_should(settings):
    result = prune(settings())
    names = {p.name for p in result.run_directory.iterdir()} - {".lock"}
    assert names == {
        "config.yaml", "environment.json", "log.jsonl", "metrics.json", "plan.json", "iterations", "model",
        "widths.png",
    }  # fmt: skip
    assert (result.run_directory / "widths.png").read_bytes().startswith(b"\x89PNG")
    events = [json.loads(line) for line in (result.run_directory / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events][:: len(events) - 1] == ["started", "finished"]
    record = json.loads((result.run_directory / "iterations" / "001.json").read_text())
    assert {"loss", "parameters", "sparsity", "layer_importance", "units", "seconds"} <= record.keys()
    assert (result.model_directory / "tokenizer.json").exists()


def test_applying_the_plan_gives_the_same_model(settings, tiny_models, tmp_path):
    result = prune(settings("llama"))
    applied = apply_plan(
        PruningPlan.load(result.run_directory / "plan.json"), tiny_models["llama"], tmp_path / "applied"
    )
    ours, theirs = (load_file(d / "model.safetensors") for d in (result.model_directory, applied))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((d / "config.json").read_text()) for d in (result.model_directory, applied)]
    assert configs[0] == configs[1]
    names = {p.name for p in result.model_directory.iterdir()}
    assert {p.name for p in applied.iterdir()} == names | {"checksums.json"}


def test_apply_splits_large_models_into_shards(settings, tiny_models, tmp_path):
    result = prune(settings())
    applied = apply_plan(result.plan, tiny_models["qwen2"], tmp_path / "applied", max_shard_bytes=100_000)
    assert len(list(applied.glob("model-*-of-*.safetensors"))) > 1
    ids = torch.arange(3, 20)[None]
    a, b = (AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (applied, result.model_directory))
    assert torch.equal(a, b)


def test_apply_refuses_another_model(settings, tiny_models, tmp_path):
    plan = prune(settings("qwen2")).plan
    with pytest.raises(ValueError, match="family 'qwen2'; this model is of family 'llama'"):
        apply_plan(plan, tiny_models["llama"], tmp_path / "x")
    changed = dataclasses.replace(plan, weight_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="whose weights differ"):
        apply_plan(changed, tiny_models["qwen2"], tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        apply_plan(plan, tiny_models["qwen2"], tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "x").exists()


def test_a_pruned_model_can_be_pruned_again(settings, tmp_path):
    first = prune(settings("llama", target=0.8))
    second = prune(
        settings("llama", model=str(first.model_directory), target=0.8, output=str(tmp_path / "second"))
    )
    assert second.metrics["parameters_before"] == first.metrics["parameters_after"]
    assert second.metrics["parameters_after"] <= 0.8 * first.metrics["parameters_after"]


def test_bf16_model_stays_bf16_and_dtype_can_be_asked_for(settings, tmp_path):
    bf16 = prune(settings(dtype="bf16", output=str(tmp_path / "bf16")))
    assert summarize(bf16.model_directory).dtype == "BF16"
    again = prune(settings(model=str(bf16.model_directory), target=0.9, output=str(tmp_path / "again")))
    assert summarize(again.model_directory).dtype == "BF16"


@pytest.mark.parametrize("threads", [1, 2])
def test_reference_and_native_ops_give_the_same_plan(settings, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plans = [
            prune(settings("llama", backend=backend, output=str(tmp_path / backend))).plan.hash
            for backend in ("reference", "cpu")
        ]
    finally:
        torch.set_num_threads(before)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_materialised_gradients_give_the_same_plan(settings, tmp_path, family):
    fused, materialised = (
        prune(settings(family, gradients=name, micro_batch_size=8, output=str(tmp_path / name)))
        for name in ("fused", "materialised")
    )
    for a, b in zip(fused.plan.keep_indices, materialised.plan.keep_indices, strict=True):
        assert {kind: keep.tolist() for kind, keep in a.items()} == {
            kind: keep.tolist() for kind, keep in b.items()
        }
    assert fused.plan.hash == materialised.plan.hash
    saved = yaml.safe_load((fused.run_directory / "config.yaml").read_text())
    assert saved["gradients"] == "fused"


KILLED = """
import signal, sys
from dataclasses import replace
import yaml
from adapt_pruner import pruner
from adapt_pruner.config import PruneConfig
from adapt_pruner.run import RunDirectory

sys.path.append(sys.argv[1])
from dying import child
import matplotlib.backends.backend_agg, matplotlib.figure

DYING = {
    "iteration": (RunDirectory, "save_iteration"),
    "finish": (RunDirectory, "finish"),
    "plot": (pruner, "plot_run"),
    "engine": (pruner.InMemoryEngine, "save"),
}

config = PruneConfig(**yaml.safe_load(sys.stdin))
assert child(config) == 0
for place, count in [("iteration", 1), ("iteration", 2), ("iteration", 4), ("plot", 1), ("engine", 1),
                     ("finish", 1)]:
    killed = replace(config, output=f"{config.output}-{place}-{count}")
    assert child(killed, DYING[place], count) == signal.SIGKILL, (place, count)
    resumed = replace(killed, resume=True)
    if (place, count) == ("iteration", 4):  # killed again while it resumes
        assert child(resumed, DYING["iteration"], 1) == signal.SIGKILL
    assert child(resumed) == 0, (place, count)
    assert child(resumed) == 0, "a complete run is left as it is"
"""


def test_killed_anywhere_and_resumed_gives_the_same_bytes(settings, tmp_path):
    config = yaml.safe_dump(dataclasses.asdict(settings("llama", target=0.6)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parents[1])],
        input=config,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(p for p in tmp_path.glob("run*") if p.is_dir())
    assert len(runs) == 7
    whole = bytes_of(tmp_path / "run")
    for run in runs:
        assert bytes_of(run) == whole, run.name
        assert not (run / "state").exists()
        assert not list(run.glob(".model.partial-*")), "what a kill left behind is cleaned up"
