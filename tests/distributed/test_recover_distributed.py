"""Recovery and Adapt-Accel as two gloo processes: as one process would, also when one of them dies."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from launch import torchrun
from safetensors.torch import load_file

from adapt_pruner.adapt_accel import accel
from adapt_pruner.plan import PruningPlan
from adapt_pruner.recovery.config import AccelConfig, RecoverConfig
from adapt_pruner.recovery.recover import recover

pytestmark = pytest.mark.timeout(300)
STEPS = 6


def run_worker(command: str, settings: dict, path: Path, *kill: int, **variables: str):
    path.write_text(json.dumps(settings))
    return torchrun("recover_worker.py", command, path, *kill, **variables)


@pytest.fixture(scope="module")
def config(tiny_models, calibration_file, tmp_path_factory) -> RecoverConfig:
    return RecoverConfig(
        model=str(tiny_models["qwen2"]),
        output=str(tmp_path_factory.mktemp("alone") / "run"),
        data=str(calibration_file),
        tokens=STEPS * 8 * 32,
        sequence_length=32,
        batch_size=8,
        micro_batch_size=2,
        learning_rate=1e-3,
        save_steps=2,
        eval_tokens=3 * 32,  # sequences that do not fill a round of all processes
        loggers="none",
        device="cpu",
    )


@pytest.fixture(scope="module")
def alone(config):
    return recover(config)


def losses(run: Path) -> list[float]:
    """Of each step; what was logged last counts where a step was made again."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return list({entry["step"]: entry["loss"] for entry in entries if "loss" in entry}.values())


def same_weights(run: Path, other: Path, *, rtol: float, atol: float) -> None:
    import torch

    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (run, other))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def together(config, tmp_path_factory):
    """Two processes, by how they share the model: what they print and the run."""
    runs = {}
    for sharding, variables in (("full", {"IN_PARTS": "1"}), ("none", {"REPLICATED": "1"})):
        path = tmp_path_factory.mktemp(sharding)
        settings = asdict(replace(config, output=str(path / "run"), sharding=sharding))
        done = run_worker("recover", settings, path / "c.json", **variables)
        assert done.returncode == 0, done.stderr[-12000:]
        runs[sharding] = done.stdout, path / "run"
    return runs


@pytest.mark.parametrize("sharding", ["full", "none"])
def test_two_processes_train_as_one(alone, together, sharding):
    printed, run = together[sharding]
    assert printed.count(" holds ") == 2
    assert losses(run) == pytest.approx(losses(alone.run_directory), rel=1e-5)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["held_out_loss"] == pytest.approx(alone.metrics["held_out_loss"], rel=1e-5)
    same_weights(run, alone.run_directory, rtol=1e-4, atol=1e-5)


def test_adapters_of_two_processes_are_those_of_one(config, tmp_path):
    one = replace(config, output=str(tmp_path / "one"), lora_rank=4, learning_rate=2e-2)
    expected = recover(one).run_directory
    done = run_worker("recover", asdict(replace(one, output=str(tmp_path / "two"))), tmp_path / "c.json")
    assert done.returncode == 0, done.stderr[-12000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(expected), rel=1e-5)
    # The first step of Adam is as long for the smallest gradient, whose sign is rounding.
    same_weights(tmp_path / "two", expected, rtol=1e-3, atol=1e-3)


def test_one_rank_killed_and_resumed_by_one_process_and_by_two(config, alone, together, tmp_path):
    import shutil

    killed = replace(config, output=str(tmp_path / "killed"))
    done = run_worker("recover", asdict(killed), tmp_path / "c.json", 1, 5)
    assert done.returncode != 0
    assert not (tmp_path / "killed" / "model").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "two")
    recover(replace(killed, resume=True))
    two = asdict(replace(config, output=str(tmp_path / "two"), resume=True))
    done = run_worker("recover", two, tmp_path / "c.json")
    assert done.returncode == 0, done.stderr[-12000:]
    assert losses(tmp_path / "two") == losses(together["full"][1])  # to the bit, as if nothing had happened
    for name in ("killed", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(alone.run_directory), rel=1e-5)
        same_weights(tmp_path / name, alone.run_directory, rtol=1e-4, atol=1e-5)


def test_accel_of_two_processes_makes_the_plans_of_one(config, tmp_path):
    """With moments that each rank gathers for its part; killed in the second stage and resumed."""
    shared = (
        "data",
        "sequence_length",
        "batch_size",
        "micro_batch_size",
        "learning_rate",
        "loggers",
        "device",
    )
    settings = AccelConfig(
        model=config.model,
        target=0.85,
        output=str(tmp_path / "alone"),
        stages=2,
        prune={"calibration": config.data, "num_sequences": 4, "sequence_length": 32, "device": "cpu"},
        recover={name: getattr(config, name) for name in shared}
        | {"tokens": config.tokens, "eval_tokens": 256, "save_steps": 1},
    )
    expected = accel(settings).run_directory
    two = asdict(replace(settings, output=str(tmp_path / "two"), resume=True))
    assert run_worker("accel", two, tmp_path / "c.json", 1, 2).returncode != 0
    done = run_worker("accel", two, tmp_path / "c.json")
    assert done.returncode == 0, done.stderr[-12000:]
    for stage in ("01", "02"):
        ours, theirs = (
            PruningPlan.load(run / "stages" / stage / "prune" / "plan.json")
            for run in (tmp_path / "two", expected)
        )
        for own, other in zip(ours.keep_indices, theirs.keep_indices, strict=True):
            assert all(np.array_equal(own[kind], other[kind]) for kind in other)
        assert losses(tmp_path / "two" / "stages" / stage / "recover") == pytest.approx(
            losses(expected / "stages" / stage / "recover"), rel=1e-5
        )
    same_weights(tmp_path / "two", expected, rtol=1e-4, atol=1e-5)
