"""Recovery training on transformers' Trainer: chunked loss, distillation, sharding, resumable at any size.

Everything else is the Trainer's: optimizer, accumulation, clipping, callbacks, loggers. A model is sharded by
`sharding.shard` before it comes here, the same on CPUs and GPUs; Accelerate leaves such a model alone.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adapt_pruner.checkpoint import write_tensors
from adapt_pruner.evaluation.log_probabilities import evaluating
from adapt_pruner.recovery.losses import Distillation, HeadInput, RecoveryLoss, recovery_loss
from adapt_pruner.recovery.moments import Moments, load_moments
from adapt_pruner.recovery.throughput import Throughput, matmul_flops_per_second
from adapt_pruner.recovery.training_state import load_training_state, save_training_state
from adapt_pruner.sharding import is_replicated, is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "state"
_MAX_LOSS = 100.0  # nats per token: far above that of guessing, and of which exp can be taken
# The schedule for an optimizer from the step on that so many steps of this training are before.
ScheduleFactory = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


class Diverged(ValueError):
    """The loss is not finite, or far above where it began: training was stopped, what was saved remains."""


@dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from, in evaluation mode, with the vocabulary of the student."""

    model: Any  # a causal LM
    distillation: Distillation


class _LogBeforeSaving(TrainerCallback):
    """What is saved has been logged, and so been found sound; the last step always is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_log |= control.should_save


class RecoveryTrainer(Trainer):
    """The Trainer with the recovery loss and checkpoints without pickle, of whole or sharded models.

    Args:
        schedule: makes the learning-rate schedule; what this trainer does may be a part of it.
        flops_per_token: of forward and backward pass, for the utilisation in the log.
        teacher: distil from it.
        max_loss_ratio: stop where the loss is above this multiple of the first one.
        moments: what to begin with in the optimizer.
        others: as for `Trainer`. `model` may have gone through `sharding.shard`.
    """

    model: Any  # there all along, which the Trainer's types do not say
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        schedule: ScheduleFactory,
        flops_per_token: float,
        teacher: Teacher | None = None,
        max_loss_ratio: float = math.inf,
        moments: Moments | None = None,
        **others: Any,
    ) -> None:
        super().__init__(model, **others)
        self.add_callback(_LogBeforeSaving)
        # The Trainer's word for a model that sees to its own placement and gradient reduction. It is set here
        # as the Trainer itself has no checkpoints for such models and refuses to begin.
        self.is_distributed_loading_by_transformers = is_sharded(model)
        self.loss_is_scaled_for_ga = True
        self._schedule, self._teacher, self._moments = schedule, teacher, moments
        self._max_loss_ratio = max_loss_ratio
        self._autocast = self.args.bf16 and not is_sharded(model)  # sharding has a policy of its own
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        peak = matmul_flops_per_second(self.args.device, dtype)
        self.throughput = Throughput(flops_per_token, peak, self.args.world_size)
        self._parts: list[Tensor] = []
        self._logged_step = 0
        _add_method(model, recovery_loss_of)
        if teacher is not None:
            _add_method(teacher.model, head_input)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule from the step on that training begins or goes on at."""
        self._logged_step = self.state.global_step  # where a resumed training goes on
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = self._schedule(optimizer, self.state.global_step)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not is_sharded(model):  # which is where it belongs
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the arguments say, with the moments of an earlier training if there are any."""
        first = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if first and self._moments is not None:
            load_moments(self._moments, self.model, optimizer)
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The part of a micro-batch in the loss of its whole batch, times the processes that average it."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        self.throughput.count(labels.numel())
        autocast = torch.autocast(labels.device.type, torch.bfloat16, enabled=self._autocast)
        taught = None
        if self._teacher is not None:
            with torch.no_grad(), autocast:
                device = self._teacher.model.device
                taught = self._teacher.model.head_input(**{k: _on(device, v) for k, v in inputs.items()})
        with autocast:
            loss, cross_entropy, divergence = self.model.recovery_loss_of(
                inputs, labels, num_items_in_batch, taught, self._teacher and self._teacher.distillation
            )
        if divergence is not None:
            self._parts.append(torch.stack((cross_entropy, divergence)))
        loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Predicted tokens of a whole batch, in all processes."""
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batch_samples)
        total = torch.as_tensor(count, device=device)
        return total if self.args.world_size == 1 else self.accelerator.reduce(total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, tokens per second and MFU.

        Raises:
            Diverged: the loss is not finite, or above `max_loss_ratio` times the first one.
        """
        if "loss" in logs:
            logs |= self.throughput.rates()
            if self._teacher is not None:
                steps = self.state.global_step - self._logged_step
                parts = self.accelerator.reduce(torch.stack(self._parts).sum(0)) / steps
                logs["cross_entropy"], logs["divergence"] = parts.tolist()
            self._parts.clear()
            self._logged_step = self.state.global_step
        super().log(logs, start_time)
        if "loss" in logs:
            first = next(entry["loss"] for entry in self.state.log_history if "loss" in entry)
            self._require_sound("loss", logs["loss"], first)

    def _require_sound(self, what: str, loss: float, first: float) -> None:
        if not loss <= min(self._max_loss_ratio * first, _MAX_LOSS):  # which NaN is not either
            raise Diverged(
                f"the {what} at step {self.state.global_step} is {loss:.4g}, expected at most "
                f"{self._max_loss_ratio:g} times the {first:.4g} that it was first: lower the learning rate"
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross entropy in nats per predicted token of the whole data set, and its exponential.

        Raises:
            Diverged: it is not finite, or above `max_loss_ratio` times the first one.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats, tokens
        size = self.args.per_device_eval_batch_size
        own = range(self.args.process_index, len(dataset), self.args.world_size)
        with evaluating(self.model):
            # As many passes as the first process makes: sharded weights need all of them in each.
            for start in range(0, -(-len(dataset) // self.args.world_size), size):
                examples = [dataset[i] for i in own[start : start + size]]
                batch = self.data_collator(examples or [dataset[0]])
                if not examples:
                    batch["labels"].fill_(-100)
                inputs = dict(self._prepare_inputs(batch))
                labels = inputs.pop("labels")
                count = (labels[:, 1:] != -100).sum()
                with torch.autocast(labels.device.type, torch.bfloat16, enabled=self._autocast):
                    loss, *_ = self.model.recovery_loss_of(inputs, labels, count)
                sums += torch.stack((loss.double() * count, count.double()))
        nats, tokens = self.accelerator.reduce(sums).tolist()
        loss = nats / tokens
        evaluated = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        self._require_sound("held-out loss", loss, evaluated[0] if evaluated else loss)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Raises Diverged where a gradient is not finite, before any weight takes it in."""
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not norm.isfinite():
            raise Diverged(
                f"the norm of the gradients at step {self.state.global_step + 1} is {norm.item()}, expected "
                "a finite one: lower the learning rate"
            )
        return norm

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Replicas reduce once per optimizer step; shards every time, or each would hold all gradients."""
        replicated = is_replicated(self.model)
        if replicated:
            self.model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            if replicated:
                self.model.set_requires_all_reduce(True)

    # A checkpoint is `state/`, with weights and moments, random states, and the Trainer's own file, which it
    # writes last. What else it would write of optimizer, schedule and arguments are pickles.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing within a checkpoint; `saving.save_model` writes models."""
        if not _internal_call:
            raise NotImplementedError("expected adapt_pruner.saving.save_model")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_training_state(Path(output_dir) / STATE, self.model, plain(self.optimizer))

    def _save_rng_state(self, output_dir: str) -> None:
        states = {"cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.args.device)
        write_tensors(self._rng_file(output_dir), states)
        self.accelerator.wait_for_everyone()  # before the main process declares the checkpoint complete

    def _rng_file(self, directory: str) -> Path:
        return Path(directory) / f"rng-{self.args.process_index}.safetensors"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come with the moments, once there is an optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_training_state(Path(checkpoint) / STATE, self.model, plain(self.optimizer))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of a process that was there; with adapters' dropout alone does it matter."""
        file = self._rng_file(checkpoint) if checkpoint else None
        if file is None or not file.exists():
            return
        states = load_file(file)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.args.device)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`, if there is any; incomplete ones are removed."""
    steps = {}
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            steps[TrainerState.load_from_json(str(path / TRAINER_STATE_NAME)).global_step] = path
        except (OSError, ValueError):  # killed before or while it was written; it will be written again
            shutil.rmtree(path)
    return steps[max(steps)] if steps else None


def head_input(model: PreTrainedModel, **inputs: Any) -> HeadInput:
    """What the head of a causal LM, plain or with adapters, is applied to for these inputs."""
    causal: Any = getattr(model, "get_base_model", lambda: model)()  # without adapters around it
    hidden = causal.base_model(**inputs).last_hidden_state
    head = causal.get_output_embeddings()
    softcap = getattr(causal.config, "final_logit_softcapping", None)
    return HeadInput(hidden, head.weight, head.bias, softcap)


def recovery_loss_of(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    labels: Tensor,
    num_items: Tensor | int | None,
    teacher: HeadInput | None = None,
    distillation: Distillation | None = None,
) -> RecoveryLoss:
    """The recovery loss of a causal LM for a micro-batch; as a method, in which sharded weights are whole."""
    return recovery_loss(
        head_input(model, **inputs), labels, num_items=num_items, teacher=teacher, distillation=distillation
    )


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer without what Accelerate wraps it in."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _add_method(model: PreTrainedModel, function: Callable[..., Any]) -> None:
    setattr(model, function.__name__, MethodType(function, model))
    register_fsdp_forward_method(model, function.__name__)
