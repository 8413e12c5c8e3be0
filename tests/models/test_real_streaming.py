"""The streaming engine on real models: the scores and plans of the in-memory engine in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from adapt_pruner import PruneConfig, prune
from adapt_pruner.assets import CONVERSION, cache_dir, resolve_model
from adapt_pruner.calibration import calibration_tokens, draw
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.engines import InMemoryEngine
from adapt_pruner.engines.streaming import StreamingEngine

pytestmark = pytest.mark.real_model

GEMMA = "gemma3-270m"
# Another 240 MB to fetch: where `adapt-pruner inspect` or so has fetched it already.
needs_gemma = pytest.mark.skipif(
    not (cache_dir() / "assets" / "models" / f"{GEMMA}-v{CONVERSION}").exists(),
    reason=f"{GEMMA} is not in the cache",
)
MODELS = ["smollm2-135m", pytest.param(GEMMA, marks=needs_gemma)]
SETTINGS = {
    "iterations": 10, "num_sequences": 4, "sequence_length": 128, "micro_batch_size": 2, "dtype": "fp32",
    "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_scores_agree(model, tmp_path):
    checkpoint = open_checkpoint(resolve_model(model))
    config = PruneConfig(model, 0.8, str(tmp_path / "run"), **SETTINGS)
    batch = draw(config, calibration_tokens(config, checkpoint), 1)
    options = {"micro_batch_size": config.micro_batch_size}
    expected = InMemoryEngine(checkpoint, device="cpu", dtype="fp32").score(batch, **options)
    streaming = StreamingEngine(checkpoint, directory=tmp_path, memory=1, device="cpu", dtype="fp32")
    scores = streaming.score(batch, **options)
    assert scores.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_allclose(scores.layer_importance, expected.layer_importance, rtol=1e-5)
    for ours, theirs in zip(scores.unit_importance, expected.unit_importance, strict=True):
        for kind in ours:
            np.testing.assert_allclose(ours[kind], theirs[kind], rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_plans_are_identical(model, tmp_path):
    plans = [
        prune(
            PruneConfig(
                model, 0.85, str(tmp_path / engine), target_of="non-embedding", engine=engine, **SETTINGS
            )
        ).plan
        for engine in ("in-memory", "streaming")
    ]
    assert plans[0].hash == plans[1].hash
