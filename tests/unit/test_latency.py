"""Latency as a target: with a clock that knows the widths, and once on a real one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from adapt_pruner import PruneConfig, latency, prune, summarize
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.engines.in_memory import InMemoryEngine


def pretended_seconds(model, inputs):
    """Time that is not linear in the widths: the fit is off, by more the more is gone."""
    total = 2e-4
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj.weight"):
            total += 1e-5 * parameter.shape[1] ** 1.2
        if name.endswith("k_proj.weight"):
            total += 4e-5 * parameter.shape[0] ** 0.8
    return total


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(latency, "forward_seconds", pretended_seconds)


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(**changes):
        options = {
            "model": str(tiny_models["qwen2"]), "output": str(tmp_path / "run"), "method": "magnitude",
            "calibration": str(calibration_file), "num_sequences": 4, "sequence_length": 16,
            "micro_batch_size": 4, "iterations": 8, "device": "cpu", **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


def pretended_ratio(result, base):
    after, before = (AutoModelForCausalLM.from_pretrained(d) for d in (result.model_directory, base))
    return pretended_seconds(after, None) / pretended_seconds(before, None)


@pytest.mark.parametrize("target", [0.85, 0.5])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # in one round
        {"method": "adapt-pruner"},
        {"method": "random", "allocation": "global"},
        {"mlp_rate": 0.0, "target_latency": 0.9},
    ],
)
def test_the_measured_time_is_met_and_not_needlessly_undercut(clock, settings, tiny_models, target, changes):
    result = prune(settings(**{"target_latency": target} | changes))
    target = changes.get("target_latency", target)
    ratio = pretended_ratio(result, tiny_models["qwen2"])
    assert 0.9 * target <= ratio <= target
    reported = result.metrics["resources"]["latency"]
    assert reported["after"] / reported["before"] == pytest.approx(ratio, rel=1e-6)
    assert reported["target"] / reported["before"] == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "adapt-pruner"])
def test_beside_a_tighter_target_it_asks_for_no_more(clock, settings, tiny_models, method, tmp_path):
    alone = prune(settings(target=0.7, method=method, output=str(tmp_path / "alone")))
    ratio = pretended_ratio(alone, tiny_models["qwen2"])
    result = prune(settings(target=0.7, target_latency=min(1.0, ratio * 1.2), method=method))
    assert 0 <= result.metrics["parameters_below_target"] < 150
    time = result.metrics["resources"]["latency"]
    assert time["after"] <= time["target"]


def test_costs_of_units_are_fitted(monkeypatch, tiny_models):
    def linear(model, inputs):
        shapes = {name: p.shape for name, p in model.named_parameters()}
        channels = sum(s[1] for name, s in shapes.items() if name.endswith("down_proj.weight"))
        rows = sum(s[0] for name, s in shapes.items() if name.endswith("k_proj.weight"))
        return 1e-3 + 2e-6 * channels + 3e-6 * rows

    monkeypatch.setattr(latency, "forward_seconds", linear)
    engine = InMemoryEngine(open_checkpoint(tiny_models["qwen2"]), device="cpu")
    budget = engine.budget(tuple({"kv_group": 4, "channel": 88} for _ in range(4)))
    fitted = latency.fit_unit_costs(engine, budget, torch.zeros(1, 4, dtype=torch.int64))
    assert len(fitted) == 4
    assert fitted[0] == {
        "kv_group": pytest.approx(30e-6 * 1e12, rel=1e-6),
        "channel": pytest.approx(2e-6 * 1e12, rel=1e-6),
    }
    assert engine.num_parameters == summarize(tiny_models["qwen2"]).parameters  # nothing of it was touched


def test_an_interrupted_run_goes_on_with_what_was_measured(clock, monkeypatch, settings, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(report):
        raise Interrupted

    whole = prune(settings(target_latency=0.6, method="adapt-pruner"))
    changes = {"target_latency": 0.6, "method": "adapt-pruner", "output": str(tmp_path / "again")}
    with pytest.raises(Interrupted):
        prune(settings(**changes), on_iteration=interrupt)
    saved = json.loads((tmp_path / "again" / "state" / "progress.json").read_text())["latency"]
    assert saved["amount"] < saved["before"]
    # Another machine, twice as fast: ratios are the same, what the state has is not measured again.
    monkeypatch.setattr(latency, "forward_seconds", lambda *a: pretended_seconds(*a) / 2)
    again = prune(settings(resume=True, **changes))
    for name in ("plan.json", "model/model.safetensors"):
        assert (again.run_directory / name).read_bytes() == (whole.run_directory / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_latency": "1s"}, r"target_latency is 1000\.000 ms, the model takes .* ms: expected less"),
        ({"target_latency": 0.01}, r"ms stay when all units that may go and take time are gone"),
        ({"target_latency": 20}, "target_latency is 20, expected a fraction in .* or a time such as 50ms"),
    ],
)
def test_a_time_that_cannot_be_met_is_refused(clock, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        prune(settings(**changes))


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine measure its other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_real_model_becomes_as_fast_as_asked(one_thread, tmp_path, tokenizer, calibration_file):
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    make_model("mistral", **shape).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    target, seen = 0.7, []
    # Other work disturbs the run and this check alike: one undisturbed pair is enough.
    for attempt in range(3):
        config = PruneConfig(
            str(tmp_path / "model"), output=str(tmp_path / f"run{attempt}"), target_latency=target,
            latency_tokens=64, method="magnitude", calibration=str(calibration_file), num_sequences=2,
            sequence_length=16, device="cpu",
        )  # fmt: skip
        directories = (tmp_path / "model", prune(config).model_directory)
        models = [AutoModelForCausalLM.from_pretrained(d).eval() for d in directories]
        seconds = latency.measure(models, torch.randint(280, (1, 64)))
        seen.append(float(np.median(seconds[:, 1] / seconds[:, 0])))
        if 0.9 * target <= seen[-1] <= 1.1 * target:
            return
    raise AssertionError(f"measured {seen}, the target is {target}")
