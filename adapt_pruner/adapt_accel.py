"""Adapt-Accel: pruning interleaved with recovery training, in stages that one run directory holds.

A stage is a run of `prune` and one of `recover`, each complete or absent, so the state of the whole is which
of them are there: a killed run goes on with the first one that is not.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import Checkpoint, open_checkpoint, write_json
from adapt_pruner.engines.device import resolve_device
from adapt_pruner.families import layer_widths
from adapt_pruner.methods import find_method
from adapt_pruner.output import atomic_directory
from adapt_pruner.plan import PruningPlan
from adapt_pruner.pruner import OnIteration, Progress, Setup, prune, set_up
from adapt_pruner.recovery.config import AccelConfig
from adapt_pruner.recovery.moments import Moments
from adapt_pruner.recovery.recover import FREE_TO_CHANGE, KEPT_STATE, Part, recover, recovery_data, whole
from adapt_pruner.recovery.split import split_examples
from adapt_pruner.run import RunDirectory
from adapt_pruner.sharding import join_processes, together

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_RUNS = ("prune", "recover")  # the directories of a stage
_OF_TRAINING = (
    "held_out_loss_before", "held_out_loss", "held_out_perplexity", "steps", "tokens", "tokens_per_second",
)  # fmt: skip
# A resumed run may have others of these, as `recover` may.
_FREE_TO_CHANGE = ("output", "resume", *(f"recover.{name}" for name in FREE_TO_CHANGE))


@dataclass(frozen=True)
class Stage:
    """One pruning and one recovery.

    Args:
        number: from 1.
        target: parameters to keep, of all.
        examples: sequences of the recovery text to train on.
        steps: optimizer steps.
        first_step, total_steps: where these lie in the learning-rate schedule that spans all stages.
    """

    number: int
    target: int
    examples: range
    steps: int
    first_step: int
    total_steps: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.number:02}"

    def part(self, moments: Moments | None, *, keep_state: bool) -> Part:
        """Of the recovery, for `recover`."""
        return Part(self.examples, self.steps, self.first_step, self.total_steps, moments, keep_state)


@dataclass(frozen=True)
class AccelResult:
    """A finished run: its directory, the model of the last stage, and the contents of metrics.json."""

    run_directory: Path
    model_directory: Path
    metrics: dict[str, Any]


def accel(
    config: AccelConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_iteration: OnIteration | None = None,
) -> AccelResult:
    """Prunes a model in stages, trains it after each, and writes a run directory.

    Started by torchrun, all processes prune and train together. It can be killed at any moment; with `resume`
    it goes on with the stage it was in, and with the checkpoint of its training.

    Args:
        callbacks: of transformers' Trainer, in every stage.
        on_iteration: called after each iteration of pruning, in the first process.
    Raises:
        ValueError: a setting, the model, the target or the text does not fit.
        Diverged: the loss of a stage is not finite or far above its beginning. The stages before it remain.
        FileExistsError: the output directory is not empty.
    Source: arXiv 2502.03460 section 3.3, algorithm.md section 5.
    """
    checkpoint = open_checkpoint(resolve_model(config.model))
    device = resolve_device(config.recovery(config.model, "-", False).device)
    first = join_processes(device.type).rank == 0
    output = Path(config.output)
    run = RunDirectory(output, free_to_change=_FREE_TO_CHANGE)
    with together():  # all see the directory as it was
        run.check(config, resume=config.resume)
    if run.complete:
        return _result(run)
    setup, stages = plan_stages(config, checkpoint)
    with together():
        if first:
            run = RunDirectory.open(output, config, resume=config.resume, free_to_change=_FREE_TO_CHANGE)
    try:
        progress = Progress(setup.budget.initial, (0.0,) * len(setup.budget.initial))
        model, state = config.model, None
        for stage in stages:
            pruned, trained = (RunDirectory(output / "stages" / stage.name / each) for each in _RUNS)
            if not trained.complete:
                settings = config.pruning(stage.number, stage.target, model, str(pruned.path), True)
                if first:
                    logger.info(
                        "stage %s of %s: pruning to %s parameters, then %s steps of training",
                        *(stage.number, len(stages), f"{stage.target:,}", stage.steps),
                    )
                prune(settings, on_iteration=on_iteration, progress=progress)
                moments = None
                if state is not None and config.optimizer_state == "keep":
                    moments = Moments(state, PruningPlan.load(pruned.plan), resolve_model(model))
                keep = config.optimizer_state == "keep" and stage is not stages[-1]
                part = stage.part(moments, keep_state=keep)
                recover(
                    config.recovery(str(pruned.model), str(trained.path), True),
                    callbacks=callbacks,
                    part=part,
                )
                if first:
                    run.log("stage", **_metrics(stage, pruned, trained))
            if first:
                _remove(pruned.model, state)
            progress = _after(progress, pruned)
            model, state = str(trained.model), trained.path / KEPT_STATE
        with together():
            if first:
                _finish(run, stages)
    finally:
        run.close()
    return _result(run)


def plan_stages(config: AccelConfig, checkpoint: Checkpoint) -> tuple[Setup, tuple[Stage, ...]]:
    """What each stage prunes to and trains on; no weight is read.

    Raises:
        ValueError: a setting, the target or the text does not fit.
    Source: algorithm.md section 5.
    """
    last = config.pruning(1, config.target, config.model, "-", False)
    method = find_method(last.method)
    if method.removes != "units":
        raise ValueError(f"prune.method is {method.name!r}, expected one that removes units")
    setup = set_up(last, method, checkpoint)
    if config.optimizer_state == "keep" and (
        setup.config.granularity == "layer"
        or any(layer.num_experts for layer in layer_widths(checkpoint.config))
    ):
        raise ValueError(
            "optimizer_state is 'keep', expected 'reset' where whole layers go and for mixtures of experts"
        )
    recovery = config.recovery(config.model, "-", False)
    if config.optimizer_state == "keep" and recovery.lora_rank:
        raise ValueError("optimizer_state is 'keep', expected 'reset' with adapters (recover.lora_rank)")
    all_of_it = whole(recovery, recovery_data(recovery, checkpoint))
    assert all_of_it.examples is not None  # not streamed
    parts = split_examples(len(all_of_it.examples), config.stages, config.split, recovery.batch_size)
    before = setup.budget.num_parameters
    base = setup.embeddings if config.target_of == "non-embedding" else 0
    return setup, tuple(
        Stage(
            number=k,
            target=before - (before - setup.target) * k // config.stages - base,
            examples=examples,
            steps=len(examples) // recovery.batch_size,
            first_step=examples.start // recovery.batch_size,
            total_steps=all_of_it.steps,
        )
        for k, examples in enumerate(parts, 1)
    )


def _after(progress: Progress, pruned: RunDirectory) -> Progress:
    """The progress behind a pruning that went on from this one."""
    records = pruned.iterations()
    return replace(progress, sparsity=tuple(records[-1]["sparsity"])) if records else progress


def _remove(*what: Path | None) -> None:
    """What no stage needs any more."""
    for path in what:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


def _metrics(stage: Stage, pruned: RunDirectory, trained: RunDirectory) -> dict[str, Any]:
    pruning, training = (json.loads(run.metrics.read_text(encoding="utf-8")) for run in (pruned, trained))
    return {
        "stage": stage.number,
        "parameters": pruning["parameters_after"],
        "pruning_seconds": pruning["seconds"],
        **{key: training[key] for key in _OF_TRAINING},
    }


def _finish(run: RunDirectory, stages: Sequence[Stage]) -> None:
    runs = [[RunDirectory(run.path / "stages" / stage.name / each) for each in _RUNS] for stage in stages]
    lines = [_metrics(stage, *of_stage) for stage, of_stage in zip(stages, runs, strict=True)]
    held_out = [line["held_out_loss"] for line in lines]
    write_json(
        run.metrics,
        {
            "parameters_after": lines[-1]["parameters"],
            "held_out_loss": held_out[-1],
            "held_out_perplexity": lines[-1]["held_out_perplexity"],
            "tokens": sum(line["tokens"] for line in lines),
            "best_stage": None if None in held_out else 1 + held_out.index(min(held_out)),
            "stages": lines,
        },
    )
    run.log("finished")
    with atomic_directory(run.model) as partial:
        shutil.copytree(runs[-1][1].model, partial, dirs_exist_ok=True)


def _result(run: RunDirectory) -> AccelResult:
    return AccelResult(run.path, run.model, json.loads(run.metrics.read_text(encoding="utf-8")))
