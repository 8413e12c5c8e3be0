"""Budget, target and disk space of a run, from its settings and the headers of the checkpoint."""

from __future__ import annotations

import dataclasses

from adapt_pruner.budget import ATTENTION_UNITS, UnitBudget, model_budget
from adapt_pruner.checkpoint import Checkpoint
from adapt_pruner.compensation import missing_output_biases
from adapt_pruner.config import PruneConfig, parse_target
from adapt_pruner.families import Family, layer_widths
from adapt_pruner.methods import parse_layers
from adapt_pruner.resources import Resource
from adapt_pruner.scoring import Estimator
from adapt_pruner.scoring.gram import column_weights


def header_budget(checkpoint: Checkpoint, family: Family) -> tuple[UnitBudget, int]:
    """Budget and embedding parameters from the headers alone."""
    widths = layer_widths(checkpoint.config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return model_budget(family, widths, shapes), embedding_parameters(checkpoint, family)


def embedding_parameters(checkpoint: Checkpoint, family: Family) -> int:
    """Parameters in embedding and head; a tied head counts once."""
    return sum(checkpoint.tensors[n].numel for n in family.embeddings if n in checkpoint.tensors)


def restricted(config: PruneConfig, budget: UnitBudget, resources: tuple[Resource, ...] = ()) -> UnitBudget:
    """The budget with what the settings say may go, how fast, and what else is limited."""
    protected = parse_layers(config.protected_layers or "none", len(budget.initial))
    rates = {
        kind: rate
        for kind in sorted({k for layer in budget.initial for k in layer})
        if (rate := getattr(config, _rate_of(kind))) is not None  # none where whole layers go
    }
    limits = tuple(r.limit(budget) for r in resources)
    return dataclasses.replace(
        budget, protected=protected, rates=rates, round_to=config.round_to, limits=limits
    )


def _rate_of(kind: str) -> str:
    """The setting that says how fast units of a kind go."""
    return "attention_rate" if kind in ATTENTION_UNITS else "mlp_rate"


def resolve_target(
    config: PruneConfig, budget: UnitBudget, embeddings: int, *, floor: int, added: int = 0
) -> int:
    """The target as a count of all parameters: all there are if there is only a target for something else.

    Args:
        budget: of the model before pruning.
        embeddings: its parameters in embedding and head.
        floor: what it has at least once anything is pruned.
        added: what it gets in addition.
    Raises:
        ValueError: more than the model has, or less than what stays whatever the target.
    """
    if config.target is None:
        return budget.num_parameters + added
    base = embeddings if config.target_of == "non-embedding" else 0
    now = budget.num_parameters - base
    floor = min(now, floor - base)
    value = parse_target(config.target)
    target = int(value * now) if isinstance(value, float) else value
    if not floor <= target <= now:
        stays = [f"all of {kind} ({_rate_of(kind)} 0)" for kind, rate in budget.rates.items() if rate == 0]
        stays += [f"layers {config.protected_layers} (protected)"] if budget.protected else []
        unit = "one unit" if config.round_to == 1 else f"one unit, {config.round_to} channels,"
        first = "one layer leaves" if config.granularity == "layer" else f"{unit} per layer leaves"
        least = " beside ".join([first, *stays])
        relation = "above the current size" if target > now else f"below what {least}"
        raise ValueError(
            f"target {config.target} of {config.target_of} is {target:,} parameters, {relation}: "
            f"expected {floor:,} to {now:,}"
        )
    return target + base


def added_parameters(config: PruneConfig, checkpoint: Checkpoint, family: Family) -> int:
    """Parameters that the pruned model has beside those the units leave: they count towards the target."""
    if config.compensation != "bias":
        return 0
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return sum(missing_output_biases(family, layer_widths(checkpoint.config), shapes).values())


def saved_bytes(
    config: PruneConfig, estimator: Estimator | None, checkpoint: Checkpoint, family: Family, target: int
) -> int:
    """Bytes of the pruned model and what is written beside it."""
    per_parameter = checkpoint.num_bytes / checkpoint.num_parameters
    if config.dtype != "auto":
        per_parameter = 4 if config.dtype == "fp32" else 2
    shapes = [
        checkpoint.tensors[name].shape
        for layer, widths in enumerate(layer_widths(checkpoint.config))
        for name in column_weights(family, layer, widths, checkpoint.tensors)
    ]
    saved, state = target * per_parameter, 0.0
    if config.compensation == "bias":
        state += sum(rows for rows, _ in shapes) * per_parameter
    if config.compensation == "least_squares":
        state += sum(rows * columns for rows, columns in shapes) * per_parameter
    by_grams = estimator is not None and estimator.grams
    if config.carry_over and (by_grams or config.compensation == "least_squares"):
        state += sum(rows**2 + columns**2 for rows, columns in shapes) * 4
    return int(saved + 2 * state) + 32 * 2**20  # what a resume needs is there twice for a moment
