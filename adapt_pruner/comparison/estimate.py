"""How long the rows of a comparison will take, from rates that are measured on each model for seconds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapt_pruner.assets import resolve_model
from adapt_pruner.budget import FINE_UNIT, UnitBudget
from adapt_pruner.checkpoint import Checkpoint, open_checkpoint
from adapt_pruner.comparison.rows import Row
from adapt_pruner.config import CompareConfig, PruneConfig
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.evaluation.multiple_choice import tokens_read
from adapt_pruner.evaluation.tasks import Item
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.iteration import SEARCHED
from adapt_pruner.latency import ROUNDS
from adapt_pruner.layer_removal import layer_parameters, removable_parameters
from adapt_pruner.run_budget import header_budget, restricted
from adapt_pruner.scoring import Estimator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = 512  # tokens of the passes that are timed


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
    """Of a model: seconds to load it, and tokens per second that it reads and predicts.

    `scoring` has by method what it takes to score units by it: seconds, whatever the text, and seconds per
    token.
    """

    loading: float
    reading: float
    predicting: float
    scoring: Mapping[str, tuple[float, float]]


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
        config, _ = _resolved(row)
        assert config.num_sequences is not None  # resolved
        constant, of_token = rates.scoring.get(row.method, (0.0, 1 / rates.predicting))
        seconds = constant + config.num_sequences * config.sequence_length * of_token
        if config.allocation == "search":
            sequences = config.search_evaluations * min(SEARCHED, config.num_sequences)
            seconds += sequences * config.sequence_length / rates.predicting
        pruning = _rounds(row) * seconds
    models = 1 if row.prune is None else 2
    text = work.text if row.evaluate["data"] != "none" else 0
    evaluation = text / rates.predicting + sum(work.tasks[name] for name in row.tasks) / rates.reading
    evaluation += models * (ROUNDS + 1) * math.prod(row.latency) / rates.predicting
    loads = models if row.prune is None else models + 1
    return Estimate(
        row.model, row.method, row.target, pruning / 60, evaluation / 60, loads * rates.loading / 60
    )


def _checkpoint(row: Row) -> Checkpoint:
    return open_checkpoint(resolve_model(row.model))


def _resolved(row: Row) -> tuple[PruneConfig, Estimator | None]:
    return row.resolved(len(layer_widths(_checkpoint(row).config)))


def _rounds(row: Row) -> int:
    """Rounds until the target is met, all layers losing the same share."""
    config, estimator = _resolved(row)
    assert config.iterations is not None  # resolved
    assert row.target is not None
    rounds = config.iterations
    if rounds == 1:
        return 1
    checkpoint = _checkpoint(row)
    family = find_family(checkpoint.config.get("model_type"))
    family = family.with_granularity(config.granularity or "kv_group", config.mlp_granularity)
    budget, embeddings = header_budget(checkpoint, family)
    budget = restricted(config, budget)
    base = embeddings if config.target_of == "non-embedding" else 0
    target = int(row.target * (budget.num_parameters - base)) + base
    excess = budget.num_parameters - target
    if estimator is None:  # a round takes its part of what can go, in whole layers
        sizes = layer_parameters(checkpoint, family)
        layer = sum(sizes) / len(sizes)
        part = math.ceil(removable_parameters(sizes, budget.protected) / rounds / layer) * layer
        return math.ceil(excess / part)
    if config.allocation in ("global", "threshold"):  # a round takes its part of what can go at all
        part = -(-(budget.num_parameters - budget.floor) // rounds)
        return -(-excess // part)
    for number in range(1, rounds):
        left = tuple(
            layer if i in budget.protected else _left(budget, layer, number / rounds)
            for i, layer in enumerate(budget.initial)
        )
        if budget.parameters(left) <= target:
            return number
    return rounds


def _left(budget: UnitBudget, layer: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Units that a layer has left at a sparsity."""
    left = {}
    for kind, n in layer.items():
        lost = min(1.0, sparsity * budget.rate(kind))
        left[kind] = max(1, int(n * (1 - lost)) if kind == FINE_UNIT else n - math.floor(n * lost + 1e-9))
    return left


def _measure(rows: Sequence[Row]) -> _Rates:
    """Rates of the model of these rows."""
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

    reading, predicting = (
        tokens.numel() / _seconds(predict, model) for model in (engine.model.base_model, engine.model)
    )
    scoring = {}
    for row in {row.method: row for row in rows if row.prune is not None}.values():
        config, estimator = _resolved(row)
        if estimator is not None:
            with contextlib.suppress(ValueError):  # not for this model, as its row will say
                scoring[row.method] = _scoring(config, estimator, engine, tokens)
    return _Rates(loading, reading, predicting, scoring)


def _seconds(run: Callable[[Any], object], of: Any) -> float:
    """Of the second of two runs."""
    for _ in range(2):
        began = time.perf_counter()
        run(of)
        taken = time.perf_counter() - began
    return taken


def _scoring(
    config: PruneConfig, estimator: Estimator, engine: InMemoryEngine, tokens: Tensor
) -> tuple[float, float]:
    """Seconds that scores by these settings take whatever the text, and seconds per token."""

    def score(part: Tensor) -> object:
        return engine.score(
            part,
            micro_batch_size=len(part),
            estimator=estimator,
            grams=config.compensation == "least_squares",
            means=config.compensation == "bias",
        )

    half = tokens[: len(tokens) // 2]
    short, long = (_seconds(score, part) for part in (half, tokens))
    of_token = max(0.0, long - short) / (tokens.numel() - half.numel())
    return max(0.0, long - tokens.numel() * of_token), of_token
