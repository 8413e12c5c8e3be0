"""Recovery training of a pruned model, from its settings to a run directory."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import Checkpoint, open_checkpoint, write_json
from adapt_pruner.data import check_vocabulary, prefix_token, stream_rows
from adapt_pruner.engines.device import deterministic, peak_memory, resolve_device
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.engines.shards import read_model
from adapt_pruner.families import layer_widths
from adapt_pruner.inspection import summarize
from adapt_pruner.modeling import register
from adapt_pruner.output import require_free_space
from adapt_pruner.recovery.adapters import add_adapters, merge_adapters, require_peft
from adapt_pruner.recovery.config import RecoverConfig
from adapt_pruner.recovery.losses import Distillation
from adapt_pruner.recovery.moments import Moments
from adapt_pruner.recovery.packing import StreamedExamples, check_attention, collate, recovery_examples
from adapt_pruner.recovery.schedule import make_schedule
from adapt_pruner.recovery.trainer import RecoveryTrainer, Teacher, last_checkpoint, plain
from adapt_pruner.recovery.training_state import save_training_state
from adapt_pruner.run import RunDirectory
from adapt_pruner.saving import save_model
from adapt_pruner.sharding import join_processes, make_mesh, shard, together, world
from adapt_pruner.tensor_reader import TORCH_DTYPES

CHECKPOINTS = "checkpoints"
KEPT_STATE = "training_state"
# What would take a training out of our hands, or have no effect in them.
_NOT_OURS = {
    "auto_find_batch_size", "bf16_full_eval", "data_seed", "deepspeed", "eval_on_start", "fp16",
    "fp16_full_eval", "fsdp", "fsdp_config", "hub_model_id", "hub_strategy", "label_smoothing_factor",
    "load_best_model_at_end", "lr_scheduler_kwargs", "lr_scheduler_type", "num_train_epochs",
    "parallelism_config", "push_to_hub", "resume_from_checkpoint", "save_only_model", "save_strategy",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "warmup_ratio", "warmup_steps",
}  # fmt: skip
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Settings that change nothing but rounding in what a resumed run ends with.
FREE_TO_CHANGE = (
    "output", "resume", "micro_batch_size", "sharding", "gradient_checkpointing", "teacher_device",
    "save_steps", "log_steps", "loggers",
)  # fmt: skip


@dataclass(frozen=True)
class RecoverResult:
    """A finished run: its directory, the model in it, and the contents of metrics.json."""

    run_directory: Path
    model_directory: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class RecoveryData:
    """Sequences to train on and, if the loss is measured in between, those to measure it on.

    Streamed ones have no number. Each is as `packing.PackedExamples` has them.
    """

    training: Dataset[Any]
    held_out: Dataset[Any] | None


@dataclass(frozen=True)
class Part:
    """What one training does of a recovery that may consist of several.

    Args:
        examples: the sequences it trains on, in whole batches; None for those that are streamed.
        steps: its optimizer steps.
        first_step, total_steps: where they lie in the learning-rate schedule.
        moments: what to begin with in the optimizer.
        keep_state: leave the training state in the run directory, for the moments of the next part.
    """

    examples: range | None
    steps: int
    first_step: int
    total_steps: int
    moments: Moments | None = None
    keep_state: bool = False


def recover(
    config: RecoverConfig, *, callbacks: Sequence[TrainerCallback] = (), part: Part | None = None
) -> RecoverResult:
    """Trains a pruned model on text and writes a run directory.

    Started by torchrun, all processes train together, on one machine or several. It can be killed at any
    moment; with `resume` it goes on from its last checkpoint, with as many processes as there are then.

    Args:
        callbacks: of transformers' Trainer.
        part: of a recovery in several parts, this one; all of it if not given.
    Raises:
        ValueError: a setting, the model, the teacher or the text does not fit; before anything is written.
        Diverged: the loss is not finite or far above its beginning; the last checkpoint remains.
        FileExistsError: the output directory is not empty.
    Source: arXiv 2502.03460 section 3.3.
    """
    if config.lora_rank:
        require_peft()
    checkpoint = open_checkpoint(resolve_model(config.model))
    teacher = open_checkpoint(resolve_model(config.teacher)) if config.teacher else None
    _require_same_vocabulary(checkpoint, teacher)
    accumulation = accumulation_steps(config, join_processes(resolve_device(config.device).type).size)
    output = Path(config.output)
    run = RunDirectory(output, free_to_change=FREE_TO_CHANGE)
    with together():  # all see the directory as it was
        run.check(config, resume=config.resume)
    if run.complete:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)  # of a run that was killed behind its model
        return _result(run)
    with together():  # what one process refuses, all do
        if config.teacher_device:
            resolve_device(config.teacher_device)
            if world().size > 1:
                given, size = config.teacher_device, world().size
                raise ValueError(f"teacher_device is {given!r}, expected none with {size} processes")
        data = recovery_data(config, checkpoint)
        part = part or whole(config, data)
        # Two checkpoints of weights and two moments in fp32, of which the older one goes, and the model.
        require_free_space(output, checkpoint.num_parameters * 12 * 2 + checkpoint.num_bytes)
        arguments = training_arguments(config, part.steps, accumulation)
    first = arguments.process_index == 0
    resumed: list[Path | None] = [None]
    with together():
        if first:
            run = RunDirectory.open(output, config, resume=config.resume, free_to_change=FREE_TO_CHANGE)
            resumed = [last_checkpoint(output / CHECKPOINTS)]
    if arguments.world_size > 1:
        distributed.broadcast_object_list(resumed)
    arguments.eval_on_start = data.held_out is not None and resumed[0] is None
    try:
        trainer = _trainer(config, arguments, checkpoint, teacher, data, part)
        _log_to(run, trainer)
        for callback in callbacks:
            trainer.add_callback(callback)
        with deterministic(arguments.device):
            trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed[0] else None)
            _save(config, trainer, checkpoint, run, part)
    finally:
        run.close()
    return _result(run)


def accumulation_steps(config: RecoverConfig, processes: int) -> int:
    """Micro-batches of each process that make an optimizer step.

    Raises:
        ValueError: the processes there are do not divide the batch.
    """
    once = config.micro_batch_size * processes
    if config.batch_size % once:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of {once}: micro_batch_size "
            f"{config.micro_batch_size} in each of {processes} processes"
        )
    return config.batch_size // once


def uses_bf16(config: RecoverConfig) -> bool:
    """Whether the training computes in bf16."""
    if config.precision == "auto":
        return resolve_device(config.device).type != "cpu"
    return config.precision == "bf16"


def recovery_data(config: RecoverConfig, checkpoint: Checkpoint) -> RecoveryData:
    """The recovery and the held-out part of the text as sequences.

    Raises:
        ValueError: a tokenizer that does not fit the model, no such text, or too little of it.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.config["vocab_size"])
    prefix = prefix_token(tokenizer, None)
    length = config.sequence_length
    longest = checkpoint.config.get("max_position_embeddings", length)
    if length > longest:
        raise ValueError(
            f"sequence_length is {length}, but the model has only {longest} positions: expected at most these"
        )
    text: dict[str, Any] = {"column": config.column, "split": config.split}
    shared: dict[str, Any] = {"seed": config.seed, "prefix_token_id": prefix}
    held_out: Dataset[Any] | None = None
    training: Dataset[Any]
    if config.eval_tokens:
        few = config.eval_tokens // 64 + 64 if config.streaming or config.max_documents else None
        held_out = recovery_examples(
            config.data, tokenizer, length, part="held-out", max_documents=few, **text, **shared
        )
        held_out = Subset(held_out, range(min(len(held_out), config.eval_tokens // length)))
    if config.streaming:
        rows = stream_rows(config.data, config.split)
        training = StreamedExamples(rows, tokenizer, length, part="recovery", column=config.column, **shared)
    else:
        most = config.max_documents
        training = recovery_examples(config.data, tokenizer, length, max_documents=most, **text, **shared)
    return RecoveryData(training, held_out)


def whole(config: RecoverConfig, data: RecoveryData) -> Part:
    """All of a recovery: as many whole batches as the tokens asked for are, or else as the text has.

    Text is read again from its start where it has fewer tokens than were asked for.

    Raises:
        ValueError: less than one batch.
    """
    budget = config.token_budget()
    available = None if config.streaming else len(data.training)  # type: ignore[arg-type]
    sequences = available if budget is None else budget // config.sequence_length
    assert sequences is not None  # streaming has a budget
    steps = sequences // config.batch_size
    if not steps:
        what = f"the recovery part of {config.data}" if budget is None else f"tokens, {config.tokens},"
        raise ValueError(
            f"{what} makes {sequences} sequences of {config.sequence_length} tokens, expected at least "
            f"{config.batch_size} (batch_size)"
        )
    if available is not None and steps * config.batch_size > available:
        warnings.warn(
            f"{config.data} has {available} sequences of {config.sequence_length} tokens to train on, "
            f"{steps * config.batch_size} were asked for: they are read again from the first one",
            stacklevel=2,
        )
    examples = None if available is None else range(steps * config.batch_size)
    return Part(examples, steps, first_step=0, total_steps=steps)


def training_arguments(config: RecoverConfig, steps: int, accumulation: int) -> TrainingArguments:
    """The settings as transformers has them; those of `config.arguments` come last.

    Raises:
        ValueError: `config.arguments` names one that does not exist.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    values: dict[str, Any] = {
        "output_dir": str(Path(config.output) / CHECKPOINTS),
        "max_steps": steps,
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": uses_bf16(config),
        "activation_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide what `Diverged` reports
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "report_to": [name.strip() for name in config.loggers.split(",")],
        "train_sampling_strategy": "sequential",  # the sequences are in random order already
        "remove_unused_columns": False,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world().size > 1 else None,
        "seed": config.seed,
    }
    known = {field.name for field in fields(TrainingArguments)}
    unknown = sorted(config.arguments.keys() - known)
    if unknown:
        raise ValueError(
            f"arguments has {', '.join(unknown)}, which TrainingArguments of transformers has not"
        )
    taken = sorted(config.arguments.keys() & (values.keys() | _NOT_OURS))
    if taken:
        raise ValueError(
            f"arguments has {', '.join(taken)}, expected none that other settings decide, that has no effect "
            "here, or that changes how a run is sharded, counted or resumed"
        )
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for name, value in config.arguments.items():
        if isinstance(value, str) and isinstance(defaults[name], int | float):
            raise ValueError(f"arguments has {name} {value!r}, expected a number")
    # Not what the verbosity of transformers' own messages makes of it.
    arguments = TrainingArguments(**{"disable_tqdm": False} | values | config.arguments)
    if arguments.optim not in _OPTIMIZERS:
        raise ValueError(
            f"arguments has optim {config.arguments['optim']!r}, expected one of {list(_OPTIMIZERS)}, whose "
            "state is kept in checkpoints and pruned"
        )
    for callback in get_reporting_integration_callbacks(arguments.report_to):  # unknown ones raise
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"loggers is {config.loggers!r}: {error}") from error
    return arguments


def _trainer(
    config: RecoverConfig,
    arguments: TrainingArguments,
    checkpoint: Checkpoint,
    taught_by: Checkpoint | None,
    data: RecoveryData,
    part: Part,
) -> RecoveryTrainer:
    model = _load(config, arguments, checkpoint)
    check_attention(model.config)
    teacher = None
    if taught_by is not None:
        device = config.teacher_device or str(arguments.device)
        teacher = Teacher(
            load_model(taught_by, device=device, dtype="bf16" if arguments.bf16 else "fp32"),
            Distillation(config.temperature, config.alpha),
        )

    def schedule(optimizer: torch.optim.Optimizer, done: int) -> torch.optim.lr_scheduler.LRScheduler:
        step = min(part.first_step + done, part.total_steps - 1)  # none is left to do after the last
        ratio = config.last_learning_rate / config.learning_rate
        return make_schedule(optimizer, config.schedule, part.total_steps, min_ratio=ratio, first_step=step)

    training = data.training
    if part.examples is not None:
        size = len(training)  # type: ignore[arg-type]
        training = Subset(training, [i % size for i in part.examples])
    # Three times that of the forward pass; half of a sequence is what a token sees on average.
    flops = 3 * summarize(checkpoint.directory, context=max(1, config.sequence_length // 2)).flops_per_token
    return RecoveryTrainer(
        model,
        args=arguments,
        schedule=schedule,
        flops_per_token=flops,
        teacher=teacher,
        max_loss_ratio=config.max_loss_ratio,
        moments=part.moments,
        train_dataset=training,
        eval_dataset=data.held_out,
        data_collator=collate,
    )


def _load(config: RecoverConfig, arguments: TrainingArguments, checkpoint: Checkpoint) -> Any:
    """The model to train, with weights in fp32: whole, or sharded over all processes."""
    processes, device = arguments.world_size, arguments.device
    precision = torch.bfloat16 if arguments.bf16 else None
    by_rows = not config.lora_rank and not any(w.num_experts for w in layer_widths(checkpoint.config))
    if processes > 1 and config.sharding == "full" and by_rows:
        register()
        shape = AutoConfig.from_pretrained(checkpoint.directory)
        mesh = make_mesh(device.type)
        return read_model(checkpoint, shape, mesh, torch.float32, mixed_precision=precision)
    model = load_model(checkpoint, device=str(device), dtype="fp32")
    if config.lora_rank:
        torch.manual_seed(config.seed)  # they begin with random numbers, the same in all processes
        model = add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha)
    if processes > 1:
        mesh = make_mesh(device.type, replicate=config.sharding == "none")
        shard(model, mesh, mixed_precision=precision)
    return model


def _save(
    config: RecoverConfig, trainer: RecoveryTrainer, checkpoint: Checkpoint, run: RunDirectory, part: Part
) -> None:
    """Model, metrics and what a next part needs; `model` comes last, and the run is complete with it."""
    held_out = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if part.keep_state and not (run.path / KEPT_STATE).exists():
        save_training_state(run.path / KEPT_STATE, trainer.model, plain(trainer.optimizer))
    state, device = trainer.state, trainer.args.device
    logged = [entry for entry in state.log_history if "loss" in entry]
    cross_entropy = [entry.get("cross_entropy", entry["loss"]) for entry in logged]
    evaluated = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    metrics = {
        "steps": state.global_step,
        "sequences": state.global_step * config.batch_size,
        "tokens": state.global_step * config.batch_size * config.sequence_length,
        "loss_first": cross_entropy[0],
        "loss_last": cross_entropy[-1],
        "held_out_loss_before": evaluated[0] if evaluated else None,
        "held_out_loss": held_out.get("eval_loss"),
        "held_out_perplexity": held_out.get("eval_perplexity"),
        "tokens_per_second": round(median(entry["tokens_per_second"] for entry in logged), 2),
        "processes": trainer.args.world_size,
        "peak_memory_bytes": peak_memory(device),
    }
    first = trainer.args.process_index == 0
    with together():
        if first:
            write_json(run.metrics, metrics)
    model = merge_adapters(trainer.model) if config.lora_rank else trainer.model
    model.config.use_cache = checkpoint.config.get("use_cache", True)  # which the Trainer turns off
    dtype = TORCH_DTYPES[summarize(checkpoint.directory).dtype]
    save_model(run.model, model, dtype=dtype, side_files=checkpoint.directory)
    with together():
        if first:
            run.log("finished", **metrics)
            shutil.rmtree(run.path / CHECKPOINTS)


def _log_to(run: RunDirectory, trainer: RecoveryTrainer) -> None:
    """What is logged goes to the run directory, and to stderr as the Trainer's bar does."""
    trainer.pop_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(_Progress)
    if trainer.args.process_index == 0:
        trainer.add_callback(_RunLog(run))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(run.path / "tensorboard")  # not among the checkpoints


class _Progress(ProgressCallback):
    """The Trainer's bar with what is logged on stderr, not on stdout, where a command has its result."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if self.training_bar is not None:
            shown = {name: f"{value:.4g}" for name, value in logs.items() if isinstance(value, float)}
            self.training_bar.write(str(shown), file=sys.stderr)


class _RunLog(TrainerCallback):
    """Writes what the Trainer logs to the log of the run."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self._run.log("step", step=state.global_step, **logs)


def _require_same_vocabulary(student: Checkpoint, teacher: Checkpoint | None) -> None:
    if teacher is None:
        return
    sizes = student.config["vocab_size"], teacher.config["vocab_size"]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher {teacher.directory} has a vocabulary of {sizes[1]}, expected the {sizes[0]} entries of "
            "the model"
        )


def _result(run: RunDirectory) -> RecoverResult:
    return RecoverResult(run.path, run.model, json.loads(run.metrics.read_text(encoding="utf-8")))
