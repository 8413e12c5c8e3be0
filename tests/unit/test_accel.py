"""Adapt-Accel on a tiny model: stages, carried sparsity and moments, and runs that are killed on the way."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from adapt_pruner.adapt_accel import accel, plan_stages
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.cli import main
from adapt_pruner.plan import PruningPlan
from adapt_pruner.recovery.config import AccelConfig
from adapt_pruner.recovery.estimate import estimate_accel
from adapt_pruner.recovery.trainer import Diverged

STEPS = 6  # of all stages
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def config(tiny_models, calibration_file, tmp_path_factory) -> AccelConfig:
    return AccelConfig(
        model=str(tiny_models["llama"]),
        target=0.8,
        output=str(tmp_path_factory.mktemp("runs") / "run"),
        stages=3,
        prune={
            "calibration": str(calibration_file),
            "num_sequences": 4,
            "sequence_length": 32,
            "iterations": 20,
            "device": "cpu",
        },
        recover={
            "data": str(calibration_file),
            "tokens": STEPS * 8 * 32,
            "sequence_length": 32,
            "batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "eval_tokens": 256,
            "loggers": "none",
            "device": "cpu",
        },
    )


@pytest.fixture(scope="module")
def whole_run(config):
    return accel(config)


def _losses(run):
    losses = {}
    for log in sorted(run.glob("stages/*/recover/log.jsonl")):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                losses[log.parts[-3], entry["step"]] = entry["loss"]
    return losses


def test_stages(config):
    setup, stages = plan_stages(config, open_checkpoint(config.model))
    assert [len(stage.examples) for stage in stages] == [8, 16, 24]  # linear
    assert [stage.first_step for stage in stages] == [0, 1, 3]
    assert {stage.total_steps for stage in stages} == {STEPS}
    targets = [setup.budget.num_parameters, *(stage.target for stage in stages)]
    assert targets[-1] == setup.target
    removed = [a - b for a, b in itertools.pairwise(targets)]
    assert max(removed) - min(removed) <= 1


def test_run(config, whole_run):
    stages = whole_run.metrics["stages"]
    _, planned = plan_stages(config, open_checkpoint(config.model))
    for line, stage in zip(stages, planned, strict=True):
        assert 0 <= stage.target - line["parameters"] < 500  # less than a unit
    model = AutoModelForCausalLM.from_pretrained(whole_run.model_directory)
    assert model.num_parameters() == whole_run.metrics["parameters_after"] == stages[-1]["parameters"]
    assert whole_run.metrics["tokens"] == STEPS * 8 * 32
    assert sum(stage["steps"] for stage in stages) == STEPS
    assert whole_run.metrics["best_stage"] in (1, 2, 3)
    rates = [
        json.loads(line)["learning_rate"]
        for log in sorted(whole_run.run_directory.glob("stages/*/recover/log.jsonl"))
        for line in log.read_text().splitlines()
        if "learning_rate" in line
    ]
    assert rates[0] == rates[-2] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)  # one schedule over all stages
    assert not list(whole_run.run_directory.glob("stages/*/prune/model"))
    assert not list(whole_run.run_directory.glob("stages/*/recover/training_state"))


def test_sparsity_is_carried_on(whole_run):
    """What a layer has lost counts from the model before all stages."""
    last = [
        json.loads(
            sorted((whole_run.run_directory / f"stages/{k:02}/prune/iterations").iterdir())[-1].read_text()
        )
        for k in (1, 2, 3)
    ]
    sparsity = torch.tensor([record["sparsity"] for record in last])
    assert (sparsity[1:] >= sparsity[:-1] - 1e-9).all()
    channels = torch.tensor([[layer["channel"] for layer in record["units"]] for record in last])
    share_lost = 1 - channels[-1] / 88
    assert share_lost.sum() == pytest.approx(float(sparsity[-1].sum()), abs=0.1)


def test_moments_are_gathered_as_the_weights_are(config, tmp_path, monkeypatch):
    """The first step of the second stage begins with the moments of the first one's units that stay."""
    seen = {}

    class _Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **more):
            stage = args.output_dir.split("/")[-3]
            names = {id(p): n for n, p in model.named_parameters()}
            seen[stage, "begin"] = {
                names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()
            }

        def on_train_end(self, args, state, control, model=None, optimizer=None, **more):
            stage = args.output_dir.split("/")[-3]
            names = {id(p): n for n, p in model.named_parameters()}
            seen[stage, "end"] = {
                names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()
            }

    result = accel(replace(config, output=str(tmp_path / "run"), stages=2), callbacks=[_Look()])
    assert seen["01", "begin"] == {}
    plan = PruningPlan.load(result.run_directory / "stages/02/prune/plan.json")
    keep = torch.from_numpy(plan.keep_indices[1]["channel"])
    assert len(keep) < plan.initial_units[1]["channel"]
    before, after = seen["01", "end"], seen["02", "begin"]
    for moment in ("exp_avg", "exp_avg_sq"):
        for layer, dim in (("up_proj", 0), ("gate_proj", 0), ("down_proj", 1)):
            name = f"model.layers.1.mlp.{layer}.weight"
            expected = before[name][moment].index_select(dim, keep)
            assert torch.equal(after[name][moment], expected)
        name = "model.embed_tokens.weight"
        assert torch.equal(after[name][moment], before[name][moment])
    assert {float(state["step"]) for state in after.values()} == {2.0}

    reset = accel(replace(config, output=str(tmp_path / "reset"), stages=2, optimizer_state="reset"))
    first, second = (_losses(run.run_directory) for run in (result, reset))
    assert first["02", 1] == second["02", 1]
    assert first["02", 3] != second["02", 3]


class _Kill(TrainerCallback):
    def __init__(self, stage, step):
        self.stage, self.step = f"{stage:02}", step

    def on_step_end(self, args, state, control, **more):
        if self.stage in args.output_dir.split("/") and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "step"), [(1, 1), (2, 1), (3, 2)])
def test_killed_and_resumed(config, whole_run, tmp_path, stage, step):
    killed = replace(config, output=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        accel(killed, callbacks=[_Kill(stage, step)])
    assert not (tmp_path / "run" / "model").exists()
    result = accel(replace(killed, resume=True))
    assert _losses(result.run_directory) == _losses(whole_run.run_directory)
    ours, theirs = (load_file(r.model_directory / "model.safetensors") for r in (result, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_killed_between_stages(config, whole_run, tmp_path):
    iterations = []

    def kill(report):
        iterations.append(report)
        if len(iterations) == 3:  # in the pruning of a later stage
            raise KeyboardInterrupt

    killed = replace(config, output=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        accel(killed, on_iteration=kill)
    faster = {**config.recover, "learning_rate": 1e-2}
    with pytest.raises(ValueError, match=r"recover.learning_rate is 0.01, the run was started with 0.001"):
        accel(replace(killed, resume=True, recover=faster))
    rarely = {**config.recover, "save_steps": 7}
    result = accel(replace(killed, resume=True, recover=rarely))
    assert _losses(result.run_directory) == _losses(whole_run.run_directory)


def test_a_stage_that_diverges_leaves_the_ones_before(config, tmp_path):
    class _Break(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **more):
            if "02" in args.output_dir.split("/"):
                with torch.no_grad():
                    next(model.parameters())[:] = float("nan")

    with pytest.raises(Diverged, match="the held-out loss at step 0 is nan"):
        accel(replace(config, output=str(tmp_path / "run")), callbacks=[_Break()])
    assert (tmp_path / "run" / "stages" / "01" / "recover" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 0}, "stages is 0, expected at least 1"),
        ({"stages": 7}, "6 batches of 8; 7 stages need at least"),
        ({"split": "square"}, "split is 'square', expected one of"),
        ({"target": "half"}, "target is 'half', expected"),
        ({"target": 0.01}, "target 0.01 of all is .* parameters, below what"),
        ({"prune": {"outptu": "x"}}, "prune has outptu, expected some of"),
        ({"recover": {"streaming": True, "tokens": 4096}}, "recover.streaming is True, expected false"),
        ({"recover": {"micro_batch_size": 5}}, "micro_batch_size is 5, expected a divisor of 128"),
        ({"prune": {"target_kv_cache": 0.5}}, "prune has target_kv_cache, expected some of"),
        ({"prune": {"method": "slicegpt"}}, "prune.method is 'slicegpt', expected one that removes units"),
        ({"prune": {"method": "shortgpt"}}, "optimizer_state is 'keep', expected 'reset' where whole layers"),
    ],
)
def test_bad_settings_write_nothing(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        accel(replace(config, output=str(tmp_path / "run"), **changes))
    assert list(tmp_path.iterdir()) == []


def test_moments_of_experts_are_refused(config, tiny_models, tmp_path):
    experts = replace(config, model=str(tiny_models["mixtral"]), output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="optimizer_state is 'keep', expected 'reset' where whole layers go"):
        accel(experts)
    assert list(tmp_path.iterdir()) == []


def test_moments_of_adapters_are_refused(config, tmp_path):
    adapters = replace(config, output=str(tmp_path / "run"), recover={**config.recover, "lora_rank": 2})
    with pytest.raises(ValueError, match="optimizer_state is 'keep', expected 'reset' with adapters"):
        accel(adapters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_settings(recipe):
    config = AccelConfig(**yaml.safe_load(recipe.read_text()), output="unused")
    assert config.recovery("model", "unused", False).token_budget() >= 10**5


def test_dry_run_says_what_the_run_then_does(config, whole_run):
    estimates = estimate_accel(replace(config, output="", dry_run=True))
    assert [e.steps for e in estimates] == [line["steps"] for line in whole_run.metrics["stages"]]
    assert [e.tokens for e in estimates] == [line["tokens"] for line in whole_run.metrics["stages"]]
    for estimate, line in zip(estimates, whole_run.metrics["stages"], strict=True):
        assert 0 <= estimate.parameters - line["parameters"] < 500
        assert estimate.pruning_minutes > 0
        assert estimate.training_minutes > 0
        weights = 16 * estimate.parameters
        assert weights < estimate.memory_bytes


def test_command_line(config, tmp_path, capsys, monkeypatch):
    """The settings file is the argument; what the line says overrides it."""
    monkeypatch.chdir(tmp_path)
    values = asdict(config) | {"stages": 2}
    del values["output"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["accel", "recipe.yaml", "--dry-run", "--json"]) == 0
    assert [line["stage"] for line in json.loads(capsys.readouterr().out)["stages"]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert main(["accel", "--output", "run", "--json", "recipe.yaml", "--target", "0.9"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["stages"]) == 2
    assert main(["inspect", "run"]) == main(["inspect", "run/stages/01/recover", "--json"]) == 0
    capsys.readouterr()
    assert result["parameters_after"] > 0.89 * 112_368
    assert main(["recover", "run", "--dry-run", "--data", config.recover["data"], "--batch-size", "8",
                 "--sequence-length", "32", "--json"]) == 0  # fmt: skip
    (line,) = json.loads(capsys.readouterr().out)["stages"]
    assert line["parameters"] == result["parameters_after"]
    with pytest.raises(SystemExit, match="2"):
        main(["accel", "missing.yaml", "--output", "other"])
