"""Pruning as two gloo processes that share a model: the bytes that one process writes, and clean failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import torchrun
from safetensors.torch import load_file, save_file
from tiny import make_model

from adapt_pruner.config import PruneConfig
from adapt_pruner.engines.sharded import require_supported
from adapt_pruner.families import layer_widths
from adapt_pruner.inspection import summarize
from adapt_pruner.pruner import prune
from adapt_pruner.scoring.estimators import ESTIMATORS, TAYLOR_FIRST

pytestmark = pytest.mark.timeout(600)
CASES = {
    "one-iteration": {"model": "llama", "iterations": 1},
    "tied": {"model": "llama"},
    "untied": {"model": "untied"},
    "qwen2": {"model": "qwen2", "allocation": "uniform"},
    "gemma3": {"model": "gemma3_text", "granularity": "query_head"},
    "fused-tensors": {"model": "phi3", "allocation": "global"},
    "magnitude": {"model": "mistral", "method": "magnitude", "allocation": "threshold"},
    # Three of eight channels per layer: some ranks have no row of a tensor.
    "smallest": {"model": "qwen2", "target": "floor"},
    "nothing": {"model": "qwen2", "target": 1.0},
}


@pytest.fixture(scope="module")
def models(tiny_models, tokenizer, tmp_path_factory) -> dict[str, Path]:
    untied = tmp_path_factory.mktemp("untied")
    make_model("llama", tied=False).save_pretrained(untied)
    tokenizer.save_pretrained(untied)
    return {**tiny_models, "untied": untied}


@pytest.fixture(scope="module")
def settings(models, calibration_file):
    """Of a case, as a dict; five sequences, so that the processes have two and three."""

    def make(case: dict, output: Path) -> dict:
        options = {
            "target": 0.7, "iterations": 10, "amplitude": 0.05, "num_sequences": 5, "sequence_length": 16,
            "micro_batch_size": 2, "device": "cpu", "calibration": str(calibration_file), **case,
            "model": str(models[case["model"]]), "output": str(output),
        }  # fmt: skip
        if options["target"] == "floor":
            with pytest.raises(ValueError, match="below what one unit per layer leaves") as error:
                prune(PruneConfig(**options | {"target": "2", "output": str(output / "none")}))
            floor = str(error.value).rpartition("expected ")[2].partition(" to")[0]
            options["target"] = floor.replace(",", "")
        return options

    return make


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """Directory of the runs of one process."""
    directory = tmp_path_factory.mktemp("one")
    for name, case in CASES.items():
        prune(PruneConfig(**settings(case, directory / name)))
    return directory


@pytest.fixture(scope="module")
def runs(settings, alone, tmp_path_factory) -> tuple[Path, Path]:
    """Directories of the runs of one process and of two."""
    two = tmp_path_factory.mktemp("two")
    path = two / "settings.json"
    path.write_text(json.dumps([settings(case, two / name) for name, case in CASES.items()]))
    done = torchrun("pruning_worker.py", "prune", path, timeout=500)
    assert done.returncode == 0, done.stderr[-12000:]
    assert done.stdout.count(" gathered at most ") == 2
    return alone, two


def bytes_of(run: Path) -> dict[str, bytes]:
    files = {"plan.json": run / "plan.json", **{p.name: p for p in (run / "model").iterdir()}}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_the_bytes_of_one(runs, case):
    ours, theirs = (bytes_of(directory / case) for directory in runs[::-1])
    assert ours.keys() == theirs.keys()
    assert json.loads(ours["plan.json"]) == json.loads(theirs["plan.json"])
    for name in theirs:
        assert ours[name] == theirs[name], name
    metrics, expected = (json.loads((d / case / "metrics.json").read_text()) for d in runs[::-1])
    for name in expected.keys() - {"seconds", "peak_memory_bytes", "calibration_loss"}:
        assert metrics[name] == expected[name]
    assert metrics["calibration_loss"] == pytest.approx(expected["calibration_loss"], rel=1e-5)


def test_log(runs):
    for directory, processes in zip(runs, (None, 2), strict=True):
        events = [json.loads(line) for line in (directory / "tied" / "log.jsonl").read_text().splitlines()]
        assert [e["event"] for e in events].count("started") == 1
        assert events[0].get("processes") == processes


SCORED = [
    {"model": "llama", "sequences": 5, "micro_batch_size": 2},
    {"model": "untied", "sequences": 3, "micro_batch_size": 1, "metric": "euclidean"},
    {"model": "qwen2", "sequences": 1, "micro_batch_size": 4, "gqa_credit": "modulo"},
    {"model": "gemma3_text", "sequences": 4, "micro_batch_size": 2, "granularity": "query_head"},
    {"model": "phi3", "sequences": 4, "micro_batch_size": 2, "metric": "manhattan"},
    {"model": "qwen2", "sequences": 2, "micro_batch_size": 4, "estimator": "magnitude_l2"},
    {"model": "phi3", "sequences": 2, "micro_batch_size": 4, "estimator": "magnitude_l1"},
    # Once half of the query heads are gone, the ranks part a fused tensor in the midst of its keys.
    {"model": "phi3", "sequences": 2, "micro_batch_size": 1, "granularity": "query_head"},
]


@pytest.fixture(scope="module")
def scores(models, tmp_path_factory) -> list[list]:
    directory = tmp_path_factory.mktemp("scores")
    cases = [{**case, "model": str(models[case["model"]])} for case in SCORED]
    (directory / "cases.json").write_text(json.dumps(cases))
    done = torchrun("pruning_worker.py", "scores", directory / "scores", directory / "cases.json")
    assert done.returncode == 0, done.stderr[-12000:]
    return [json.loads((directory / f"scores-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(SCORED)))
def test_scores_are_those_of_the_whole_model(scores, number):
    for ours in scores:
        alone, shared, alone_pruned, shared_pruned = ours[number]
        assert shared == pytest.approx(alone, rel=1e-5)
        assert shared_pruned == pytest.approx(alone_pruned, rel=1e-5)
        assert shared_pruned != shared
    assert scores[0][number][1::2] == scores[1][number][1::2]  # the very same on both ranks


def test_one_rank_killed_and_resumed(settings, alone, tmp_path):
    """With importance that is carried over from iteration to iteration, in the middle of one."""
    case = CASES["untied"]
    path = tmp_path / "settings.json"
    path.write_text(json.dumps([settings(case, tmp_path / "run")]))
    assert torchrun("pruning_worker.py", "prune", path, 3).returncode != 0
    assert len(list((tmp_path / "run" / "iterations").iterdir())) == 2
    assert not (tmp_path / "run" / "model").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    again = [settings(case, tmp_path / "run") | {"resume": True}]
    path.write_text(json.dumps(again * 2))  # the second time the run is complete
    done = torchrun("pruning_worker.py", "prune", path)
    assert done.returncode == 0, done.stderr[-12000:]
    assert bytes_of(tmp_path / "run") == bytes_of(alone / "untied")
    prune(PruneConfig(**settings(case, tmp_path / "alone") | {"resume": True}))
    assert bytes_of(tmp_path / "alone") == bytes_of(alone / "untied")


def test_what_fails_fails_on_all_ranks(settings, models, tmp_path):
    """Settings before the weights are read, weights before the directory is made."""
    for name, change in (("nan", lambda w: w[-1].fill_(float("nan"))), ("huge", lambda w: w.fill_(1e38))):
        shutil.copytree(models["llama"], tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        change(tensors["model.layers.2.mlp.up_proj.weight"])
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(models["llama"], tmp_path / "shape")
    tensors = load_file(tmp_path / "shape" / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "shape" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    llama = settings({"model": "llama"}, tmp_path / "run")
    cases = {
        "estimator is 'wanda'": {"estimator": "wanda"},
        "slicegpt": {"method": "slicegpt", "iterations": None},
        "mixture of experts": {"model": str(models["mixtral"])},
        "is not empty": {"output": str(tmp_path / "full")},
        "tensors do not fit the config": {"model": str(tmp_path / "shape")},
        "48 of 4224 values of model.layers.2.mlp.up_proj.weight": {"model": str(tmp_path / "nan")},
        "layer 2: the cosine": {"model": str(tmp_path / "huge"), "output": str(tmp_path / "begun")},
    }
    (tmp_path / "cases.json").write_text(json.dumps([llama | case for case in cases.values()]))
    done = torchrun("pruning_worker.py", "refused", tmp_path / "errors", tmp_path / "cases.json")
    assert done.returncode == 0, done.stderr[-12000:]
    assert not (tmp_path / "run").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    for rank in range(2):
        *errors, disagreement = json.loads((tmp_path / f"errors-{rank}.json").read_text())
        for expected, error in zip(cases, errors, strict=True):
            assert expected in error
        assert disagreement.startswith("RuntimeError: rank 1 has chosen other units")


RESOLVED = {
    "model": "-", "output": "-", "target": 0.8, "allocation": "adaptive", "granularity": "kv_group",
    "compensation": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"allocation": "search"}, "allocation is 'search', expected one of"),
        ({"allocation": "reference"}, "allocation is 'reference', expected one of"),
        ({"compensation": "least_squares"}, "compensation is 'least_squares', expected 'none'"),
        ({"gradients": "fused"}, "gradients is 'fused', expected 'auto' or 'materialised'"),
        ({"target_latency": 0.9}, "target_latency is 0.9, expected none"),
        ({"granularity": "layer"}, "granularity is 'layer', expected 'kv_group' or 'query_head'"),
    ],
)
def test_settings_that_processes_cannot_prune_together_with(models, change, named):
    widths = layer_widths(json.loads((models["llama"] / "config.json").read_text()))
    config = PruneConfig(**RESOLVED | change)
    with pytest.raises(ValueError, match=named):
        require_supported(config, TAYLOR_FIRST, widths)


def test_estimators_that_processes_cannot_prune_together_with(models):
    widths = layer_widths(json.loads((models["llama"] / "config.json").read_text()))
    config = PruneConfig(**RESOLVED)
    refused = []
    for estimator in ESTIMATORS:
        try:
            require_supported(config, estimator, widths)
        except ValueError:
            refused.append(estimator.name)
    assert len(refused) == len(ESTIMATORS) - 3
    assert not {"taylor_first", "magnitude_l1", "magnitude_l2"} & set(refused)


def test_bf16(settings, tmp_path):
    path = tmp_path / "settings.json"
    options = settings({"model": "qwen2", "dtype": "bf16"}, tmp_path / "run")
    path.write_text(json.dumps([options]))
    done = torchrun("pruning_worker.py", "prune", path)
    assert done.returncode == 0, done.stderr[-12000:]
    summary = summarize(tmp_path / "run" / "model")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert summary.dtype == "BF16"
    assert metrics["parameters_after"] == summary.parameters <= metrics["parameters_target"]
