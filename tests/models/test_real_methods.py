"""Every method on SmolLM2-135M, the real weights; few sequences: budgets and files, not quality."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import METHODS, PruneConfig, prune, summarize

pytestmark = pytest.mark.real_model

CHANNEL = 3 * 576  # parameters of one channel
LAYER = 3_540_096  # of one decoder layer


@pytest.mark.parametrize("method", [m for m in METHODS if m.removes == "units"], ids=lambda m: m.name)
def test_prunes_to_nine_tenths_and_loads(tmp_path, method):
    result = prune(
        PruneConfig(
            "smollm2-135m",
            0.9,
            str(tmp_path / "run"),
            method=method.name,
            iterations=20,
            num_sequences=2,
            sequence_length=32,
            device="cpu",
        )
    )
    asked = int(0.9 * 134_515_008)
    below = asked - result.metrics["parameters_after"]
    assert 0 <= below < {"reference": 10_000_000, "shortgpt": LAYER}.get(method.name, CHANNEL)
    assert (result.metrics["iterations"] == 1) == method.one_shot
    summary = summarize(result.model_directory)
    assert summary.parameters == result.metrics["parameters_after"]
    kept_whole = [i for i, layer in enumerate(summary.layers) if layer.widths.intermediate_size == 1536]
    if method.name == "llm-pruner":
        assert kept_whole == [0, 1, 2, 3, 28, 29]
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    with torch.no_grad():
        loss = model(torch.tensor([[504, 2347, 30, 253]]), labels=torch.tensor([[504, 2347, 30, 253]])).loss
    assert loss.isfinite()
