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
    Counts,
    Floats,
    allocate,
    allocate_as_published,
    allocate_by_rank,
    allocate_uniform,
    bundle_importance,
    normalize_importance,
    select_units,
)
from adapt_pruner.allocation_search import Search, allocate_by_search
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
from adapt_pruner.compensation import missing_output_biases
from adapt_pruner.config import PruneConfig, parse_target
from adapt_pruner.data import (
    TokenizedDocuments,
    check_vocabulary,
    load_documents,
    prefix_token,
    sample_sequences,
    tokenize,
)
from adapt_pruner.engines.in_memory import InMemoryEngine, resolve_device
from adapt_pruner.families import (
    Family,
    find_family,
    layer_widths,
    removal_counts,
    unit_costs,
    unit_counts,
)
from adapt_pruner.latency import Keep, Latency, usage
from adapt_pruner.layer_removal import layer_parameters, removable_parameters, remove_layers
from adapt_pruner.methods import Method, find_method, parse_layers, require_experts_supported, resolve
from adapt_pruner.plan import Indices, PruningPlan
from adapt_pruner.report.plots import plot_run
from adapt_pruner.resources import Resource, find_resources
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring import Estimator, Scores
from adapt_pruner.scoring.gram import column_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEARCHED = 64  # calibration sequences that the allocation search measures losses of, at most


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
    """A finished run: its directory, the plan, and the contents of metrics.json.

    A method that removes dimensions of the hidden states has no plan: no kept units describe a rotation.
    """

    run_directory: Path
    model_directory: Path
    plan: PruningPlan | None
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
    method = method or find_method(config.method)
    if method.removes == "dimensions":
        from adapt_pruner.slicegpt_run import prune_dimensions  # which is built of parts of this file

        return prune_dimensions(config, method, checkpoint, on_iteration)
    family = find_family(checkpoint.config.get("model_type"))
    widths = layer_widths(checkpoint.config)
    config, estimator = resolve(config, len(widths), method)
    config = _with_prefix(config, checkpoint)
    granularity = config.granularity or "kv_group"
    family = family.with_granularity(granularity, config.mlp_granularity)
    if estimator is not None and any(layer.num_experts for layer in widths):
        require_experts_supported(config, estimator)
    budget, embeddings = _header_budget(checkpoint, family)
    budget = _restricted(config, budget)
    added = _added_parameters(config, checkpoint, family)
    floor = budget.floor + added
    if granularity == "layer":
        sizes = layer_parameters(checkpoint, family)
        floor = budget.num_parameters - removable_parameters(sizes, budget.protected)
    target = resolve_target(config, budget, embeddings, floor=floor, added=added)
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
        mlp_granularity=config.mlp_granularity,
        output_biases=config.compensation == "bias" and target != checkpoint.num_parameters,
    )
    run = RunDirectory.open(output, config, resume=config.resume)
    try:
        _prune(config, estimator, run, engine, tokens, budget, embeddings, target, resources, on_iteration)
        return _result(run)
    finally:
        run.close()


def _with_prefix(config: PruneConfig, checkpoint: Checkpoint) -> PruneConfig:
    """The settings with what the tokenizer decides."""
    if config.prefix_bos is not None:
        return config
    return dataclasses.replace(config, prefix_bos=prefix_token(_tokenizer(checkpoint), None) is not None)


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


def _added_parameters(config: PruneConfig, checkpoint: Checkpoint, family: Family) -> int:
    """Parameters that the pruned model has beside those the units leave: they count towards the target."""
    if config.compensation != "bias":
        return 0
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return sum(missing_output_biases(family, layer_widths(checkpoint.config), shapes).values())


def _saved_bytes(config: PruneConfig, checkpoint: Checkpoint, family: Family, target: int) -> int:
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
        if config.carry_over:
            state += sum(rows**2 + columns**2 for rows, columns in shapes) * 4
    return int(saved + 2 * state) + 32 * 2**20  # what a resume needs is there twice for a moment


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.directory)
    return tokenizer


def _calibration_tokens(config: PruneConfig, checkpoint: Checkpoint) -> TokenizedDocuments:
    tokenizer = _tokenizer(checkpoint)
    check_vocabulary(tokenizer, checkpoint.config["vocab_size"])
    documents = load_documents(
        config.calibration,
        part="calibration" if config.calibration == "default" else None,
        column=config.calibration_column,
    )
    prefix = prefix_token(tokenizer, config.prefix_bos)
    tokens = dataclasses.replace(tokenize(documents, tokenizer), prefix_token_id=prefix)
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
    estimator: Estimator | None,
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
    earlier: Scores | None = None
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
        engine.keep_layers(plan.kept_layers)
        tensors = run.load_tensors(iteration)
        engine.load_tensors({name: tensors[name] for name in _column_tensors(config, engine)})
        if config.carry_over:
            earlier = Scores.from_tensors(tensors, engine.model.device)
    run.log("resumed" if state else "started", iteration=iteration, parameters=engine.num_parameters)
    with _deterministic(engine.model.device):
        while True:
            now = None
            if estimator is not None:
                now = _restricted(config, engine.budget(budget.initial), resources)
                if not (latency.limited(now) if latency else now).over(now.current, target):
                    break
            elif engine.num_parameters <= target:
                break
            iteration += 1
            if estimator is None:
                record, plan = remove_layers(
                    config,
                    engine,
                    _draw(config, tokens, iteration),
                    plan,
                    protected=budget.protected,
                    target=target,
                    iteration=iteration,
                )
            else:
                assert now is not None
                record, keep, sparsity, earlier = _iterate(
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
            progress = {"sparsity": sparsity.tolist(), "plan": plan.to_json()}
            run.save_iteration(
                iteration,
                record,
                progress | ({"latency": latency.state()} if latency else {}),
                _column_tensors(config, engine) | (earlier.tensors() if earlier else {}),
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
                        record.get("resources", {}),
                    )
                )
    plan.save(run.plan)
    records = run.iterations()
    used = usage(resources, latency, now) if now else {}
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
    budget: UnitBudget,
    sparsity: Floats,
    target: int,
    iteration: int,
    *,
    resources: tuple[Resource, ...] = (),
    latency: Latency | None = None,
    earlier: Scores | None = None,
) -> tuple[dict[str, Any], tuple[dict[str, Indices], ...], Floats, Scores | None]:
    """One round of score, allocate and surgery.

    Args:
        earlier: what the rounds before measured at the units there are now, if it counts.
    Returns:
        Its record, the kept units, the sparsity, and what counts in the next round.
    """
    assert config.iterations is not None  # resolved
    carry_over = config.carry_over or 0.0
    clock = [time.perf_counter()]
    batch = _draw(config, tokens, iteration)
    scores = engine.score(
        batch,
        micro_batch_size=config.micro_batch_size,
        metric=config.layer_metric,
        gradients=config.gradients,
        estimator=estimator,
        gqa_credit=config.gqa_credit or "owner",
        seed=(config.seed, iteration),
        grams=config.compensation == "least_squares",
        means=config.compensation == "bias",
        ridge=config.ridge,
        earlier=earlier,
        share=1 / sum(carry_over**age for age in range(iteration)),
    )
    clock.append(time.perf_counter())
    layer_importance = normalize_importance(scores.layer_importance, config.normalize)
    lanes = [{kind.name: kind.lanes(w) for kind in engine.family.kinds_in(w)} for w in engine.widths]
    bundled = tuple(
        {kind: bundle_importance(values, layer_lanes[kind]) for kind, values in layer.items()}
        for layer, layer_lanes in zip(scores.unit_importance, lanes, strict=True)
    )
    rows = engine.widths[0].head_dim

    def kept(counts: Counts) -> Keep:
        return tuple(
            {kind: select_units(importance[kind], count, layer_lanes[kind]) for kind, count in layer.items()}
            for importance, layer, layer_lanes in zip(scores.unit_importance, counts, lanes, strict=True)
        )

    def choose(budget: UnitBudget) -> tuple[Allocation, Keep]:
        allocation = _allocate(config, budget, sparsity, layer_importance, bundled, target, rows)
        return allocation, kept(allocation.counts)

    search: Search | None = None
    if config.allocation == "search":
        with engine.masked_loss(batch[:SEARCHED], micro_batch_size=config.micro_batch_size) as loss:
            allocation, search = allocate_by_search(
                budget,
                sparsity,
                layer_importance,
                bundled,
                lambda counts: loss(kept(counts)),
                target=target,
                iterations=config.iterations,
                amplitude=config.amplitude,
                evaluations=config.search_evaluations,
                seed=(config.seed, iteration),
            )
        keep = kept(allocation.counts)
    else:
        allocation, keep = latency.settle(budget, target, choose, engine) if latency else choose(budget)
    clock.append(time.perf_counter())
    widths = engine.widths
    engine.remove_units(
        keep,
        grams=scores.grams if config.compensation == "least_squares" else None,
        means=scores.means,
        ridge=config.ridge,
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
    if search is not None:
        record["search"] = dataclasses.asdict(search)
    carried = scores.kept(engine.model, engine.family, widths, keep) if carry_over else None
    return record, keep, allocation.sparsity, carried


def _column_tensors(config: PruneConfig, engine: InMemoryEngine) -> dict[str, torch.Tensor]:
    """The weights that a plan alone does not give."""
    return engine.column_tensors() if config.compensation != "none" else {}


def _allocate(
    config: PruneConfig,
    budget: UnitBudget,
    sparsity: Floats,
    layer_importance: Floats,
    units: tuple[dict[str, Floats], ...],
    target: int,
    rows_of_head: int,
) -> Allocation:
    assert config.iterations is not None  # resolved
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
