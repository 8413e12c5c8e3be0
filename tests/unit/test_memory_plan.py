"""What `plan-memory` predicts from a config, beside what engines say of the same model when it is there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import make_model

from adapt_pruner import PlanMemoryConfig, PruneConfig, memory_plan, plan_memory, prune
from adapt_pruner.cli import main
from adapt_pruner.inspection import summarize, summary_of
from adapt_pruner.memory_plan import MachineRates, disk_bytes_per_second, layer_flops_per_second

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
RATES = MachineRates(flops_per_second=1e9, disk_bytes_per_second=1e6, available_bytes=10**7)


def plans(config, rates=RATES):
    return {plan.engine: plan for plan in plan_memory(config, rates=rates).engines}


@pytest.fixture
def config(tiny_models, tmp_path):
    """Of a model of which only config.json is there."""
    shutil.copy(tiny_models["llama"] / "config.json", tmp_path)
    return PlanMemoryConfig(str(tmp_path), num_sequences=8, sequence_length=32, micro_batch_size=4)


def weights_of(directory: Path) -> dict[str, int]:
    with safe_open(directory / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118


def test_totals_are_those_of_the_model(config, tiny_models):
    plan = plan_memory(config, rates=RATES)
    weights = weights_of(tiny_models["llama"])
    assert plan.weight_bytes == sum(weights.values())
    assert plan.parameters == summarize(tiny_models["llama"]).parameters
    layer = sum(size for name, size in weights.items() if name.startswith("model.layers.0."))
    assert plan.largest_layer_bytes == layer
    assert plan.calibration_tokens == 8 * 32


@pytest.mark.parametrize("memory", ["1MB", "100KB", "1B"])
def test_streaming_reads_and_moves_what_was_predicted(
    config, tiny_models, calibration_file, tmp_path, memory
):
    predicted = plans(replace(config, memory=memory))["streaming"]
    run = prune(
        PruneConfig(
            str(tiny_models["llama"]), 0.95, str(tmp_path / "run"), calibration=str(calibration_file),
            num_sequences=8, sequence_length=32, micro_batch_size=4, engine="streaming", memory=memory,
            device="cpu",
        )
    ).run_directory  # fmt: skip
    record = json.loads((run / "iterations" / "001.json").read_text())["engine"]
    moved = record["weight_bytes_read"] + record["boundary_bytes_moved"]
    rows = moved - predicted.bytes_per_iteration  # of the embedding that occur
    assert (record["boundaries_on_disk"] == 0) == (memory == "1MB")
    weights = weights_of(tiny_models["llama"])
    assert 0 < rows < weights["model.embed_tokens.weight"]
    assert predicted.bytes_read_once == 0


def test_work_and_time(config, tiny_models):
    """Against the plain count: 2 FLOPs for each weight of a matrix and token, and attention's."""
    summary = summarize(tiny_models["llama"], context=16)
    tokens = 8 * 32
    layers = sum(layer.flops_per_token for layer in summary.layers)
    head = summary.flops_per_token - layers
    found = plans(config)
    assert found["in-memory"].flops_per_iteration == tokens * (3 * layers + 2 * head)
    assert found["streaming"].flops_per_iteration == tokens * (4 * layers + 2 * head)
    assert found["sharded"].flops_per_iteration == tokens * (3 * layers + 2 * head) / 8
    for plan in found.values():
        work = plan.flops_per_iteration / 1e9
        assert plan.seconds_per_iteration == max(work, plan.bytes_per_iteration / 1e6)
    assert found["streaming"].seconds_per_iteration == found["streaming"].bytes_per_iteration / 1e6
    weights_alone = plans(replace(config, method="magnitude"))["streaming"]
    assert weights_alone.flops_per_iteration == tokens * (layers + head)


def test_memory_grows_with_layers_in_memory_alone(config, tmp_path):
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "num_hidden_layers": 4, "layer_types": None}))
    few = plans(replace(config, memory="1"))
    file.write_text(json.dumps({**values, "num_hidden_layers": 40, "layer_types": None}))
    many = plans(replace(config, memory="1"))
    assert many["in-memory"].memory_bytes > 3 * few["in-memory"].memory_bytes
    assert many["streaming"].memory_bytes == few["streaming"].memory_bytes
    assert many["streaming"].bytes_per_iteration > 5 * few["streaming"].bytes_per_iteration
    assert not plans(config, replace(RATES, available_bytes=10**5))["in-memory"].fits
    ten, one = (plans(replace(config, processes=n))["sharded"].memory_bytes for n in (10, 1))
    assert ten < one


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("70b", 70.55), ("405b", 405.85)])
def test_known_models_have_their_size(name, billions):
    config = PlanMemoryConfig(str(CONFIGS / f"llama-3.1-{name}.json"))
    assert plan_memory(config, rates=RATES).parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_windows_need_no_file_in_the_working_directory(family, tmp_path, tiny_models, monkeypatch):
    make_model(family, sliding_window=8).config.save_pretrained(tmp_path)
    for other in (False, True):
        directory = tmp_path / f"work-{other}"
        directory.mkdir()
        if other:  # one of another model
            shutil.copy(tiny_models["llama"] / "config.json", directory)
        monkeypatch.chdir(directory)
        short, long = (
            plans(PlanMemoryConfig(str(tmp_path), sequence_length=n, num_sequences=256 // n))["in-memory"]
            for n in (16, 64)
        )
        assert short.flops_per_iteration == long.flops_per_iteration  # a token looks at 8 others


@pytest.mark.parametrize(
    ("name", "settings", "billions"),
    [
        ("MistralConfig", {"sliding_window": 4096}, 7.24),
        ("Phi3Config", {"sliding_window": 2047}, 3.82),
    ],
)
def test_models_with_windows_of_real_size(name, settings, billions, tmp_path):
    config = getattr(transformers, name)(**settings)
    assert getattr(config, "layer_types", None) is None
    config.save_pretrained(tmp_path)
    plan = plan_memory(PlanMemoryConfig(str(tmp_path)), rates=RATES)
    assert plan.parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_what_cannot_be_planned(config, tmp_path):
    assert plans(replace(config, method="adapt-pruner+"))["streaming"].problem.startswith("the estimator")
    with pytest.raises(ValueError, match="method is 'shortgpt', expected one that removes units"):
        plan_memory(replace(config, method="shortgpt"))
    with pytest.raises(ValueError, match="processes is 0, expected at least 1"):
        replace(config, processes=0)
    with pytest.raises(ValueError, match=r"model is '.*nowhere', expected a directory or config.json"):
        plan_memory(replace(config, model=str(tmp_path / "nowhere")))


def test_command_line_measures_this_machine(config, capsys):
    assert main(["plan-memory", config.model, "--json", "--device", "cpu"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["flops_per_second"] > 1e6
    assert machine["disk_bytes_per_second"] > 1e5
    assert machine["disk_directory"] == config.model
    assert main(["plan-memory", config.model, "--device", "cpu"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "streaming" in shown
    assert f"fromthediskat{config.model},measured" in shown


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_layer_is_timed_by_what_a_token_goes_through(family, tiny_models, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(memory_plan, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    config = transformers.AutoConfig.from_pretrained(tiny_models[family])
    layer = summarize(tiny_models[family], context=32).layers[0]
    flops = layer_flops_per_second(config, torch.float32, torch.device("cpu"))
    assert flops == 256 * 3 * layer.flops_per_token
    if family != "llama":
        active = layer.widths.experts_per_token * 3 * layer.widths.intermediate_size * config.hidden_size
        attention = (2 * 8 + 2 * 4) * 10 * config.hidden_size
        router = layer.widths.num_experts * config.hidden_size
        assert flops == 256 * 3 * (2 * (active + attention + router) + 4 * 8 * 10 * 32)


def test_large_layers_are_timed_with_all_widths_narrower(tiny_models, monkeypatch):
    timed = []

    def seen(checkpoint, **options):
        timed.append(checkpoint.config)
        return summary_of(checkpoint, **options)

    monkeypatch.setattr(memory_plan, "summary_of", seen)
    monkeypatch.setattr(memory_plan, "_TIMED_BYTES", 100_000)
    config = transformers.AutoConfig.from_pretrained(tiny_models["qwen3_moe"])
    assert layer_flops_per_second(config, torch.float32, torch.device("cpu")) > 0
    halved = {name: timed[0][name] for name in ("hidden_size", "moe_intermediate_size")}
    assert halved == {"hidden_size": 24, "moe_intermediate_size": 8}


def test_the_disk_is_measured_beside_the_model_or_in_the_working_directory(config, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(memory_plan, "disk_bytes_per_second", lambda directory: 1e6)
    found = {
        model: plan_memory(replace(config, model=model, device="cpu")).machine.disk_directory
        for model in (str(tmp_path), str(tmp_path / "config.json"))
    }
    assert set(found.values()) == {str(tmp_path)}
    closed = {tmp_path}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed)
    assert plan_memory(replace(config, device="cpu")).machine.disk_directory == str(work)
    closed.add(work)
    with pytest.raises(ValueError, match=f"measured in {tmp_path} or {work}: expected a directory that can"):
        plan_memory(replace(config, device="cpu"))


def test_the_disk_is_left_as_it_was(tmp_path):
    assert disk_bytes_per_second(tmp_path) > 0
    assert not list(tmp_path.iterdir())
