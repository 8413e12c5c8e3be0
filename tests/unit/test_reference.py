"""The method `reference` against traces of the published implementation, on two tiny models of its format.

tests/published/ has a trace per model. The matrices of the models are those of a seed, which a digest makes
sure of; norms and biases are in a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_pruner import PruneConfig, prune, pruner
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.scoring import find_estimator

PUBLISHED = Path(__file__).parents[1] / "published"
MODELS = {
    "llama": (1, "d16dc34bdde746775d4f326efe3a2f7f5aa1c3678587a6bfebd0c207c645262e"),
    "qwen2": (2, "7f7554fbad5776e4fba34a52fe5bb8fe2e0d360a40ea51f88e1ce89b20279ce1"),
}
SCALES = (1.6, 0.7, 1.0, 0.5, 1.3)  # of the output projections of each layer
KINDS = {"kv": "kv_group", "channel": "channel"}


def build(name, directory):
    seed, digest = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PUBLISHED / name)).float()
    model.load_state_dict(load_file(PUBLISHED / name / "vectors.safetensors"), strict=False)
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, SCALES, strict=True):
            layer.self_attn.o_proj.weight *= scale
            layer.mlp.down_proj.weight *= scale
    seen = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        seen.update(key.encode() + tensor.numpy().tobytes())
    assert seen.hexdigest() == digest, "the random weights differ from those that were pruned"
    model.save_pretrained(directory)


@pytest.fixture(params=sorted(MODELS))
def traced(request, tmp_path, monkeypatch):
    """A run of the method on the tokens of the trace: the trace, the result, and what every round saw."""
    trace = json.loads((PUBLISHED / request.param / "trace.json").read_text())
    build(request.param, tmp_path / "model")
    batches = [torch.tensor(iteration["tokens"]) for iteration in trace["iterations"]]
    monkeypatch.setattr(pruner, "calibration_tokens", lambda config, checkpoint: None)
    monkeypatch.setattr("adapt_pruner.iteration.draw", lambda config, tokens, number: batches[number - 1])
    scores, kept, engine = [], [], InMemoryEngine
    score, remove = engine.score, engine.remove_units
    monkeypatch.setattr(engine, "score", lambda *a, **k: scores.append(score(*a, **k)) or scores[-1])
    monkeypatch.setattr(
        engine, "remove_units", lambda self, keep, **k: kept.append(keep) or remove(self, keep, **k)
    )
    settings = trace["settings"]
    config = PruneConfig(
        str(tmp_path / "model"),
        settings["target_parameters"],
        str(tmp_path / "run"),
        method="reference",
        iterations=settings["iterations"],
        amplitude=settings["amplitude"],
        num_sequences=settings["num_sequences"],
        sequence_length=settings["sequence_length"],
        micro_batch_size=settings["micro_batch"],
        device="cpu",
    )
    return trace, prune(config), scores, kept


def test_the_traces_of_the_published_implementation_are_reproduced(traced):
    trace, result, scores, kept = traced
    records = [
        json.loads(file.read_text()) for file in sorted((result.run_directory / "iterations").glob("*.json"))
    ]
    assert len(records) == len(trace["iterations"]) == len(scores) == len(kept)
    for iteration, record, seen, keep in zip(trace["iterations"], records, scores, kept, strict=True):
        np.testing.assert_allclose(
            record["layer_importance_normalised"], iteration["layer_importance_normalised"], atol=1e-4
        )
        np.testing.assert_allclose(record["sparsity"], iteration["target_sparsity"], rtol=1e-4)
        assert record["parameters"] == iteration["parameters_after"]
        for published in iteration["unit_importance"]:
            layer, kind = published["layer"], KINDS[published["unit"]]
            ours = seen.unit_importance[layer][kind]
            expected = np.array(published["importance"]).reshape(len(ours), -1).sum(1)
            np.testing.assert_allclose(ours, expected, rtol=1e-4)
        for published in iteration["removed_rows"]:
            layer, kind = published["layer"], KINDS[published["unit"]]
            units = len(seen.unit_importance[layer][kind])
            gone = sorted(set(range(units)) - set(keep[layer][kind].tolist()))
            head_dim = 16
            rows = [g * head_dim + r for g in gone for r in range(head_dim)] if kind == "kv_group" else gone
            assert rows == published["rows"], (record["iteration"], layer, kind)
    assert result.metrics["parameters_after"] == trace["parameters_after"]
    assert result.metrics["parameters_before"] == trace["parameters_before"]
    widths = [(len(keep["kv_group"]), len(keep["channel"])) for keep in result.plan.keep_indices]
    assert widths == list(zip(trace["kv_heads"], trace["intermediate"], strict=True))


@pytest.mark.parametrize(
    ("estimator", "gqa_credit", "kind"),
    [
        ("taylor_reference", "owner", "kv"),
        ("taylor_first", "modulo", "kv"),
        ("taylor_first", "modulo", "channel"),
    ],
)
def test_without_a_quirk_importance_is_another(tmp_path, estimator, gqa_credit, kind):
    """Of the first round: query heads count for their owners; gradients are of the mean over the batch."""
    build("qwen2", tmp_path)
    trace = json.loads((PUBLISHED / "qwen2" / "trace.json").read_text())["iterations"][0]
    engine = InMemoryEngine(open_checkpoint(tmp_path), device="cpu")
    scores = engine.score(
        torch.tensor(trace["tokens"]),
        micro_batch_size=4,
        estimator=find_estimator(estimator),
        gqa_credit=gqa_credit,
    )
    for published in (p for p in trace["unit_importance"] if p["unit"] == kind):
        ours = scores.unit_importance[published["layer"]][KINDS[kind]]
        theirs = np.array(published["importance"]).reshape(len(ours), -1).sum(1)
        assert np.abs(ours / theirs - 1).max() > 1e-3
