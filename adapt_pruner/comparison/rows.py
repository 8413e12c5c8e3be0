"""A row of a comparison: what it asks for, what has been measured so far, and its JSON file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import Checkpoint, open_checkpoint, write_json
from adapt_pruner.comparison.variants import Variant, method_name, parse_variants
from adapt_pruner.config import CompareConfig, EvaluateConfig, PruneConfig, split_names
from adapt_pruner.evaluation.evaluate import task_names
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.methods import find_method, parse_layers, resolve, resolve_dimensions
from adapt_pruner.scoring import Estimator

DENSE = "dense"
_PRUNING = (
    "target_of",
    "iterations",
    "calibration",
    "calibration_column",
    "num_sequences",
    "sequence_length",
    "micro_batch_size",
    "pack",
    "seed",
    "device",
    "dtype",
    "backend",
)
_EVALUATION = (
    "data",
    "column",
    "split",
    "context",
    "stride",
    "max_tokens",
    "limit",
    "questions",
    "batch_size",
    "device",
    "dtype",
)


@dataclass(frozen=True)
class Failure:
    """Why a row has no more results: the step, the reason, and whether another try may end otherwise."""

    step: str
    reason: str
    retry: bool


@dataclass(frozen=True)
class Row:
    """One model by one method at one target, or before pruning.

    Attributes:
        model, method: names, the latter of a variant; "dense" is the model before pruning.
        target: fraction to keep; None before pruning.
        prune: settings of `PruneConfig` but for model, target, method and output; None before pruning.
        evaluate: settings of `EvaluateConfig` but for the model and tasks.
        tasks: whose questions are to be asked.
        latency: sequences and tokens of the forward pass that tokens per second are measured with.
        note: what was chosen for this model alone.
        results: of each finished step (`steps`).
        environments: versions and hardware, as `run.environment` gives them, of all that worked on it.
        failure: of the last try.
    """

    model: str
    method: str
    target: float | None
    prune: Mapping[str, Any] | None
    evaluate: Mapping[str, Any]
    tasks: tuple[str, ...]
    latency: tuple[int, int]
    note: str | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    environments: tuple[Mapping[str, Any], ...] = ()
    failure: Failure | None = None

    @property
    def title(self) -> str:
        return f"{self.model} {self.method}{'' if self.target is None else f' at {self.target:g}'}"

    @property
    def steps(self) -> list[str]:
        """What is to be done, in this order; a task by its name."""
        pruning = [] if self.prune is None else ["pruning"]
        perplexity = [] if self.evaluate["data"] == "none" else ["perplexity"]
        return [*pruning, "size", *perplexity, *self.tasks, "speed"]

    @property
    def missing(self) -> list[str]:
        return [step for step in self.steps if step not in self.results]

    @property
    def settled(self) -> bool:
        """Nothing is left to do, or nothing can be done."""
        return not self.missing or bool(self.failure and not self.failure.retry)

    def pruning(self, output: Path) -> PruneConfig:
        """Settings of its run, which goes on where there is one already."""
        assert self.prune is not None
        return PruneConfig(
            self.model,
            self.target,
            str(output),
            method=method_name(self.method),
            resume=output.exists(),
            **self.prune,
        )

    def resolved(self, num_layers: int) -> tuple[PruneConfig, Estimator | None]:
        """Settings of its run with all that its method decides, and how units are scored, if they are.

        Raises:
            ValueError: settings that exclude each other, or layers that the model does not have.
        """
        config = self.pruning(Path("checked"))
        method = find_method(config.method)
        if method.removes == "dimensions":
            return resolve_dimensions(config, method), None
        return resolve(config, num_layers, method)

    def evaluation(self, model: str, **changes: Any) -> EvaluateConfig:
        return EvaluateConfig(model, **{**self.evaluate, **changes})

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Row:
        values = json.loads(path.read_text(encoding="utf-8"))
        failure = values["failure"]
        return cls(
            **{
                **values,
                "tasks": tuple(values["tasks"]),
                "latency": tuple(values["latency"]),
                "environments": tuple(values["environments"]),
                "failure": None if failure is None else Failure(**failure),
            }
        )

    def joined(self, earlier: Row) -> Row:
        """This row with what an earlier comparison asked of it and measured."""
        tasks = tuple(dict.fromkeys((*earlier.tasks, *self.tasks)))
        failure = earlier.failure if earlier.failure and not earlier.failure.retry else None
        return dataclasses.replace(earlier, tasks=tasks, failure=failure)


def requested_rows(config: CompareConfig) -> dict[str, Row]:
    """The rows of a comparison by the names of their files, dense ones first, in order.

    Every setting is checked, and of the models their headers.

    Raises:
        ValueError: a setting that makes no sense, an unknown method or task, or a model of no known family.
        AssetError: a model could not be fetched.
    """
    variants = parse_variants(config.methods, ignored=DENSE)
    tasks = task_names(config.tasks)
    if config.data == "none" and not tasks:
        raise ValueError('nothing to compare: data is "none" and no task is named')
    evaluate = {name: getattr(config, name) for name in _EVALUATION}
    latency = (config.latency_batch, config.latency_tokens)
    rows: dict[str, Row] = {}
    for model in split_names(config.models):
        checkpoint = open_checkpoint(resolve_model(model))
        find_family(checkpoint.config.get("model_type"))
        dense = Row(model, DENSE, None, None, evaluate, tasks, latency)
        dense.evaluation(model)
        if _file_name(dense) in rows:
            raise ValueError(
                f"models {model} and {rows[_file_name(dense)].model} have one name for their files"
            )
        rows[_file_name(dense)] = dense
        for variant in variants:
            prune, note = _prune_settings(config, variant, checkpoint)
            for target in config.fractions():
                row = Row(model, variant.name, target, prune, evaluate, tasks, latency, note)
                _check_pruning(row, variant, checkpoint)
                rows[_file_name(row)] = row
    return rows


def _prune_settings(
    config: CompareConfig, variant: Variant, checkpoint: Checkpoint
) -> tuple[dict[str, Any], str | None]:
    """Settings of the runs of a variant on a model, and what was chosen for that model."""
    method = variant.method
    prune = {name: getattr(config, name) for name in _PRUNING}
    if method.one_shot:
        prune["iterations"] = None
    prune |= variant.changes
    of_heads = method.removes == "units" and method.granularity == "kv_group" and "granularity" not in prune
    heads = max(layer.num_key_value_heads for layer in layer_widths(checkpoint.config))
    published = prune.get("allocation", method.allocation) == "reference"  # which counts rows of KV groups
    if heads == 1 and of_heads and not published:
        return {**prune, "granularity": "query_head"}, "one KV head: attention shrinks by query heads"
    return prune, None


def _check_pruning(row: Row, variant: Variant, checkpoint: Checkpoint) -> None:
    """That its settings can be, alone and with each other; those it has for itself also on this model."""
    family = find_family(checkpoint.config.get("model_type"))
    num_layers = len(layer_widths(checkpoint.config))
    try:
        config, _ = row.resolved(num_layers)
        parse_layers(config.protected_layers or "none", num_layers)
        family.with_granularity(config.granularity or "kv_group", config.mlp_granularity)
    except ValueError as error:
        if not variant.changes:
            raise
        raise ValueError(f"method {variant.name!r} on {row.model}: {error}") from None


def _file_name(row: Row) -> str:
    """Of its JSON file and its run directory; models in directories of the same name differ by their path."""
    model = re.sub(r"[^\w.+-]+", "_", row.model).strip("_")
    method = re.sub(r"[^\w.+=-]", "_", row.method)
    return "-".join([model, method, *([] if row.target is None else [f"{row.target:g}"])])


def find_baseline(config: CompareConfig, earlier: Collection[str] = (), before: str | None = None) -> str:
    """The name of the method that others are compared with.

    Args:
        earlier: methods that are in the comparison already.
        before: its baseline, which stays if none is given.
    Raises:
        ValueError: an unknown method, or one that is not compared.
    """
    names = [variant.name for variant in parse_variants(config.methods, ignored=DENSE)]
    if config.baseline:
        given = DENSE if config.baseline == DENSE else Variant.parse(config.baseline).name
        known = list(dict.fromkeys([DENSE, *names, *earlier]))
        if given not in known:
            raise ValueError(f"baseline is {config.baseline!r}, expected one of {known}")
        return given
    return before or ("adapt-pruner" if "adapt-pruner" in names else [*names, DENSE][0])
