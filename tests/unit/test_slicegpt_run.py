"""`prune --method slicegpt` on tiny models: budgets, files, resuming, what is refused, other commands."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from adapt_pruner import EvaluateConfig, PruneConfig, PruningPlan, cli, evaluate, prune, summarize
from adapt_pruner.config import InspectConfig
from adapt_pruner.inspection import inspect_model
from adapt_pruner.slicegpt import MODEL_TYPES

ONE_DIMENSION = 2 * 280 + 600  # of the embedding and head, or of a block with its rotations, or less


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(family="qwen2", **changes):
        options = {
            "model": str(tiny_models[family]), "target": 0.7, "output": str(tmp_path / "run"),
            "method": "slicegpt", "calibration": str(calibration_file), "num_sequences": 8,
            "sequence_length": 16, "micro_batch_size": 3, "device": "cpu", **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


def bytes_of(result):
    return {file.name: file.read_bytes() for file in result.model_directory.iterdir()}


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("target_of", ["all", "non-embedding"])
def test_lands_on_the_target_and_loads(settings, tiny_models, family, target_of):
    result = prune(settings(family, target_of=target_of))
    before, after = summarize(tiny_models[family]), summarize(result.model_directory)
    count = "parameters" if target_of == "all" else "non_embedding_parameters"
    below = int(0.7 * getattr(before, count)) - getattr(after, count)
    assert 0 <= below < ONE_DIMENSION
    metrics = result.metrics
    assert below == metrics["parameters_below_target"] == metrics["parameters_target"] - after.parameters
    assert metrics["parameters_after"] == after.parameters
    assert metrics["non_embedding_after"] == after.non_embedding_parameters
    assert metrics["non_embedding_before"] == before.non_embedding_parameters
    assert max(metrics["hidden_widths_after"]) - min(metrics["hidden_widths_after"]) <= 1
    assert max(metrics["hidden_widths_after"]) < 48 == metrics["hidden_size_before"]
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert model.num_parameters() == after.parameters
    assert model.config.sliced_widths == metrics["hidden_widths_after"]
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_the_run_directory_has_what_those_of_other_methods_have(settings):
    reports = []
    result = prune(settings(), on_iteration=reports.append)
    names = {file.name for file in result.run_directory.iterdir()}
    assert names >= {"config.yaml", "environment.json", "log.jsonl", "metrics.json", "iterations", "model"}
    assert not names & {"plan.json", "state"}
    assert result.plan is None
    record = json.loads((result.run_directory / "iterations" / "001.json").read_text())
    (report,) = reports
    assert (report.iteration, report.loss) == (1, record["loss"])
    assert report.parameters == record["parameters"] <= report.parameters_target
    assert [p["width"] for p in record["positions"]] == record["hidden_widths"]
    assert [p["position"] for p in record["positions"]][:4] == [
        "embedding", "layer 0 attention", "layer 0 mlp", "layer 1 attention"
    ]  # fmt: skip
    for position in record["positions"]:
        values = position["eigenvalues"]
        assert values["first"] >= values["median"] >= values["last_kept"] >= values["last"]
        assert 0.5 < position["kept_variance"] <= 1 + 1e-9
    settings_saved = yaml.safe_load((result.run_directory / "config.yaml").read_text())
    assert (settings_saved["method"], settings_saved["estimator"]) == ("slicegpt", None)
    events = [json.loads(line)["event"] for line in (result.run_directory / "log.jsonl").open()]
    assert events == ["started", "iteration", "finished"]
    assert (result.model_directory / "tokenizer.json").exists()


def test_a_killed_run_resumes_with_the_same_bytes(settings, tmp_path, monkeypatch):
    whole = prune(settings())

    def interrupt(report):
        raise KeyboardInterrupt

    config = settings(output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        prune(config, on_iteration=interrupt)
    with pytest.raises(FileExistsError, match="--resume goes on with the run in it"):
        prune(config)
    with pytest.raises(ValueError, match="seed is 1, the run was started with 0"):
        prune(dataclasses.replace(config, seed=1, resume=True))
    resume = dataclasses.replace(config, resume=True)
    monkeypatch.setattr("adapt_pruner.slicegpt_run.copy_side_files", interrupt_copy)
    with pytest.raises(KeyboardInterrupt):
        prune(resume)  # the weights are written, the model is not there yet
    assert not (tmp_path / "again" / "model").exists()
    monkeypatch.undo()
    resumed = prune(resume)
    assert bytes_of(resumed) == bytes_of(whole)
    assert prune(resume) == resumed  # finished: nothing is done
    other = prune(settings(seed=1, output=str(tmp_path / "other")))
    assert bytes_of(other)["model.safetensors"] != bytes_of(whole)["model.safetensors"]


def interrupt_copy(source, target):
    raise KeyboardInterrupt


def test_directions_that_the_text_never_takes_go_first(settings):
    """The text has 14 words, with few letters: they span few directions of the embedding, and those stay."""
    record = json.loads((prune(settings()).run_directory / "iterations" / "001.json").read_text())
    assert record["positions"][0]["kept_variance"] > 0.999


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("estimator", "wanda"),
        ("allocation", "uniform"),
        ("gqa_credit", "owner"),
        ("protected_layers", "0"),
        ("granularity", "kv_group"),
        ("compensation", "none"),
        ("gradients", "materialised"),
        ("round_to", 8),
        ("mlp_granularity", "expert"),
    ],
)
def test_settings_about_units_are_refused(settings, tmp_path, option, value):
    with pytest.raises(ValueError, match=f"slicegpt removes dimensions .* no {{'{option}': {value!r}}}"):
        prune(settings(**{option: value}))
    assert not (tmp_path / "run").exists()


def test_targets_that_slicing_cannot_meet_are_refused(settings, tmp_path):
    for target, relation in ((1000, "below what hidden states of one dimension leave"), ("1M", "above the")):
        with pytest.raises(ValueError, match=f"parameters, {relation}.*: expected [\\d,]+ to [\\d,]+$"):
            prune(settings(target=target))
    assert not (tmp_path / "run").exists()


def test_keeping_everything_still_slices_because_rotations_and_the_head_count(settings):
    result = prune(settings(target=1.0))
    assert max(result.metrics["hidden_widths_after"]) < 48
    assert result.metrics["parameters_after"] <= result.metrics["parameters_before"]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_sandwich_norms_are_refused(settings, tmp_path, family):
    with pytest.raises(ValueError, match="has norms between its blocks and the residual stream"):
        prune(settings(family))
    assert not (tmp_path / "run").exists()


def test_pruned_and_sliced_models_are_not_sliced(settings, tmp_path):
    pruned = prune(settings(method="adapt-pruner", iterations=4, output=str(tmp_path / "pruned")))
    with pytest.raises(ValueError, match="model_type is 'adapt_qwen2', which slicegpt cannot slice"):
        prune(settings(model=str(pruned.model_directory)))
    sliced = prune(settings())
    for method in ("slicegpt", "adapt-pruner"):
        with pytest.raises(ValueError, match="model_type is 'sliced_qwen2'"):
            prune(settings(model=str(sliced.model_directory), method=method, output=str(tmp_path / "b")))


def test_iterations_are_ignored_aloud_and_few_tokens_are_warned_of(settings, caplog):
    caplog.set_level("INFO", logger="adapt_pruner")
    with pytest.warns(UserWarning, match="2 sequences of 16 tokens are fewer than the 48 dimensions"):
        prune(settings(num_sequences=2, iterations=7))
    assert "slicegpt prunes in one shot: iterations 7 is ignored" in caplog.text


def test_a_dtype_of_ones_own(settings):
    result = prune(settings(dtype="bf16"))
    assert summarize(result.model_directory).dtype == "BF16"


def test_the_other_commands(settings, tiny_models, calibration_file, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["prune", tiny_models["llama"], "--target", "0.7", "--output", run]
    arguments += ["--method", "slicegpt", "--calibration", calibration_file]
    arguments += ["--num-sequences", "4", "--sequence-length", "16"]
    assert cli.main([str(a) for a in arguments]) == 0
    assert "parameters below the target after 1 iterations" in capsys.readouterr().out
    assert cli.main([str(a) for a in [*arguments, "--resume", "--json"]]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["plan_hash"], shown["iterations"]) == (None, 1)
    result = evaluate(EvaluateConfig(str(run), str(calibration_file), context=32, max_tokens=200))
    assert 1 < result.perplexity.perplexity < 10_000
    assert result.parameters == shown["parameters_after"]
    after, before = inspect_model(InspectConfig(str(run), base=str(tiny_models["llama"])))
    assert (after.model_type, before.model_type) == ("sliced_llama", "llama")
    assert [layer.widths for layer in after.layers] == [layer.widths for layer in before.layers]
    assert after.parameters == shown["parameters_after"]
    widths = shown["hidden_widths_after"]
    attention = 4 * 80 * 1024
    assert after.layers[0].flops_per_token == attention + 2 * (
        (80 + 2 * 40) * widths[0] + (80 + 2 * 88) * widths[1] + 88 * widths[2]
        + widths[0] * widths[1] + widths[1] * widths[2]
    )  # fmt: skip
    with pytest.raises(ValueError, match="method rotates hidden states"):
        PruningPlan.load(run)
    assert cli.main(["apply", str(run), str(tiny_models["llama"]), "--output", str(tmp_path / "x")]) == 1
    assert "no plan.json" in capsys.readouterr().err
