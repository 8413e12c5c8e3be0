"""Recovery training in one process: learns, resumes to the same loss, stops when it diverges."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from adapt_pruner.config import MissingSetting
from adapt_pruner.recovery.config import RecoverConfig
from adapt_pruner.recovery.recover import recover
from adapt_pruner.recovery.trainer import Diverged


@pytest.fixture(scope="module")
def config(tiny_models, calibration_file, tmp_path_factory) -> RecoverConfig:
    return RecoverConfig(
        model=str(tiny_models["llama"]),
        output=str(tmp_path_factory.mktemp("runs") / "run"),
        data=str(calibration_file),
        tokens=6 * 8 * 32,
        sequence_length=32,
        batch_size=8,
        micro_batch_size=4,
        learning_rate=1e-3,
        save_steps=2,
        eval_steps=3,
        eval_tokens=256,
    )


@pytest.fixture(scope="module")
def whole_run(config):
    return recover(config)


def _log(result, key):
    lines = [json.loads(line) for line in (result.run_directory / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_run(config, whole_run):
    losses = _log(whole_run, "loss")
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert whole_run.metrics["tokens"] == 6 * 8 * 32
    evaluated = _log(whole_run, "eval_loss")
    assert len(evaluated) == 4  # before, in the middle, behind the last step, and for the metrics
    assert whole_run.metrics["held_out_loss_before"] == evaluated[0]
    assert whole_run.metrics["held_out_loss"] == evaluated[-1] < evaluated[0] - 0.1
    assert all(rate > 0 for rate in _log(whole_run, "mfu"))
    assert not (whole_run.run_directory / "checkpoints").exists()
    assert list((whole_run.run_directory / "tensorboard").glob("events.out.*"))
    assert json.loads((whole_run.model_directory / "config.json").read_text())["use_cache"] is True
    model = AutoModelForCausalLM.from_pretrained(whole_run.model_directory)
    assert model.dtype == torch.float32
    rates = _log(whole_run, "learning_rate")
    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)  # a tenth


class _Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_killed_and_resumed(config, whole_run, tmp_path, step):
    killed = replace(config, output=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        recover(killed, callbacks=[_Kill(step)])
    assert not (tmp_path / "killed" / "model").exists()
    result = recover(replace(killed, resume=True))
    by_step = {}
    for line in (result.run_directory / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            by_step[entry["step"]] = entry["loss"]
    assert list(by_step.values()) == _log(whole_run, "loss")
    ours, theirs = (load_file(r.model_directory / "model.safetensors") for r in (result, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_was_half_written_is_written_again(config, whole_run, tmp_path):
    killed = replace(config, output=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        recover(killed, callbacks=[_Kill(5)])
    (tmp_path / "killed" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    result = recover(replace(killed, resume=True))
    ours, theirs = (load_file(r.model_directory / "model.safetensors") for r in (result, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _quick(config, tmp_path, **changes):
    return replace(config, output=str(tmp_path / "run"), tokens=3 * 8 * 32, eval_steps=0, **changes)


def test_diverged(config, tmp_path):
    with pytest.raises(Diverged, match=r"the loss at step \d is .*, expected at most 1.1 times"):
        recover(_quick(config, tmp_path, learning_rate=30.0, max_loss_ratio=1.1))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("rate", [1e30, 100.0])
def test_diverged_in_the_last_step(config, tmp_path, rate):
    """Which no training loss shows any more."""
    one_step = replace(_quick(config, tmp_path, learning_rate=rate, min_learning_rate=rate), tokens=8 * 32)
    with pytest.raises(Diverged, match=r"the held-out loss at step 1 is "):
        recover(one_step)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_gradient_that_is_not_finite_goes_into_no_weight(config, tmp_path):
    class _Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **more):
            raise AssertionError("this is too late")

        def on_step_begin(self, args, state, control, model=None, **more):
            next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(Diverged, match="the norm of the gradients at step 1 is"):
        recover(_quick(config, tmp_path), callbacks=[_Break()])


def test_nothing_is_saved_that_was_not_found_sound(config, tmp_path):
    class _Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **more):
            if state.global_step == 1:
                with torch.no_grad():
                    next(model.parameters())[:] = float("nan")

    with pytest.raises(Diverged, match="the norm of the gradients at step 2 is nan"):
        recover(_quick(config, tmp_path, log_steps=100, save_steps=1), callbacks=[_Break()])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_distillation_pulls_towards_the_teacher(config, tiny_models, tmp_path, whole_run):
    """From a trained student back to its teacher: the divergence falls."""
    result = recover(
        replace(
            _quick(config, tmp_path), model=str(whole_run.model_directory), teacher=config.model, alpha=1.0
        )
    )
    divergence = _log(result, "divergence")
    assert divergence[0] > 0
    assert divergence[-1] < divergence[0]
    assert _log(result, "loss") == pytest.approx(divergence)


def test_bf16_and_gradient_checkpointing_follow_fp32(config, tmp_path, whole_run):
    result = recover(_quick(config, tmp_path, precision="bf16", gradient_checkpointing=True))
    exact = recover(replace(_quick(config, tmp_path), output=str(tmp_path / "exact")))
    losses, expected = _log(result, "loss"), _log(exact, "loss")
    assert losses != expected
    assert losses == pytest.approx(expected, rel=2e-2)


def test_lora(config, tiny_models, tmp_path):
    result = recover(_quick(config, tmp_path, lora_rank=4, learning_rate=2e-2))
    losses = _log(result, "loss")
    assert losses[-1] < losses[0]
    before, after = (
        load_file(path / "model.safetensors") for path in (tiny_models["llama"], result.model_directory)
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}


def test_held_out_loss_does_not_depend_on_the_batch(config, tmp_path):
    """Also where the held-out sequences do not fill one."""
    few = replace(_quick(config, tmp_path), tokens=8 * 32, eval_tokens=3 * 32)
    found = []
    for size in (1, 2, 4, 8):
        run = recover(replace(few, output=str(tmp_path / str(size)), micro_batch_size=size))
        found.append(run.metrics["held_out_loss"])
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


def test_what_is_left_of_a_run_that_was_killed_behind_its_model(config, tmp_path):
    run = recover(_quick(config, tmp_path)).run_directory
    (run / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    recover(replace(_quick(config, tmp_path), resume=True))
    assert not (run / "checkpoints").exists()


def test_parts_of_the_loss_after_a_resume(config, tmp_path, whole_run):
    taught = replace(
        _quick(config, tmp_path), model=str(whole_run.model_directory), teacher=config.model, save_steps=1
    )
    expected = _log(recover(taught), "cross_entropy")
    killed = replace(taught, output=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        recover(killed, callbacks=[_Kill(2)])
    result = recover(replace(killed, resume=True))
    assert _log(result, "cross_entropy")[-1] == expected[-1]


def test_command_shows_the_loss_on_stderr(config, tmp_path):
    """As a process of its own: the verbosity of transformers is read when it is imported."""
    settings = _quick(config, tmp_path, loggers="none")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(asdict(settings)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "adapt_pruner",
            "recover",
            "--config",
            str(tmp_path / "settings.yaml"),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(done.stdout)["steps"] == 3
    assert done.stderr.count("'loss'") == 3


def test_streaming(config, tmp_path):
    from tiny import make_text

    rows = tmp_path / "text.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in make_text().split("\n\n")))
    result = recover(_quick(config, tmp_path, data=str(rows), streaming=True))
    assert len(_log(result, "loss")) == 3


def test_arguments_reach_the_trainer(config, tmp_path):
    result = recover(_quick(config, tmp_path, arguments={"adam_beta2": 0.5}))
    other = recover(replace(_quick(config, tmp_path), output=str(tmp_path / "other")))
    assert _log(result, "loss")[:2] == _log(other, "loss")[:2]
    assert _log(result, "loss")[2] != _log(other, "loss")[2]
    assert not (result.run_directory / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": ""}, MissingSetting, "output is missing"),
        ({"micro_batch_size": 3}, ValueError, r"micro_batch_size is 3, expected a divisor of 8"),
        ({"min_learning_rate": 1.0}, ValueError, r"min_learning_rate is 1.0, expected within 0 and 0.001"),
        ({"tokens": "many"}, ValueError, r"tokens is 'many', expected a count such as"),
        ({"tokens": 32}, ValueError, r"tokens, 32, makes 1 sequences of 32 tokens, expected at least 8"),
        ({"tokens": None, "streaming": True}, ValueError, "tokens is None, expected given with streaming"),
        ({"schedule": "linear"}, ValueError, r"schedule is 'linear', expected one of"),
        ({"arguments": {"warmth": 1}}, ValueError, "arguments has warmth, which TrainingArguments"),
        (
            {"arguments": {"output_dir": "x"}},
            ValueError,
            "arguments has output_dir, expected none that other",
        ),
        ({"arguments": {"fsdp": "full_shard"}}, ValueError, "arguments has fsdp, expected none that other"),
        ({"arguments": {"warmup_steps": 4}}, ValueError, "arguments has warmup_steps, expected none that"),
        ({"arguments": {"adam_beta1": "x"}}, ValueError, "arguments has adam_beta1 'x', expected a number"),
        ({"loggers": "wandb"}, ValueError, "loggers is 'wandb': .*[Rr]equires wandb"),
        ({"arguments": {"optim": "adafactor"}}, ValueError, "arguments has optim 'adafactor', expected"),
        ({"loggers": "nonsense"}, ValueError, "nonsense"),
        (
            {"sequence_length": 512, "eval_tokens": 512},
            ValueError,
            "512, but the model has only 256 positions",
        ),
        ({"data": "nowhere.txt"}, ValueError, "'nowhere.txt' does not exist"),
        ({"streaming": True}, ValueError, "cannot be streamed"),
    ],
)
def test_bad_settings_write_nothing(config, tmp_path, changes, error, message):
    settings = {"output": str(tmp_path / "run"), **changes}
    with pytest.raises(error, match=message):
        recover(replace(config, **settings))
    assert list(tmp_path.iterdir()) == []


def test_teacher_of_another_vocabulary(config, tmp_path):
    from tiny import make_model

    make_model("llama", vocab_size=300).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="has a vocabulary of 300, expected the 280 entries"):
        recover(replace(config, output=str(tmp_path / "run"), teacher=str(tmp_path / "teacher")))
    assert not (tmp_path / "run").exists()
