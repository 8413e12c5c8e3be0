"""Settings of recovery training: frozen, checked when made, saved beside every run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from adapt_pruner.config import (
    MissingSetting,
    PruneConfig,
    parse_count,
    parse_target,
    require,
    require_choices,
)


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of `recover`.

    Args:
        model: the pruned model: model or run directory, built-in name or name on the hub.
        output: run directory to create.
        data: text to train on, of which the recovery part is used: "default", a .txt, .jsonl, .json, .csv or
            .parquet file, or the name of a data set.
        column: text column of the file or data set; "text" if not given.
        split: split of the data set.
        streaming: read a data set of the hub as it is needed instead of downloading it first. Needs tokens.
        max_documents: train on the first so many documents of the recovery part alone; of a data set of the
            hub no more is downloaded.
        tokens: tokens to train on, such as 100k or 1.5M, rounded down to whole steps; all of the text once if
            not given.
        sequence_length: tokens of each sequence. Documents are packed into sequences and do not see each
            other.
        batch_size: sequences of each optimizer step, over all processes.
        micro_batch_size: sequences per forward and backward pass of one process.
        learning_rate: the highest, after the warm-up.
        min_learning_rate: that of the last step; a tenth of learning_rate if not given.
        schedule: wsd (constant, then linear decay over the last tenth) or cosine; both warm up over the first
            twentieth of all steps.
        weight_decay: of AdamW, for matrices.
        max_grad_norm: gradients are scaled down to this norm.
        precision: "bf16" computes in bf16 and keeps weights and moments in fp32; "auto" is bf16 on GPUs and
            fp32 on the CPU.
        gradient_checkpointing: compute the activations of each layer again in the backward pass instead of
            keeping them.
        teacher: distil from this model, usually the one before pruning: model directory, built-in name or
            name on the hub.
        temperature: of the distillation.
        alpha: weight of the distillation; the cross entropy has the rest.
        teacher_device: device of the teacher; that of the model if not given. In one process alone.
        lora_rank: train adapters of this rank on all linear layers of the decoder and merge them at the end,
            instead of the weights; 0 for none.
        lora_alpha: the outputs of the adapters are scaled by this over the rank.
        sharding: with several processes: "full" shards weights, gradients and moments over all of them
            (FSDP2), "none" keeps all of them in each.
        max_loss_ratio: stop where the loss is above this multiple of that of the first step.
        eval_tokens: tokens of the held-out part of the text that the loss is measured on at the end; 0 for
            none.
        eval_steps: measure it every so many steps too; 0 for the end alone.
        save_steps: save a checkpoint to resume from every so many steps.
        log_steps: log every so many steps.
        loggers: where the log goes beside the run directory, as transformers names it, separated by commas:
            tensorboard, wandb, mlflow and others; "none" for nowhere else.
        arguments: further settings of transformers' TrainingArguments, as a mapping.
        seed: of the order of documents.
        device: "auto", "cpu" or "cuda".
        resume: go on with the unfinished run in the output directory, from its last checkpoint; the number of
            processes may be another.
        dry_run: show steps, tokens, memory of each process and about how long it takes; write nothing.
    """

    model: str
    output: str = ""
    data: str = "default"
    column: str | None = None
    split: str = "train"
    max_documents: int | None = None
    streaming: bool = False
    tokens: int | str | None = None
    sequence_length: int = 1024
    batch_size: int = 128
    micro_batch_size: int = 8
    learning_rate: float = 2e-5
    min_learning_rate: float | None = None
    schedule: Literal["wsd", "cosine"] = "wsd"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    teacher: str | None = None
    temperature: float = 2.0
    alpha: float = 0.5
    teacher_device: str | None = None
    lora_rank: int = 0
    lora_alpha: int = 32
    sharding: Literal["full", "none"] = "full"
    max_loss_ratio: float = 3.0
    eval_tokens: int = 16384
    eval_steps: int = 0
    save_steps: int = 100
    log_steps: int = 1
    loggers: str = "tensorboard"
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.output and not self.dry_run:
            raise MissingSetting("output is missing: expected the run directory to create")
        for name in ("batch_size", "micro_batch_size", "save_steps", "log_steps"):
            require(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        documents = self.max_documents
        fits = documents is None or (documents >= 1 and not self.streaming)
        require("max_documents", documents, "at least 1, and not given with streaming", fits)
        for name in ("seed", "eval_steps", "eval_tokens", "lora_rank"):
            require(name, getattr(self, name), "at least 0", getattr(self, name) >= 0)
        require("sequence_length", self.sequence_length, "at least 2", self.sequence_length >= 2)
        few = self.eval_tokens < self.sequence_length
        expected = f"at least one sequence of {self.sequence_length} tokens, or 0"
        require(
            "eval_tokens", self.eval_tokens, expected, not few or self.eval_tokens == self.eval_steps == 0
        )
        for name in ("learning_rate", "max_grad_norm", "temperature", "lora_alpha"):
            value = getattr(self, name)
            require(name, value, "finite, above 0", 0 < value < math.inf)
        require("weight_decay", self.weight_decay, "finite, at least 0", 0 <= self.weight_decay < math.inf)
        rate = self.last_learning_rate
        expected = f"within 0 and {self.learning_rate} (learning_rate)"
        require("min_learning_rate", rate, expected, 0 <= rate <= self.learning_rate)
        require("alpha", self.alpha, "within 0 and 1", 0 <= self.alpha <= 1)
        require("max_loss_ratio", self.max_loss_ratio, "above 1", self.max_loss_ratio > 1)
        micro, whole = self.micro_batch_size, self.batch_size
        require("micro_batch_size", micro, f"a divisor of {whole} (batch_size)", whole % micro == 0)
        require("tokens", self.tokens, "given with streaming", self.tokens is not None or not self.streaming)
        self.token_budget()
        require_choices(self)

    @property
    def last_learning_rate(self) -> float:
        """That of the last step."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    def token_budget(self) -> int | None:
        """`tokens` as a number.

        Raises:
            ValueError: it is no count.
        """
        return None if self.tokens is None else parse_count("tokens", self.tokens)


@dataclass(frozen=True)
class AccelConfig:
    """Settings of `accel`.

    Args:
        model: the model to prune: model directory, built-in name or name on the hub.
        target: what to keep in the end: a fraction of the parameters (0.7) or a count of parameters (108M).
        output: run directory to create, with a directory of a pruning and of a recovery for each stage.
        target_of: what the target refers to: all parameters, or those outside embedding and head.
        stages: how often to prune and recover; each stage removes as many parameters.
        split: how the recovery text is divided among the stages: by a share that grows linearly, by a cosine,
            or uniform.
        optimizer_state: "keep" goes on with the moments of the units that a pruning left, "reset" without.
        prune: settings of `prune` for every stage, as a mapping.
        recover: settings of `recover` for every stage, as a mapping; tokens are those of all stages together.
        seed: of the calibration draws and of the order of documents.
        resume: go on with the unfinished run in the output directory.
        dry_run: show stages, parameters, tokens, steps, memory of each process and about how long it takes;
            write nothing.
    """

    model: str
    target: float | str
    output: str = ""
    target_of: Literal["all", "non-embedding"] = "all"
    stages: int = 5
    split: Literal["linear", "uniform", "cosine"] = "linear"
    optimizer_state: Literal["keep", "reset"] = "keep"
    prune: dict[str, Any] = field(default_factory=dict)
    recover: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.output and not self.dry_run:
            raise MissingSetting("output is missing: expected the run directory to create")
        require("stages", self.stages, "at least 1", self.stages >= 1)
        require("seed", self.seed, "at least 0", self.seed >= 0)
        require_choices(self)
        parse_target(self.target)
        # What is wrong with these shows now.
        self.pruning(1, self.target, self.model, "-", False)
        self.recovery("-", "-", False)

    def pruning(self, stage: int, target: float | str, model: str, output: str, resume: bool) -> PruneConfig:
        """Settings of the pruning of a stage, numbered from 1."""
        own: dict[str, Any] = {
            "model": model,
            "target": target,
            "target_of": self.target_of,
            "output": output,
        }
        own |= {"seed": self.seed + stage - 1, "resume": resume}
        # A fraction of these would be one of what the stage before has left.
        own |= dict.fromkeys(("target_flops", "target_kv_cache", "target_latency"))
        return _settings("prune", PruneConfig, self.prune, own)

    def recovery(self, model: str, output: str, resume: bool) -> RecoverConfig:
        """Settings of the recovery of a stage."""
        own = {"model": model, "output": output, "seed": self.seed, "resume": resume}
        config: RecoverConfig = _settings("recover", RecoverConfig, self.recover, own | {"dry_run": False})
        require("recover.streaming", config.streaming, "false: stages share out a text", not config.streaming)
        return config


def _settings(name: str, kind: type, given: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """A config of some kind with the settings given and those that are not for the user to give."""
    known = [each.name for each in fields(kind) if each.name not in own]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"{name} has {', '.join(unknown)}, expected some of {', '.join(known)}")
    return kind(**given, **own)
