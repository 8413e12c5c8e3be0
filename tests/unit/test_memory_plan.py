"""What `plan-memory` predicts from a config, beside what engines say of the same model when it is there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from adapt_pruner import PlanMemoryConfig, PruneConfig, plan_memory, prune
from adapt_pruner.cli import main
from adapt_pruner.inspection import summarize
from adapt_pruner.memory_plan import MachineRates, disk_bytes_per_second

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


def test_streaming_reads_what_was_predicted(config, tiny_models, calibration_file, tmp_path):
    predicted = plans(replace(config, memory="1MB"))["streaming"]
    run = prune(
        PruneConfig(
            str(tiny_models["llama"]), 0.95, str(tmp_path / "run"), calibration=str(calibration_file),
            num_sequences=8, sequence_length=32, micro_batch_size=4, engine="streaming", memory="1MB",
            device="cpu",
        )
    ).run_directory  # fmt: skip
    record = json.loads((run / "iterations" / "001.json").read_text())["engine"]
    rows = record["weight_bytes_read"] - predicted.bytes_per_iteration  # of the embedding that occur
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
    assert main(["plan-memory", config.model, "--device", "cpu"]) == 0
    assert "streaming" in capsys.readouterr().out


def test_the_disk_is_left_as_it_was(tmp_path):
    assert disk_bytes_per_second(tmp_path) > 0
    assert not list(tmp_path.iterdir())
