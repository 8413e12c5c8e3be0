"""Tokens per second of recovery training beside transformers' Trainer with the same model, text and settings.

    python benchmarks/recovery.py [--model smollm2-135m] [--steps 4] [--rounds 5]

Both take turns in one process, a few steps at a time; the first step of each turn does not count.
What differs is the loss: ours in chunks of tokens, the Trainer's from whole logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.recovery.config import RecoverConfig
from adapt_pruner.recovery.packing import collate
from adapt_pruner.recovery.recover import accumulation_steps, recovery_data, training_arguments
from adapt_pruner.recovery.schedule import make_schedule
from adapt_pruner.recovery.trainer import RecoveryTrainer


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step but the first of every turn."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = RecoverConfig(
            model=options.model,
            output=scratch,
            sequence_length=256,
            batch_size=8,
            micro_batch_size=4,
            loggers="none",
            arguments={"disable_tqdm": True},
        )
        checkpoint = open_checkpoint(resolve_model(config.model))
        arguments = training_arguments(config, options.steps, accumulation_steps(config, 1))
        arguments.save_strategy = SaveStrategy.NO
        shared: dict[str, Any] = {
            "args": arguments,
            "train_dataset": recovery_data(config, checkpoint).training,
            "data_collator": collate,
        }
        times = {"ours": StepTimes(), "trainer": StepTimes()}
        trainers: dict[str, Trainer] = {
            "ours": RecoveryTrainer(
                load_model(checkpoint, dtype="fp32"),
                schedule=lambda optimizer, done: make_schedule(optimizer, "wsd", 10**6, min_ratio=0.1),
                flops_per_token=1.0,
                callbacks=[times["ours"]],
                **shared,
            ),
            "trainer": Trainer(load_model(checkpoint, dtype="fp32"), callbacks=[times["trainer"]], **shared),
        }
        for _ in range(options.rounds):
            for trainer in trainers.values():
                trainer.train()
    tokens = config.batch_size * config.sequence_length
    rates = {name: tokens / statistics.median(each.seconds) for name, each in times.items()}
    print(json.dumps({**rates, "ratio": rates["ours"] / rates["trainer"]}, indent=1))


if __name__ == "__main__":
    main()
