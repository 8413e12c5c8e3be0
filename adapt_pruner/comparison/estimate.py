"""How long the rows of a comparison will take, from rates that are measured on each model for seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.comparison.rows import Row
from adapt_pruner.config import CompareConfig
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.evaluation.tasks import Item
from adapt_pruner.latency import ROUNDS
from adapt_pruner.methods import find_method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = 256  # tokens of the forward pass that is timed


@dataclass(frozen=True)
class Workload:
    """Tokens that the evaluation of a model reads: of the text, and of each task with its choices."""

    text: int
    tasks: Mapping[str, int]

    @classmethod
    def of(
        cls,
        config: CompareConfig,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        items: Mapping[str, Sequence[Item]],
    ) -> Workload:
        """
        Args:
            tokens: of the whole text.
            items: questions of each task.
        """
        text = min(tokens, config.max_tokens or tokens)
        if config.stride:  # every window is read as a whole
            text = max(text, math.ceil(max(0, text - config.context) / config.stride + 1) * config.context)
        tasks = {}
        for name, questions in items.items():
            texts = [
                context + continuation
                for item in questions
                for context, continuation in zip(item.contexts, item.continuations, strict=True)
            ]
            tasks[name] = sum(map(len, tokenizer(texts, verbose=False)["input_ids"]))
        return cls(text, tasks)


@dataclass(frozen=True)
class Estimate:
    """Minutes that a row takes: for pruning, for its evaluation and for loading the models."""

    model: str
    method: str
    target: float | None
    pruning: float
    evaluation: float
    loading: float

    @property
    def minutes(self) -> float:
        return self.pruning + self.evaluation + self.loading


@dataclass(frozen=True)
class _Rates:
    """Seconds to load a model, and tokens per second that it reads, predicts, and scores units by."""

    loading: float
    reading: float
    predicting: float
    scoring: float


def estimate(rows: Sequence[Row], workloads: Mapping[str, Workload]) -> tuple[Estimate, ...]:
    """Minutes of each row, from the passes through the model alone.

    What a method does beside them, such as solving for least squares, and the start of processes are not
    counted; a pruned model is taken to be as slow as the one before pruning.
    """
    rates = {model: _measure(next(row for row in rows if row.model == model)) for model in workloads}
    return tuple(_estimate(row, workloads[row.model], rates[row.model]) for row in rows)


def _estimate(row: Row, work: Workload, rates: _Rates) -> Estimate:
    pruning = 0.0
    if row.prune is not None:
        assert row.target is not None
        method = find_method(row.method)
        rounds = 1 if method.one_shot else (row.prune["iterations"] or method.iterations)
        # Each round takes 1 / rounds of the units, and all would take everything.
        tokens = row.prune["num_sequences"] * row.prune["sequence_length"]
        tokens *= math.ceil(rounds * (1 - row.target))
        backward = method.removes == "units" and method.estimator is not None and method.estimator.loss
        pruning = tokens / (rates.scoring if backward else rates.predicting)
    models = 1 if row.prune is None else 2
    text = work.text if row.evaluate["data"] != "none" else 0
    evaluation = text / rates.predicting + sum(work.tasks[name] for name in row.tasks) / rates.reading
    evaluation += models * (ROUNDS + 1) * math.prod(row.latency) / rates.predicting
    loads = models if row.prune is None else models + 1
    return Estimate(
        row.model, row.method, row.target, pruning / 60, evaluation / 60, loads * rates.loading / 60
    )


def _measure(row: Row) -> _Rates:
    """Rates of the model of a row, each of the second of two passes."""
    started = time.perf_counter()
    device, dtype = row.evaluate["device"], row.evaluate["dtype"]
    engine = InMemoryEngine(open_checkpoint(resolve_model(row.model)), device=device, dtype=dtype)
    loading = time.perf_counter() - started
    vocabulary = engine.model.config.get_text_config().vocab_size
    length = min(64, engine.model.config.get_text_config().max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (_PROBE // length, length), generator=generator)
    here = tokens.to(engine.model.device)

    def predict(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            float(model(input_ids=here, use_cache=False)[0].sum())  # waits for the device

    seconds = []
    for run in (
        lambda: predict(engine.model.base_model),
        lambda: predict(engine.model),
        lambda: engine.score(tokens, micro_batch_size=len(tokens)),
    ):
        for _ in range(2):
            began = time.perf_counter()
            run()
            taken = time.perf_counter() - began
        seconds.append(taken)
    return _Rates(loading, *(tokens.numel() / s for s in seconds))
