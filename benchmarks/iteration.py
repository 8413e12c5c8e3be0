"""What one pruning iteration costs beside a bare forward and backward pass of the same batch.

    python benchmarks/iteration.py [--model smollm2-135m] [--num-sequences 16] [--gradients fused]

Time: both take turns in one process and the median of the paired ratios is reported. The bare pass computes
gradients of the same weights only. Both start from the dense model each time, so the sizes are equal.
Memory: each runs alone in a process of its own; peak resident memory above the level before the model was
loaded. The parts of the bound (weights, gradients, activations) come from the bare pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def peak_memory(reset: bool = False) -> int:
    """Peak resident memory of this process in bytes since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Workload:
    """The model, the batches, and the two things that are compared."""

    def __init__(self, options: argparse.Namespace) -> None:
        from adapt_pruner import PruneConfig
        from adapt_pruner.assets import resolve_model
        from adapt_pruner.calibration import calibration_tokens, draw
        from adapt_pruner.checkpoint import open_checkpoint
        from adapt_pruner.engines.in_memory import InMemoryEngine
        from adapt_pruner.families import layer_widths, unit_counts
        from adapt_pruner.methods import resolve

        config = PruneConfig(
            options.model,
            0.8,
            "unused",
            num_sequences=options.num_sequences,
            micro_batch_size=options.micro_batch_size,
            gradients=options.gradients,
            device="cpu",
        )
        checkpoint = open_checkpoint(resolve_model(options.model))
        self.config, self.estimator = resolve(config, len(layer_widths(checkpoint.config)))
        self.tokens = calibration_tokens(self.config, checkpoint)
        self.batch = draw(self.config, self.tokens, 1)
        self.baseline = peak_memory(reset=True)
        self.engine = InMemoryEngine(checkpoint, device="cpu")
        self.initial = unit_counts(self.engine.family, self.engine.widths)
        self.dense = {name: p.detach() for name, p in self.engine.model.named_parameters()}
        self.dense_widths = self.engine.widths
        self.prunable = [
            tensor.name
            for layer, widths in enumerate(self.engine.widths)
            for kind in self.engine.family.unit_kinds
            for tensor in self.engine.family.unit_tensors(kind, layer, widths, self.dense)
        ]
        peak_memory(reset=True)

    def restore(self) -> None:
        """The dense weights again; the tensors were never written to."""
        for name, value in self.dense.items():
            owner, _, leaf = name.rpartition(".")
            module = self.engine.model.get_submodule(owner)
            setattr(module, leaf, torch.nn.Parameter(value))
            if isinstance(module, torch.nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = value.shape
        self.engine.model.tie_weights()
        self.engine.widths = self.dense_widths

    def bare(self) -> None:
        """Forward and backward of the whole batch, gradients of the prunable weights kept."""
        model = self.engine.model
        labels = self.batch.shape[0] * (self.batch.shape[1] - 1)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in self.prunable:
            model.get_parameter(name).requires_grad_(True)
        for rows in self.batch.split(self.config.micro_batch_size):
            model(input_ids=rows, labels=rows, num_items_in_batch=labels, use_cache=False).loss.backward()

    def iteration(self) -> None:
        """One whole iteration: draw, score, allocate, surgery."""
        from adapt_pruner.iteration import iterate

        sparsity = np.zeros(len(self.initial))
        budget = self.engine.budget(self.initial)
        floor = budget.floor  # far away, as in the middle of a run
        iterate(self.config, self.estimator, self.engine, self.tokens, budget, sparsity, floor, 1)


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    work = Workload(options)
    seconds: dict[str, list[float]] = {"bare": [], "iteration": []}
    for round_number in range(-1, options.rounds):  # the first round warms up
        for name in seconds:
            work.restore()
            started = time.perf_counter()
            getattr(work, name)()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - started)
            for parameter in work.engine.model.parameters():
                parameter.grad = None
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["iteration"], strict=True)]
    return {
        "tokens": work.batch.numel(),
        "bare_seconds": round(statistics.median(seconds["bare"]), 3),
        "iteration_seconds": round(statistics.median(seconds["iteration"]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
    }


def measure_memory(options: argparse.Namespace) -> dict[str, int]:
    """Peak above the level before loading, in a process that runs nothing else."""
    work = Workload(options)
    loaded = peak_memory(reset=True)
    work.dense.clear()  # or the weights that surgery replaces would stay
    getattr(work, options.memory_of)()
    return {"loaded": loaded - work.baseline, "peak": peak_memory() - work.baseline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-sequences", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--gradients", default="auto", choices=("auto", "fused", "materialised"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=("bare", "iteration"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    result = measure_time(options)
    memory = {}
    for name in ("bare", "iteration"):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--memory-of", name], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        memory[name] = json.loads(done.stdout.splitlines()[-1])["peak"]
    result |= {
        "threads": torch.get_num_threads(),
        "bare_peak_bytes": memory["bare"],
        "iteration_peak_bytes": memory["iteration"],
        "memory_ratio": round(memory["iteration"] / memory["bare"], 4),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
