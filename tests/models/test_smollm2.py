"""SmolLM2-135M, the real weights: budgets, loading in a process without this package, the same text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from adapt_pruner import PruneConfig, prune, summarize
from adapt_pruner.allocation import select_units
from adapt_pruner.assets import fetch_model
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.compensation import compensated_weights
from adapt_pruner.config import RIDGE
from adapt_pruner.data import load_documents, sample_sequences, tokenize
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.kernels import backend_status
from adapt_pruner.scoring.estimators import OBS

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
CHANNEL = 3 * 576  # parameters of one channel


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Few iterations and tokens: budgets and files are what is tested here, not quality."""
    directory = tmp_path_factory.mktemp("runs")

    def run(target):
        output = directory / f"{target}"
        config = PruneConfig(
            MODEL, target, str(output), iterations=6, num_sequences=4, device="cpu", resume=output.exists()
        )
        return prune(config)

    return run


@pytest.mark.parametrize("target", [0.9, 0.8, 0.7, 0.5])
def test_lands_less_than_one_channel_below_the_target(runs, target):
    result = runs(target)
    asked = int(target * 134_515_008)
    summary = summarize(result.model_directory)
    assert summary.parameters == result.metrics["parameters_after"]
    assert 0 <= asked - summary.parameters < CHANNEL
    assert len({layer.widths for layer in summary.layers}) > 1


def test_loads_with_plain_transformers_in_another_process(runs, tmp_path):
    directory = runs(0.8).model_directory
    code = f"""
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(directory)!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
assert "adapt_pruner" not in sys.modules
inputs = tokenizer("The capital of France is", return_tensors="pt")
cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
uncached = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
assert cached.tolist() == uncached.tolist()
print(json.dumps({{"parameters": model.num_parameters(), "ids": tokenizer("In 1984, 2 of 10.").input_ids}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == runs(0.8).metrics["parameters_after"]
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(fetch_model(MODEL))
    assert found["ids"] == original("In 1984, 2 of 10.").input_ids


@pytest.fixture(scope="module")
def fused_and_materialised():
    """Scores of the dense model by both kinds of gradients, of the same 4 sequences of 32 tokens."""
    engine = InMemoryEngine(open_checkpoint(fetch_model(MODEL)), device="cpu")
    batch = torch.randint(0, 49152, (4, 32), generator=torch.Generator().manual_seed(0))
    return [engine.score(batch, micro_batch_size=4, gradients=g) for g in ("fused", "materialised")]


def test_fused_gradients_give_the_same_scores_and_units(fused_and_materialised):
    fused, materialised = fused_and_materialised
    assert fused.loss == materialised.loss
    np.testing.assert_array_equal(fused.layer_importance, materialised.layer_importance)
    for a, b in zip(fused.unit_importance, materialised.unit_importance, strict=True):
        for kind in ("kv_group", "channel"):
            np.testing.assert_allclose(a[kind], b[kind], rtol=1e-5)
            kept = len(a[kind]) * 4 // 5
            np.testing.assert_array_equal(select_units(a[kind], kept), select_units(b[kind], kept))


def test_fused_gradients_take_less_memory():
    """By most of the 425 MB of the gradients; few tokens, or logits and activations would be the peak."""
    peaks = {}
    for gradients in ("fused", "materialised"):
        done = subprocess.run(
            [sys.executable, "benchmarks/iteration.py", "--num-sequences", "2", "--gradients", gradients,
             "--memory-of", "iteration"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[gradients] = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert peaks["fused"] < peaks["materialised"] - 250e6


def test_compensation_is_closer_in_every_layer_on_text_it_has_not_seen():
    """A fifth of the channels and a KV group of three gone; no compensation is the weights as they are.

    The default ridge and 4,096 calibration tokens, an eighth of the default; 1,024 are too few for one layer.
    """
    engine = InMemoryEngine(open_checkpoint(fetch_model(MODEL)), device="cpu")
    tokens = tokenize(
        load_documents("default", part="calibration"), AutoTokenizer.from_pretrained(fetch_model(MODEL))
    )
    unseen = tokenize(
        load_documents("default", part="held-out"), AutoTokenizer.from_pretrained(fetch_model(MODEL))
    )
    batches = [sample_sequences(part, n, 64, seed=0) for part, n in ((tokens, 64), (unseen, 16))]
    seen, held_out = (engine.score(b, micro_batch_size=16, estimator=OBS) for b in batches)
    assert seen.grams is not None
    assert held_out.grams is not None
    ratios = {}
    for layer, (widths, scores) in enumerate(zip(engine.widths, seen.unit_importance, strict=True)):
        keep = {
            "channel": select_units(scores["channel"], 1229),
            "kv_group": select_units(scores["kv_group"], 2),
        }
        columns = {
            "mlp": keep["channel"], "self_attn": np.arange(576).reshape(3, 192)[keep["kv_group"]].ravel()
        }  # fmt: skip
        compensated = compensated_weights(
            engine.model, engine.family, layer, widths, keep, seen.grams, ridge=RIDGE
        )
        assert len(compensated) == 2
        for name, value in compensated.items():
            weight, kept = engine.model.get_parameter(name).detach().double(), columns[name.split(".")[3]]
            errors = []
            for kept_weight in (value.double(), weight[:, kept]):
                lost = weight.clone()
                lost[:, kept] -= kept_weight
                errors.append(((lost @ held_out.grams[name].products) * lost).sum().item())
            ratios[name] = errors[0] / errors[1]
    assert len(ratios) == 60
    assert max(ratios.values()) < 1, ratios


def test_native_ops_are_what_ran():
    """The suite must not pass on the reference ops because the extension is missing."""
    assert backend_status()["cpu"] is None
    if torch.cuda.is_available():
        assert backend_status()["cuda"] is None


def test_the_example_of_the_readme_runs(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = readme.partition("```python\n")[2].partition("```")[0]
    assert "num_sequences=16" in example
    done = subprocess.run(
        [sys.executable, "-c", example.replace("num_sequences=16", "num_sequences=2, iterations=12")],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "The sun rises" in done.stdout
    assert "PerplexityResult(perplexity=" in done.stdout
