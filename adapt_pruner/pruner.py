"""The pruning loop: score -> allocate -> plan -> surgery, until the parameter budget is met."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt_pruner.allocation import Floats
from adapt_pruner.assets import resolve_model
from adapt_pruner.budget import Counts, UnitBudget
from adapt_pruner.calibration import calibration_tokens, draw, with_prefix
from adapt_pruner.checkpoint import Checkpoint, config_hash, open_checkpoint, write_json
from adapt_pruner.config import PruneConfig, parse_bytes
from adapt_pruner.data import TokenizedDocuments
from adapt_pruner.engines import Engine, InMemoryEngine
from adapt_pruner.engines.choice import Choice, choose_engine, require_engine
from adapt_pruner.engines.device import deterministic, peak_memory, resolve_device
from adapt_pruner.engines.streaming import StreamingEngine
from adapt_pruner.families import Family, find_family, layer_widths, unit_counts
from adapt_pruner.iteration import iterate
from adapt_pruner.latency import Latency, usage
from adapt_pruner.layer_removal import layer_parameters, removable_parameters, remove_layers
from adapt_pruner.methods import Method, find_method, require_experts_supported, resolve
from adapt_pruner.output import require_free_space
from adapt_pruner.plan import PruningPlan
from adapt_pruner.report.plots import plot_run
from adapt_pruner.resources import Resource, find_resources
from adapt_pruner.run import FollowedRun, RunDirectory
from adapt_pruner.run_budget import added_parameters, header_budget, resolve_target, restricted, saved_bytes
from adapt_pruner.scoring import Estimator, Scores
from adapt_pruner.sharding import join_processes, together, world

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Progress:
    """What earlier runs have taken from a model: its units before all of them, and how sparse layers are now.

    `sparsity` has for each layer the cumulative fraction that the allocation is at (algorithm.md section 4).
    """

    initial: Counts
    sparsity: tuple[float, ...]


OnIteration = Callable[[IterationReport], None]


@dataclass(frozen=True)
class PruneResult:
    """A finished run: its directory, the plan, and the contents of metrics.json.

    A method that removes dimensions of the hidden states has no plan: no kept units describe a rotation.
    """

    run_directory: Path
    model_directory: Path
    plan: PruningPlan | None
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What settings and headers say of a run: settings without gaps, what is scored, and how much may stay.

    `target` counts all parameters.
    """

    config: PruneConfig
    estimator: Estimator | None
    family: Family
    budget: UnitBudget
    embeddings: int
    target: int


def set_up(
    config: PruneConfig, method: Method, checkpoint: Checkpoint, progress: Progress | None = None
) -> Setup:
    """Resolves the settings of a run; no weight is read.

    Args:
        progress: of earlier runs on this model.
    Raises:
        ValueError: settings that do not fit the model or the number of processes, or a target out of its
            reach.
    """
    family = find_family(checkpoint.config.get("model_type"))
    widths = layer_widths(checkpoint.config)
    config, estimator = resolve(config, len(widths), method)
    config = with_prefix(config, checkpoint)
    if config.granularity == "query_head" and all(
        w.num_attention_heads == w.num_key_value_heads for w in widths
    ):
        config = dataclasses.replace(config, granularity="kv_group")  # of one query head each
    granularity = config.granularity or "kv_group"
    family = family.with_granularity(granularity, config.mlp_granularity)
    if estimator is not None and any(layer.num_experts for layer in widths):
        require_experts_supported(config, estimator)
    require_engine(config, estimator, widths)
    budget, embeddings = header_budget(checkpoint, family)
    if progress is not None:
        budget = dataclasses.replace(budget, initial=progress.initial)
    budget = restricted(config, budget)
    added = added_parameters(config, checkpoint, family)
    floor = budget.floor + added
    if granularity == "layer":
        sizes = layer_parameters(checkpoint, family)
        floor = budget.num_parameters - removable_parameters(sizes, budget.protected)
    target = resolve_target(config, budget, embeddings, floor=floor, added=added)
    return Setup(config, estimator, family, budget, embeddings, target)


def prune(
    config: PruneConfig,
    *,
    method: Method | None = None,
    on_iteration: OnIteration | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prunes a model to a budget of parameters or other resources and writes a run directory.

    What headers and text tell is checked before any weight is loaded, and the weights before the run
    directory is made. The run can be killed at any moment; with `resume` it goes on behind the last finished
    iteration and ends with the same bytes.

    Started by torchrun, all processes prune one model that none of them holds whole. They share the output
    directory, in which the first one writes, and each gets the result.

    Args:
        method: instead of the one that `config` names, such as one of your own.
        on_iteration: called after each finished iteration, in the first process.
        progress: of earlier runs that the model comes from, which this one goes on with.
    Raises:
        ValueError: a setting, the model, the target or the calibration text does not fit; the message names
            the value seen and what was expected.
        FileExistsError: the output directory is not empty.
        OSError: not enough disk space for the pruned model.
    Source: arXiv 2502.03460 section 3, algorithm.md section 4.
    """
    checkpoint = open_checkpoint(resolve_model(config.model))
    method = method or find_method(config.method)
    processes = join_processes(resolve_device(config.device).type).size
    if method.removes == "dimensions":
        from adapt_pruner.slicegpt_run import prune_dimensions  # which is built of parts of this file

        if processes > 1:
            raise ValueError(f"method is {method.name!r}, which one process prunes with: found {processes}")
        if config.engine not in ("auto", "in-memory"):
            raise ValueError(f"engine is {config.engine!r}, expected 'in-memory' for method {method.name!r}")
        return prune_dimensions(config, method, checkpoint, on_iteration)
    setup = set_up(config, method, checkpoint, progress)
    config, estimator, family = setup.config, setup.estimator, setup.family
    budget, target = setup.budget, setup.target
    resources = find_resources(config, checkpoint, family, budget)
    removes = restricted(config, budget, resources).over(budget.current, target)
    removes |= config.targets().get("target_latency", 1.0) != 1.0
    output = Path(config.output)
    RunDirectory(output).check(config, resume=config.resume)
    if RunDirectory(output).complete:
        return _result(RunDirectory(output))
    resolve_device(config.device)
    saved = saved_bytes(config, estimator, checkpoint, family, target)
    require_free_space(output, saved)
    tokens = calibration_tokens(config, checkpoint)
    state = RunDirectory(output).load_state()
    choice = choose_engine(config, estimator, checkpoint, family, before=RunDirectory(output).engine)
    if config.engine == "auto":
        logger.info("engine %s: %s", *choice)
    engine = _engine(
        config, checkpoint, choice.engine, output_biases=config.compensation == "bias" and removes
    )
    if isinstance(engine, StreamingEngine):
        assert config.num_sequences is not None  # resolved
        require_free_space(output, saved + engine.disk_bytes(config.num_sequences, config.sequence_length))
    latency = None
    if config.target_latency is not None:
        assert isinstance(engine, InMemoryEngine)
        latency = Latency(config, engine, budget, state["latency"] if state else None)
    run: RunDirectory = FollowedRun(output)
    with together():
        if world().rank == 0:
            run = RunDirectory.open(output, config, resume=config.resume)
            run.keep_engine(choice.engine)
    try:
        _prune(setup, run, engine, choice, tokens, resources, latency, progress, on_iteration)
        return _result(run)
    finally:
        run.close()


def _engine(config: PruneConfig, checkpoint: Checkpoint, name: str, *, output_biases: bool) -> Engine:
    """The model, in this process, layer by layer in its files, or shared out over all processes."""
    granularity = config.granularity or "kv_group"
    where: dict[str, Any] = {"device": config.device, "dtype": config.dtype, "backend": config.backend}
    if name == "sharded":
        from adapt_pruner.engines.sharded import ShardedEngine

        return ShardedEngine(checkpoint, granularity=granularity, **where)
    if name == "streaming":
        output = Path(config.output)
        return StreamingEngine(
            checkpoint,
            directory=next(p for p in (output, *output.absolute().parents) if p.is_dir()),
            memory=None if config.memory is None else parse_bytes("memory", config.memory),
            granularity=granularity,
            **where,
        )
    return InMemoryEngine(
        checkpoint,
        granularity=granularity,
        mlp_granularity=config.mlp_granularity,
        output_biases=output_biases,
        **where,
    )


def _prune(
    setup: Setup,
    run: RunDirectory,
    engine: Engine,
    choice: Choice,
    tokens: TokenizedDocuments,
    resources: tuple[Resource, ...],
    latency: Latency | None,
    progress: Progress | None,
    on_iteration: OnIteration | None,
) -> None:
    config, estimator, budget, target = setup.config, setup.estimator, setup.budget, setup.target
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
    sparsity: Floats = np.array(progress.sparsity) if progress else np.zeros(len(budget.initial))
    earlier: Scores | None = None
    iteration = 0
    state = run.load_state()
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
        tensors = run.load_tensors(iteration)
        if isinstance(engine, InMemoryEngine):
            engine.keep_layers(plan.kept_layers)
            engine.load_tensors({name: tensors[name] for name in _column_tensors(config, engine)})
        if config.carry_over:
            earlier = Scores.from_tensors(tensors, engine.device)
    run.log(
        "resumed" if state else "started",
        iteration=iteration,
        parameters=engine.num_parameters,
        engine=choice.engine,
        engine_because=choice.reason,
        **({"processes": world().size} if world().size > 1 else {}),
    )
    with deterministic(engine.device):
        while True:
            now = None
            if estimator is not None:
                now = restricted(config, engine.budget(budget.initial), resources)
                if not (latency.limited(now) if latency else now).over(now.current, target):
                    break
            elif engine.num_parameters <= target:
                break
            iteration += 1
            if estimator is None:
                assert isinstance(engine, InMemoryEngine)
                record, plan = remove_layers(
                    config,
                    engine,
                    draw(config, tokens, iteration),
                    plan,
                    protected=budget.protected,
                    target=target,
                    iteration=iteration,
                )
            else:
                assert now is not None
                record, keep, sparsity, earlier = iterate(
                    config,
                    estimator,
                    engine,
                    tokens,
                    now,
                    sparsity,
                    target,
                    iteration,
                    resources=resources,
                    latency=latency,
                    earlier=earlier,
                )
                plan = dataclasses.replace(
                    plan,
                    keep_indices=tuple(
                        {kind: old[kind][new[kind]] for kind in old}
                        for old, new in zip(plan.keep_indices, keep, strict=True)
                    ),
                )
            state = {"sparsity": sparsity.tolist(), "plan": plan.to_json()}
            run.save_iteration(
                iteration,
                record,
                state | ({"latency": latency.state()} if latency else {}),
                _column_tensors(config, engine) | (earlier.tensors() if earlier else {}),
            )
            run.log("iteration", **{key: record[key] for key in ("iteration", "loss", "parameters")})
            if on_iteration and world().rank == 0:
                on_iteration(
                    IterationReport(
                        iteration,
                        record["loss"],
                        budget.num_parameters,
                        record["parameters"],
                        None if config.target is None else target,
                        record.get("resources", {}),
                    )
                )
    with together():
        if world().rank == 0:
            plan.save(run.plan)
            records = run.iterations()
            used = usage(resources, latency, now) if now else {}
            metrics = _metrics(config, engine, budget, setup.embeddings, target, used, records)
            write_json(run.metrics, metrics)
            if records:
                plot_run(records, run.path / "widths.png", initial=units)
    if not run.model.exists():
        engine.save(run.model)
    with together():
        run.log("finished", parameters=engine.num_parameters)
        run.finish()


def _column_tensors(config: PruneConfig, engine: Engine) -> dict[str, torch.Tensor]:
    """The weights that a plan alone does not give."""
    if config.compensation == "none":
        return {}
    assert isinstance(engine, InMemoryEngine)
    return engine.column_tensors()


def _plan_settings(config: PruneConfig) -> dict[str, Any]:
    """What decided the plan; where it was written and on what it ran is not part of it."""
    settings = dataclasses.asdict(config)
    for key in ("output", "resume", "device", "backend", "gradients", "engine", "memory"):
        del settings[key]
    return settings


def _metrics(
    config: PruneConfig,
    engine: Engine,
    budget: UnitBudget,
    embeddings: int,
    target: int,
    used: dict[str, dict[str, float]],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    assert config.num_sequences is not None  # resolved
    before, after = budget.num_parameters, engine.num_parameters
    aimed = config.target is not None
    return {
        "parameters_before": before,
        "parameters_target": target if aimed else None,
        "parameters_after": after,
        "parameters_below_target": target - after if aimed else None,
        "resources": used,
        "non_embedding_before": before - embeddings,
        "non_embedding_after": after - embeddings,
        "iterations": len(records),
        "calibration_tokens": len(records) * config.num_sequences * config.sequence_length,
        "calibration_loss": [record["loss"] for record in records],
        "seconds": round(sum(sum(record["seconds"].values()) for record in records), 3),
        "peak_memory_bytes": peak_memory(engine.device),
    }


def _result(run: RunDirectory) -> PruneResult:
    metrics = json.loads(run.metrics.read_text(encoding="utf-8"))
    return PruneResult(run.path, run.model, PruningPlan.load(run.plan), metrics)
