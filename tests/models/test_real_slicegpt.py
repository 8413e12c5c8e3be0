"""SliceGPT on SmolLM2-135M, the real weights: a rotation changes nothing; prune, load, generate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt_pruner import PruneConfig, prune, summarize
from adapt_pruner.assets import fetch_model
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.slicegpt import slice_model

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
DIMENSION = 2 * 576 + 2 * 1536 + 576 + 960 + 2 * 576  # parameters of one at one position, or less


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 5e-4)])
def test_rotation_alone_leaves_the_logits(dtype, tolerance):
    """In fp32 to what rounding does: the stock model is 2e-4 from its own logits in fp64."""
    batch = torch.randint(0, 49152, (4, 32), generator=torch.Generator().manual_seed(0))
    model = load_model(fetch_model(MODEL), device="cpu").to(dtype)
    with torch.no_grad():
        logits = model(batch).logits
        rotated = slice_model(model, [576] * 61, batch, micro_batch_size=4).model(batch).logits
    assert logits.abs().max() > 10
    torch.testing.assert_close(rotated, logits, rtol=0, atol=tolerance)


def test_prune_load_generate(tmp_path):
    config = PruneConfig(
        MODEL,
        0.8,
        str(tmp_path / "run"),
        method="slicegpt",
        target_of="non-embedding",
        num_sequences=16,
        sequence_length=64,
        device="cpu",
    )
    result = prune(config)
    asked = int(0.8 * 106_203_456)
    summary = summarize(result.model_directory)
    assert 0 <= asked - summary.non_embedding_parameters < DIMENSION
    assert set(result.metrics["hidden_widths_after"]) == {407, 408}
    assert result.metrics["calibration_loss"][0] < 5
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert model.num_parameters() == result.metrics["parameters_after"] == summary.parameters
    inputs = AutoTokenizer.from_pretrained(result.model_directory)("The sun rises", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))
    assert len(set(cached[0].tolist())) > 6  # no single token over and over
