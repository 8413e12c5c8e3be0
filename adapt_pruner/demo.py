"""The demo: prunes SmolLM2-135M to 80% of its parameters and shows what that costs, without a model hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint import write_json
from adapt_pruner.config import EvaluateConfig, PruneConfig
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.evaluation.evaluate import EvaluationResult, evaluate
from adapt_pruner.pruner import OnIteration, PruneResult, prune

MODEL = "smollm2-135m"
PROMPT = "The sun rises in the east because"
# Fewer rounds and calibration tokens than the defaults of `prune`, so that two CPU cores are done in minutes.
ITERATIONS = 20
NUM_SEQUENCES = 16
EVALUATION_TOKENS = 8192
CONTEXT = 512


@dataclass(frozen=True)
class DemoResult:
    """The run, held-out perplexity before and after, and a sentence by each model."""

    run: PruneResult
    before: EvaluationResult
    after: EvaluationResult
    text_before: str
    text_after: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "run_directory": str(self.run.run_directory),
            "metrics": self.run.metrics,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "prompt": PROMPT,
            "text_before": self.text_before,
            "text_after": self.text_after,
        }


def demo(output: str, *, on_iteration: OnIteration | None = None) -> DemoResult:
    """Prunes, evaluates before and after on the held-out part of the default text, generates a sentence.

    A demo that was interrupted goes on where it was; one that is complete only evaluates again.
    """
    config = PruneConfig(
        MODEL,
        0.8,
        output,
        method="adapt-pruner+",
        iterations=ITERATIONS,
        num_sequences=NUM_SEQUENCES,
        resume=Path(output).exists(),
    )
    run = prune(config, on_iteration=on_iteration)
    before, after = (
        evaluate(EvaluateConfig(model, context=CONTEXT, max_tokens=EVALUATION_TOKENS))
        for model in (MODEL, str(run.model_directory))
    )
    result = DemoResult(run, before, after, generate(MODEL), generate(str(run.model_directory)))
    write_json(run.run_directory / "demo.json", result.to_dict())
    return result


def generate(model_name: str, *, max_new_tokens: int = 30) -> str:
    """Greedy continuation of the prompt."""
    from transformers import AutoTokenizer

    from adapt_pruner.assets import resolve_model

    directory = resolve_model(model_name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    model: Any = load_model(directory, device="cpu")
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
