"""Every method at 80% of the non-embedding parameters of real models: budgets and files, not quality."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import METHODS, PruneConfig, prune, summarize
from adapt_pruner.assets import CONVERSION, cache_dir, fetch_model

pytestmark = pytest.mark.real_model

OF_UNITS = [m for m in METHODS if m.removes == "units"]
CHANNEL = 3 * 576  # parameters of one channel of SmolLM2-135M
LAYER = 3_540_096  # of one decoder layer
GEMMA = "gemma3-270m"
# Another 240 MB to fetch and twice the time: where `adapt-pruner inspect` or so has fetched it already.
needs_gemma = pytest.mark.skipif(
    not (cache_dir() / "assets" / "models" / f"{GEMMA}-v{CONVERSION}").exists(),
    reason=f"{GEMMA} is not in the cache",
)


def prune_to_four_fifths(model, output, method, **settings):
    return prune(
        PruneConfig(
            model,
            0.8,
            str(output),
            target_of="non-embedding",
            method=method.name,
            iterations=10,
            num_sequences=4,
            sequence_length=32,
            device="cpu",
            **settings,
        )
    )


def assert_loads_and_lands(result, before, steps):
    """At most the target and less than the method's step below it; the saved model runs."""
    embeddings = before.parameters - before.non_embedding_parameters
    asked = int(0.8 * before.non_embedding_parameters) + embeddings
    method = result.plan.settings["method"]
    assert 0 <= asked - result.metrics["parameters_after"] < steps[method]
    assert (result.metrics["iterations"] == 1) == next(m for m in METHODS if m.name == method).one_shot
    after = summarize(result.model_directory)
    assert after.parameters == result.metrics["parameters_after"]
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    tokens = torch.tensor([[504, 2347, 30, 253]])
    with torch.no_grad():
        assert model(tokens, labels=tokens).loss.isfinite()
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 7)
    return after


@pytest.mark.parametrize("method", OF_UNITS, ids=lambda m: m.name)
def test_smollm2(tmp_path, method):
    result = prune_to_four_fifths("smollm2-135m", tmp_path / "run", method)
    steps = dict.fromkeys([m.name for m in OF_UNITS], CHANNEL) | {"reference": 12_000_000, "shortgpt": LAYER}
    after = assert_loads_and_lands(result, summarize(fetch_model("smollm2-135m")), steps)
    if method.name == "llm-pruner":
        whole = [i for i, layer in enumerate(after.layers) if layer.widths.intermediate_size == 1536]
        assert whole == [0, 1, 2, 3, 28, 29]


@needs_gemma
@pytest.mark.parametrize("method", [m for m in OF_UNITS if m.name != "reference"], ids=lambda m: m.name)
def test_gemma(tmp_path, method):
    """One KV head: attention shrinks by query heads, here twice as fast as the MLP."""
    whole_layers = method.granularity == "layer"
    heads = {} if whole_layers else {"granularity": "query_head", "attention_rate": 2.0}
    before = summarize(fetch_model(GEMMA))
    result = prune_to_four_fifths(GEMMA, tmp_path / "run", method, **heads)
    layer = max(layer.parameters for layer in before.layers)
    steps = dict.fromkeys([m.name for m in OF_UNITS], 3 * 640) | {"shortgpt": layer}
    after = assert_loads_and_lands(result, before, steps)
    if not whole_layers:
        assert min(layer.widths.num_attention_heads for layer in after.layers) < 4
        assert all(layer.widths.num_key_value_heads == 1 for layer in after.layers)
