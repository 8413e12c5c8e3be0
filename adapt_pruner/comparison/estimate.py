"""How long the rows of a comparison will take, from rates that are measured on each model for seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapt_pruner.assets import resolve_model
from adapt_pruner.budget import FINE_UNIT
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.comparison.rows import Row
from adapt_pruner.config import CompareConfig
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.evaluation.multiple_choice import tokens_read
from adapt_pruner.evaluation.tasks import Item
from adapt_pruner.families import find_family
from adapt_pruner.latency import ROUNDS
from adapt_pruner.methods import Method, find_method
from adapt_pruner.run_budget import header_budget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = 256  # tokens of the forward pass that is timed


@dataclass(frozen=True)
class Workload:
    """Tokens that the evaluation of a model reads: of the text, and of each task with its choices, those that
    begin alike being read once."""

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
        tasks = {name: tokens_read(tokenizer, questions) for name, questions in items.items()}
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
    """Of a model: seconds to load it, and tokens per second that it reads, predicts, and scores units by.

    `beside` has the seconds that each method takes in a round beside these passes.
    """

    loading: float
    reading: float
    predicting: float
    scoring: float
    beside: Mapping[str, float]

    def passes(self, method: Method) -> float:
        """Tokens per second of the passes of a method's calibration."""
        needs_gradients = method.estimator is not None and method.estimator.loss is not None
        return self.scoring if needs_gradients and method.removes == "units" else self.predicting


def estimate(rows: Sequence[Row], workloads: Mapping[str, Workload]) -> tuple[Estimate, ...]:
    """Minutes of each row, from what the model before pruning takes for its passes and for scores of units.

    What follows the scores of a round, such as solving for least squares, the principal components of
    SliceGPT, and the start of processes are not counted.
    """
    rates = {model: _measure([row for row in rows if row.model == model]) for model in workloads}
    return tuple(_estimate(row, workloads[row.model], rates[row.model]) for row in rows)


def _estimate(row: Row, work: Workload, rates: _Rates) -> Estimate:
    pruning = 0.0
    if row.prune is not None:
        assert row.target is not None
        method = find_method(row.method)
        tokens = row.prune["num_sequences"] * row.prune["sequence_length"]
        pruning = _rounds(row, method) * (tokens / rates.passes(method) + rates.beside.get(row.method, 0.0))
    models = 1 if row.prune is None else 2
    text = work.text if row.evaluate["data"] != "none" else 0
    evaluation = text / rates.predicting + sum(work.tasks[name] for name in row.tasks) / rates.reading
    evaluation += models * (ROUNDS + 1) * math.prod(row.latency) / rates.predicting
    loads = models if row.prune is None else models + 1
    return Estimate(
        row.model, row.method, row.target, pruning / 60, evaluation / 60, loads * rates.loading / 60
    )


def _rounds(row: Row, method: Method) -> int:
    """Rounds until the target is met, all layers losing the same share."""
    assert row.prune is not None
    assert row.target is not None
    if method.one_shot:
        return 1
    rounds: int = row.prune["iterations"] or method.iterations
    checkpoint = open_checkpoint(resolve_model(row.model))
    family = find_family(checkpoint.config.get("model_type"))
    granularity = row.prune.get("granularity") or method.granularity
    budget, embeddings = header_budget(checkpoint, family.with_granularity(granularity, "channel"))
    base = embeddings if row.prune["target_of"] == "non-embedding" else 0
    target = int(row.target * (budget.num_parameters - base)) + base
    if method.allocation in ("global", "threshold"):  # a round takes its part of what can go at all
        part = -(-(budget.num_parameters - budget.floor) // rounds)
        return -(-(budget.num_parameters - target) // part)
    for number in range(1, rounds):
        lost = number / rounds
        left = tuple(
            {
                kind: max(1, int(n * (1 - lost)) if kind == FINE_UNIT else n - math.floor(n * lost + 1e-9))
                for kind, n in layer.items()
            }
            for layer in budget.initial
        )
        if budget.parameters(left) <= target:
            return number
    return rounds


def _measure(rows: Sequence[Row]) -> _Rates:
    """Rates of the model of these rows, each of the second of two passes."""
    row = rows[0]
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

    speeds = []
    for run in (
        lambda: predict(engine.model.base_model),
        lambda: predict(engine.model),
        lambda: engine.score(tokens, micro_batch_size=len(tokens)),
    ):
        for _ in range(2):
            began = time.perf_counter()
            run()
            taken = time.perf_counter() - began
        speeds.append(tokens.numel() / taken)
    reading, predicting, scoring = speeds
    rates = _Rates(loading, reading, predicting, scoring, {})
    methods = [find_method(name) for name in dict.fromkeys(row.method for row in rows if row.prune)]
    beside = {m.name: _beside(m, engine, tokens, tokens.numel() / rates.passes(m)) for m in methods}
    return replace(rates, beside=beside)


def _beside(method: Method, engine: InMemoryEngine, tokens: Tensor, passes: float) -> float:
    """Seconds that scores by a method take beyond those of the passes."""
    if method.removes != "units" or method.estimator is None:
        return 0.0
    began = time.perf_counter()
    try:
        engine.score(
            tokens,
            micro_batch_size=len(tokens),
            estimator=method.estimator,
            grams=method.compensation == "least_squares",
            means=method.compensation == "bias",
        )
    except ValueError:  # not for this model, as its row will say
        return 0.0
    return max(0.0, time.perf_counter() - began - passes)
