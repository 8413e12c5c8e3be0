"""A run of a method that removes dimensions of the hidden states: settings -> widths -> slicing -> files."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapt_pruner.calibration import calibration_tokens, draw, with_prefix
from adapt_pruner.checkpoint import Checkpoint, copy_side_files, write_json
from adapt_pruner.config import PruneConfig, parse_target
from adapt_pruner.engines.device import deterministic, peak_memory, resolve_device
from adapt_pruner.engines.in_memory import DTYPES, load_model
from adapt_pruner.families import find_family
from adapt_pruner.methods import Method, resolve_dimensions
from adapt_pruner.output import atomic_directory, require_free_space
from adapt_pruner.pruner import IterationReport, OnIteration, PruneResult
from adapt_pruner.run import RunDirectory
from adapt_pruner.run_budget import embedding_parameters
from adapt_pruner.slicegpt import SliceBudget, SlicedModel, require_sliceable, slice_model

if TYPE_CHECKING:
    import torch


def prune_dimensions(
    config: PruneConfig, method: Method, checkpoint: Checkpoint, on_iteration: OnIteration | None
) -> PruneResult:
    """Slices a model to a parameter budget and writes a run directory; see `pruner.prune`.

    A run that was killed before its model was written starts over when it is resumed.

    Raises:
        ValueError: also for an architecture that cannot be sliced, and for settings about units.
    """
    require_sliceable(str(checkpoint.config.get("model_type")))
    config = with_prefix(resolve_dimensions(config, method), checkpoint)
    budget = SliceBudget.of(checkpoint.tensors, checkpoint.config["num_hidden_layers"])
    embeddings = embedding_parameters(checkpoint, find_family(checkpoint.config["model_type"]))
    target, widths = _land(config, checkpoint.num_parameters, budget, embeddings)
    run = RunDirectory(Path(config.output))
    run.check(config, resume=config.resume)
    if run.complete:
        return _result(run)
    resolve_device(config.device)
    per_parameter = checkpoint.num_bytes / checkpoint.num_parameters
    if config.dtype != "auto":
        per_parameter = DTYPES[config.dtype].itemsize
    require_free_space(run.path, int(budget.parameters(widths) * per_parameter) + 32 * 2**20)
    assert config.num_sequences is not None  # resolved
    if config.num_sequences * config.sequence_length < budget.hidden_size:
        warnings.warn(
            f"{config.num_sequences} sequences of {config.sequence_length} tokens are fewer than the "
            f"{budget.hidden_size} dimensions of the hidden states, whose last directions are arbitrary then",
            stacklevel=3,
        )
    tokens = calibration_tokens(config, checkpoint)
    model = load_model(checkpoint, device=config.device, dtype=config.dtype)
    run = RunDirectory.open(run.path, config, resume=config.resume)
    try:
        run.log("started", iteration=0, parameters=checkpoint.num_parameters)
        started = time.perf_counter()
        batch: torch.Tensor = draw(config, tokens, 1).to(model.device)
        with deterministic(model.device):
            sliced = slice_model(model, widths, batch, micro_batch_size=config.micro_batch_size)
        seconds = time.perf_counter() - started
        parameters = sum(p.numel() for p in sliced.model.parameters())
        assert parameters == budget.parameters(widths)
        record = {
            "iteration": 1,
            "loss": sliced.loss,
            "parameters": parameters,
            "hidden_widths": list(widths),
            "positions": _positions(sliced, widths),
            "seconds": {"slice": round(seconds, 4)},
        }
        run.save_iteration(1, record, {})
        run.log("iteration", iteration=1, loss=sliced.loss, parameters=parameters)
        if on_iteration:
            on_iteration(IterationReport(1, sliced.loss, checkpoint.num_parameters, parameters, target))
        metrics = {
            "parameters_before": checkpoint.num_parameters,
            "parameters_target": target,
            "parameters_after": parameters,
            "parameters_below_target": target - parameters,
            "resources": {},
            "non_embedding_before": checkpoint.num_parameters - embeddings,
            "non_embedding_after": budget.parameters(widths, embeddings=False),
            "hidden_size_before": budget.hidden_size,
            "hidden_widths_after": list(widths),
            "iterations": 1,
            "calibration_tokens": batch.numel(),
            "calibration_loss": [sliced.loss],
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(model.device),
        }
        write_json(run.metrics, metrics)
        if not run.model.exists():
            with atomic_directory(run.model) as partial:
                sliced.model.save_pretrained(partial)
                copy_side_files(checkpoint.directory, partial)
        run.log("finished", parameters=parameters)
        run.finish()
        return _result(run)
    finally:
        run.close()


def _land(
    config: PruneConfig, num_parameters: int, budget: SliceBudget, embeddings: int
) -> tuple[int, tuple[int, ...]]:
    """The target as a count of all parameters of the sliced model, and the widths below it.

    Embedding and head shrink with the hidden states, and a tied head becomes a matrix of its own: where the
    target leaves them out, what they have afterwards is added to it.

    Raises:
        ValueError: more than the model has, or less than one dimension of the hidden states leaves.
    """
    counted = config.target_of == "all"
    now = num_parameters - (0 if counted else embeddings)
    narrowest = (1,) * len(budget.per_dimension)
    floor = budget.parameters(narrowest, embeddings=counted)
    assert config.target is not None  # resolved
    value = parse_target(config.target)
    target = int(value * now) if isinstance(value, float) else value
    if not floor <= target <= now:
        relation = (
            "above the current size" if target > now else "below what hidden states of one dimension leave"
        )
        raise ValueError(
            f"target {config.target} of {config.target_of} is {target:,} parameters, {relation}: "
            f"expected {floor:,} to {now:,}"
        )
    widths = budget.land(target, embeddings=counted)
    return target + (0 if counted else budget.vocabulary * (widths[0] + widths[-1])), widths


def _positions(sliced: SlicedModel, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each position of the residual stream keeps of its activations."""
    blocks = ("attention", "mlp")
    names = [
        "embedding",
        *(f"layer {i} {block}" for i, block in itertools.product(range(len(widths) // 2), blocks)),
    ]
    records = []
    for name, values, width in zip(names, sliced.eigenvalues, widths, strict=True):
        spectrum = values.cpu().numpy()
        total = float(spectrum.sum())
        records.append(
            {
                "position": name,
                "width": width,
                "variance": total,
                "kept_variance": float(spectrum[:width].sum()) / total if total else 1.0,
                "eigenvalues": {
                    "first": float(spectrum[0]),
                    "median": float(np.median(spectrum)),
                    "last_kept": float(spectrum[width - 1]),
                    "last": float(spectrum[-1]),
                },
            }
        )
    return records


def _result(run: RunDirectory) -> PruneResult:
    return PruneResult(run.path, run.model, None, json.loads(run.metrics.read_text(encoding="utf-8")))
