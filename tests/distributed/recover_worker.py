"""Runs `recover` or `accel` with the settings in a JSON file, as one of several processes; may die early.

torchrun ... recover_worker.py COMMAND SETTINGS.json [RANK STEP]: RANK is killed behind STEP.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

import adapt_pruner.recovery.recover as recover_module
from adapt_pruner.adapt_accel import accel
from adapt_pruner.recovery.config import AccelConfig, RecoverConfig
from adapt_pruner.recovery.recover import recover


class _Kill(TrainerCallback):
    def __init__(self, rank: int, step: int) -> None:
        self._rank, self._step = rank, step

    def on_step_end(self, args, state, control, **more):
        if args.process_index == self._rank and state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


class _Sharded(TrainerCallback):
    """Every parameter is one rank's part, or a whole replica."""

    def on_train_begin(self, args, state, control, model=None, **more):
        from torch.distributed.tensor import DTensor

        world = args.world_size
        if world > 1:
            parameters = dict(model.named_parameters())
            assert parameters
            assert all(isinstance(p, DTensor) for p in parameters.values())
            local = sum(p.to_local().numel() for p in parameters.values())
            whole = sum(p.numel() for p in parameters.values())
            assert local == whole if os.environ.get("REPLICATED") else local < 0.6 * whole
            print(f"rank {args.process_index} holds {local} of {whole}", flush=True)


def _refuse(*args, **more):
    raise AssertionError("a process has loaded the whole model")


def main(command: str, settings: str, *kill: str) -> None:
    torch.set_num_threads(1)
    if os.environ.get("IN_PARTS"):
        recover_module.load_model = _refuse
    values = json.loads(Path(settings).read_text())
    callbacks = [_Sharded(), *([_Kill(*map(int, kill))] if kill else [])]
    if command == "recover":
        recover(RecoverConfig(**values), callbacks=callbacks)
    else:
        accel(AccelConfig(**values), callbacks=callbacks)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
