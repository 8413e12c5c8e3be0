"""The pruning loop: score -> allocate -> plan -> surgery, until the parameter budget is met."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapt_pruner.allocation import (
    Allocation,
    Floats,
    allocate,
    allocate_as_published,
    allocate_by_rank,
    allocate_uniform,
    bundle_importance,
    normalize_importance,
    select_units,
)
from adapt_pruner.assets import resolve_model
from adapt_pruner.budget import ATTENTION_UNITS, UnitBudget
from adapt_pruner.checkpoint import (
    Checkpoint,
    atomic_directory,
    config_hash,
    open_checkpoint,
    require_free_space,
    write_json,
)
from adapt_pruner.config import PruneConfig, parse_target
from adapt_pruner.data import TokenizedDocuments, check_vocabulary, load_documents, sample_sequences, tokenize
from adapt_pruner.engines.in_memory import InMemoryEngine, resolve_device
from adapt_pruner.families import (
    Family,
    find_family,
    layer_widths,
    removal_counts,
    unit_costs,
    unit_counts,
)
from adapt_pruner.latency import Latency, usage
from adapt_pruner.methods import Method, parse_layers, resolve
from adapt_pruner.plan import Indices, PruningPlan
from adapt_pruner.report.plots import plot_run
from adapt_pruner.resources import Resource, find_resources
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring import Estimator
from adapt_pruner.scoring.gram import column_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class IterationReport:
    """Where a run stands after an iteration: loss in nats per token, parameters before, now and asked for.

    `resources` has "before", "after" (now) and "target" of each other limited resource, latency in seconds.
    """

    iteration: int
    loss: float
    parameters_before: int
    parameters: int
    parameters_target: int | None
    resources: dict[str, dict[str, float]] = field(default_factory=dict)


OnIteration = Callable[[IterationReport], None]


@dataclass(frozen=True)
class PruneResult:
    """A finished run: its directory, the plan, and the contents of metrics.json."""

    run_directory: Path
    model_directory: Path
    plan: PruningPlan
    metrics: dict[str, Any]


def prune(
    config: PruneConfig, *, method: Method | None = None, on_iteration: OnIteration | None = None
) -> PruneResult:
    """Prunes a model to a budget of parameters or other resources and writes a run directory.

    What headers and text tell is checked before any weight is loaded, and the weights before the run
    directory is made. The run can be killed at any moment; with `resume` it goes on behind the last finished
    iteration and ends with the same bytes.

    Args:
        method: instead of the one that `config` names, such as one of your own.
        on_iteration: called after each finished iteration.
    Raises:
        ValueError: a setting, the model, the target or the calibration text does not fit; the message names
            the value seen and what was expected.
        FileExistsError: the output directory is not empty.
        OSError: not enough disk space for the pruned model.
    Source: arXiv 2502.03460 section 3, algorithm.md section 4.
    """
    checkpoint = open_checkpoint(resolve_model(config.model))
    family = find_family(checkpoint.config.get("model_type"))
    config, estimator = resolve(config, len(layer_widths(checkpoint.config)), method)
    granularity = config.granularity or "kv_group"
    family = family.with_granularity(granularity)
    budget, embeddings = _header_budget(checkpoint, family)
    budget = _restricted(config, budget)
    target = resolve_target(config, budget, embeddings)
    resources = find_resources(config, checkpoint, family, budget)
    output = Path(config.output)
    RunDirectory(output).check(config, resume=config.resume)
    if RunDirectory(output).complete:
        return _result(RunDirectory(output))
    resolve_device(config.device)
    require_free_space(output, _saved_bytes(config, checkpoint, family, target))
    tokens = _calibration_tokens(config, checkpoint)
    engine = InMemoryEngine(
        checkpoint,
        device=config.device,
        dtype=config.dtype,
        backend=config.backend,
        granularity=granularity,
    )
    run = RunDirectory.open(output, config, resume=config.resume)
    try:
        _prune(config, estimator, run, engine, tokens, budget, embeddings, target, resources, on_iteration)
        return _result(run)
    finally:
        run.close()


def resolve_target(config: PruneConfig, budget: UnitBudget, embeddings: int) -> int:
    """The target as a count of all parameters: all there are if there is only a target for something else.

    Args:
        budget: of the model before pruning.
        embeddings: its parameters in embedding and head.
    Raises:
        ValueError: more than the model has, or less than what stays whatever the target.
    """
    if config.target is None:
        return budget.num_parameters
    base = embeddings if config.target_of == "non-embedding" else 0
    now, floor = budget.num_parameters - base, budget.floor - base
    value = parse_target(config.target)
    target = int(value * now) if isinstance(value, float) else value
    if not floor <= target <= now:
        stays = [f"all of {kind} ({_rate_of(kind)} 0)" for kind, rate in budget.rates.items() if rate == 0]
        stays += [f"layers {config.protected_layers} (protected)"] if budget.protected else []
        unit = "one unit" if config.round_to == 1 else f"one unit, {config.round_to} channels,"
        least = " beside ".join([f"{unit} per layer leaves", *stays])
        relation = "above the current size" if target > now else f"below what {least}"
        raise ValueError(
            f"target {config.target} of {config.target_of} is {target:,} parameters, {relation}: "
            f"expected {floor:,} to {now:,}"
        )
    return target + base


def _header_budget(checkpoint: Checkpoint, family: Family) -> tuple[UnitBudget, int]:
    """Budget and embedding parameters from the headers alone."""
    widths = layer_widths(checkpoint.config)
    counts = removal_counts(family, widths)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    costs = unit_costs(family, widths, shapes)
    embeddings = sum(checkpoint.tensors[n].numel for n in family.embeddings if n in checkpoint.tensors)
    return UnitBudget(counts, counts, costs, checkpoint.num_parameters), embeddings


def _restricted(config: PruneConfig, budget: UnitBudget, resources: tuple[Resource, ...] = ()) -> UnitBudget:
    """The budget with what the settings say may go, how fast, and what else is limited."""
    protected = parse_layers(config.protected_layers or "none", len(budget.initial))
    rates = {
        kind: getattr(config, _rate_of(kind))
        for kind in sorted({k for layer in budget.initial for k in layer})
    }
    limits = tuple(r.limit(budget) for r in resources)
    return dataclasses.replace(
        budget, protected=protected, rates=rates, round_to=config.round_to, limits=limits
    )


def _rate_of(kind: str) -> str:
    """The setting that says how fast units of a kind go."""
    return "attention_rate" if kind in ATTENTION_UNITS else "mlp_rate"


def _saved_bytes(config: PruneConfig, checkpoint: Checkpoint, family: Family, target: int) -> int:
    """Bytes of the pruned model and what is written beside it."""
    per_parameter = checkpoint.num_bytes / checkpoint.num_parameters
    if config.dtype != "auto":
        per_parameter = 4 if config.dtype == "fp32" else 2
    saved = target
    if config.compensation != "none":  # the weights that a resume needs, of two iterations for a moment
        names = [
            name
            for layer, widths in enumerate(layer_widths(checkpoint.config))
            for name in column_weights(family, layer, widths, checkpoint.tensors)
        ]
        saved += 2 * sum(checkpoint.tensors[name].numel for name in names)
    return int(saved * per_parameter) + 32 * 2**20


def _calibration_tokens(config: PruneConfig, checkpoint: Checkpoint) -> TokenizedDocuments:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.config["vocab_size"])
    documents = load_documents(
        config.calibration,
        part="calibration" if config.calibration == "default" else None,
        column=config.calibration_column,
    )
    tokens = tokenize(documents, tokenizer)
    _draw(config, tokens, 0)  # too little text shows now, not after the model is loaded
    return tokens


def _draw(config: PruneConfig, tokens: TokenizedDocuments, iteration: int) -> torch.Tensor:
    return sample_sequences(
        tokens,
        config.num_sequences,
        config.sequence_length,
        seed=config.seed,
        iteration=iteration,
        pack=config.pack,
    )


def _prune(
    config: PruneConfig,
    estimator: Estimator,
    run: RunDirectory,
    engine: InMemoryEngine,
    tokens: TokenizedDocuments,
    budget: UnitBudget,
    embeddings: int,
    target: int,
    resources: tuple[Resource, ...],
    on_iteration: OnIteration | None,
) -> None:
    units = unit_counts(engine.family, engine.widths)
    plan = PruningPlan(
        base_model=config.model,
        config_hash=config_hash(engine.checkpoint.config),
        weight_fingerprint=engine.checkpoint.fingerprint(),
        family=engine.family.name,
        settings=_plan_settings(config),
        initial_units=units,
        keep_indices=tuple({k: np.arange(n) for k, n in layer.items()} for layer in units),
    )
    sparsity: Floats = np.zeros(len(budget.initial))
    iteration = 0
    state = run.load_state()
    latency = None
    if config.target_latency is not None:
        latency = Latency(config, engine, budget, state["latency"] if state else None)
    if state is not None:
        iteration = state["iteration"]
        sparsity = np.array(state["sparsity"])
        saved = PruningPlan.from_json(state["plan"])
        if (saved.config_hash, saved.weight_fingerprint) != (plan.config_hash, plan.weight_fingerprint):
            raise ValueError(
                f"cannot resume {run.path}: {config.model} has changed since the run was started"
            )
        plan = saved
        engine.remove_units(plan.keep_indices)
        if config.compensation != "none":
            engine.load_tensors(run.load_tensors(iteration))
    run.log("resumed" if state else "started", iteration=iteration, parameters=engine.num_parameters)
    with _deterministic(engine.model.device):
        while True:
            now = _restricted(config, engine.budget(budget.initial), resources)
            if not (latency.limited(now) if latency else now).over(now.current, target):
                break
            iteration += 1
            record, keep, sparsity = _iterate(
                config,
                estimator,
                engine,
                tokens,
                budget.initial,
                sparsity,
                target,
                iteration,
                resources=resources,
                latency=latency,
            )
            plan = dataclasses.replace(
                plan,
                keep_indices=tuple(
                    {kind: old[kind][new[kind]] for kind in old}
                    for old, new in zip(plan.keep_indices, keep, strict=True)
                ),
            )
            progress = {"sparsity": sparsity.tolist(), "plan": plan.to_json()}
            run.save_iteration(
                iteration,
                record,
                progress | ({"latency": latency.state()} if latency else {}),
                engine.column_tensors() if config.compensation != "none" else None,
            )
            run.log("iteration", **{key: record[key] for key in ("iteration", "loss", "parameters")})
            if on_iteration:
                on_iteration(
                    IterationReport(
                        iteration,
                        record["loss"],
                        budget.num_parameters,
                        record["parameters"],
                        None if config.target is None else target,
                        record["resources"],
                    )
                )
    plan.save(run.plan)
    records = run.iterations()
    used = usage(resources, latency, now)
    write_json(
        run.metrics,
        _metrics(engine, budget, embeddings, None if config.target is None else target, used, records),
    )
    if records:
        plot_run(records, run.path / "widths.png", initial=units)
    if not run.model.exists():
        with atomic_directory(run.model) as partial:
            engine.save(partial)
    run.log("finished", parameters=engine.num_parameters)
    run.finish()


def _iterate(
    config: PruneConfig,
    estimator: Estimator,
    engine: InMemoryEngine,
    tokens: TokenizedDocuments,
    initial: tuple[dict[str, int], ...],
    sparsity: Floats,
    target: int,
    iteration: int,
    *,
    resources: tuple[Resource, ...] = (),
    latency: Latency | None = None,
) -> tuple[dict[str, Any], tuple[dict[str, Indices], ...], Floats]:
    """One round of score, allocate and surgery; returns its record, the kept units and the sparsity."""
    clock = [time.perf_counter()]
    scores = engine.score(
        _draw(config, tokens, iteration),
        micro_batch_size=config.micro_batch_size,
        metric=config.layer_metric,
        gradients=config.gradients,
        estimator=estimator,
        gqa_credit=config.gqa_credit or "owner",
        seed=(config.seed, iteration),
        grams=config.compensation != "none",
        ridge=config.ridge,
    )
    clock.append(time.perf_counter())
    layer_importance = normalize_importance(scores.layer_importance, config.normalize)
    lanes = [{kind.name: kind.lanes(w) for kind in engine.family.unit_kinds} for w in engine.widths]
    bundled = tuple(
        {kind: bundle_importance(values, layer_lanes[kind]) for kind, values in layer.items()}
        for layer, layer_lanes in zip(scores.unit_importance, lanes, strict=True)
    )
    budget = _restricted(config, engine.budget(initial), resources)
    rows = engine.widths[0].head_dim

    def choose(budget: UnitBudget) -> tuple[Allocation, tuple[dict[str, Indices], ...]]:
        allocation = _allocate(config, budget, sparsity, layer_importance, bundled, target, rows)
        return allocation, tuple(
            {kind: select_units(importance[kind], count, layer_lanes[kind]) for kind, count in counts.items()}
            for importance, counts, layer_lanes in zip(
                scores.unit_importance, allocation.counts, lanes, strict=True
            )
        )

    allocation, keep = latency.settle(budget, target, choose, engine) if latency else choose(budget)
    clock.append(time.perf_counter())
    engine.remove_units(
        keep, grams=scores.grams if config.compensation != "none" else None, ridge=config.ridge
    )
    clock.append(time.perf_counter())
    record = {
        "iteration": iteration,
        "loss": scores.loss,
        "parameters": engine.num_parameters,
        "resources": usage(resources, latency, dataclasses.replace(budget, current=allocation.counts)),
        "landed": allocation.landed,
        "sparsity": allocation.sparsity.tolist(),
        "layer_importance": scores.layer_importance.tolist(),
        "layer_importance_normalised": layer_importance.tolist(),
        "units": [{kind: len(indices) for kind, indices in layer.items()} for layer in keep],
        "unit_importance": [
            {
                kind: {"min": float(v.min()), "mean": float(v.mean()), "max": float(v.max())}
                for kind, v in layer.items()
            }
            for layer in scores.unit_importance
        ],
        "seconds": dict(zip(("score", "allocate", "surgery"), np.diff(clock).round(4).tolist(), strict=True)),
    }
    return record, keep, allocation.sparsity


def _allocate(
    config: PruneConfig,
    budget: UnitBudget,
    sparsity: Floats,
    layer_importance: Floats,
    units: tuple[dict[str, Floats], ...],
    target: int,
    rows_of_head: int,
) -> Allocation:
    rounds: dict[str, int] = {"target": target, "iterations": config.iterations}
    if config.allocation == "uniform":
        return allocate_uniform(budget, sparsity, units, **rounds)
    if config.allocation in ("global", "threshold"):
        return allocate_by_rank(budget, units, per_parameter=config.allocation == "global", **rounds)
    adaptive: dict[str, Any] = {**rounds, "amplitude": config.amplitude}
    if config.allocation == "reference":
        return allocate_as_published(budget, sparsity, layer_importance, rows=rows_of_head, **adaptive)
    assert config.allocation == "adaptive"
    return allocate(budget, sparsity, layer_importance, units, **adaptive)


def _plan_settings(config: PruneConfig) -> dict[str, Any]:
    """What decided the plan; where it was written and on what it ran is not part of it."""
    settings = dataclasses.asdict(config)
    for key in ("output", "resume", "device", "backend", "gradients"):
        del settings[key]
    return settings


def _metrics(
    engine: InMemoryEngine,
    budget: UnitBudget,
    embeddings: int,
    target: int | None,
    used: dict[str, dict[str, float]],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    before, after = budget.num_parameters, engine.num_parameters
    return {
        "parameters_before": before,
        "parameters_target": target,
        "parameters_after": after,
        "parameters_below_target": None if target is None else target - after,
        "resources": used,
        "non_embedding_before": before - embeddings,
        "non_embedding_after": after - embeddings,
        "iterations": len(records),
        "calibration_loss": [record["loss"] for record in records],
        "seconds": round(sum(sum(record["seconds"].values()) for record in records), 3),
        "peak_memory_bytes": _peak_memory(engine.model.device),
    }


def _peak_memory(device: torch.device) -> int:
    """Largest resident memory of this process, or largest allocation on the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """The same bits from run to run; on the CPU that is so already for one number of threads."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _result(run: RunDirectory) -> PruneResult:
    metrics = json.loads(run.metrics.read_text(encoding="utf-8"))
    return PruneResult(run.path, run.model, PruningPlan.load(run.plan), metrics)
