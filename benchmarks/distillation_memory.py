"""Memory of the distillation loss and its gradients, beside the formula with the logits of all tokens.

    python benchmarks/distillation_memory.py [--tokens 4096] [--vocabulary 128256] [--hidden-size 256]

Each runs alone in a process of its own, in fp32; peak resident memory of loss and backward pass above the
level before. With all logits six tensors of [tokens, vocabulary] exist together, 13 GB at the default size;
where there is no memory for seven, it is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from iteration import peak_memory
from torch import Tensor
from torch.nn import functional as F

from adapt_pruner.recovery.losses import Distillation, HeadInput, recovery_loss

DISTILLATION = Distillation()
PLAIN_TENSORS = 7  # one more than were measured


def plain(student: HeadInput, labels: Tensor, teacher: HeadInput) -> Tensor:
    """The formula as it reads, without biases, softcap and ignored labels."""
    t = DISTILLATION.temperature
    targets = labels[0, 1:]
    logits = F.linear(student.hidden[0, :-1], student.weight)
    with torch.no_grad():
        p = (F.linear(teacher.hidden[0, :-1], teacher.weight) / t).log_softmax(-1)
    q = (logits / t).log_softmax(-1)
    divergence = t**2 * F.kl_div(q, p, log_target=True, reduction="sum") / len(targets)
    return DISTILLATION.alpha * divergence + (1 - DISTILLATION.alpha) * F.cross_entropy(logits, targets)


def chunked(student: HeadInput, labels: Tensor, teacher: HeadInput) -> Tensor:
    return recovery_loss(student, labels, teacher=teacher, distillation=DISTILLATION).loss


VARIANTS: dict[str, Callable[[HeadInput, Tensor, HeadInput], Tensor]] = {"plain": plain, "chunked": chunked}


def measure(options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)

    def head() -> HeadInput:
        hidden = torch.randn(1, options.tokens, options.hidden_size)
        return HeadInput(hidden, torch.randn(options.vocabulary, options.hidden_size) * 0.05)

    student, teacher = head(), head()
    labels = torch.randint(options.vocabulary, (1, options.tokens))
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    before = peak_memory(reset=True)
    started = time.perf_counter()
    loss = VARIANTS[options.variant](student, labels, teacher)
    loss.backward()
    seconds = time.perf_counter() - started
    return {
        "peak_bytes": peak_memory() - before,
        "seconds": round(seconds, 2),
        "loss": loss.item(),
        "gradient_norm": student.weight.grad.norm().item(),
    }


def available_memory() -> int:
    """Bytes that can be had without swapping (Linux)."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="measure one alone, in this process")
    options = parser.parse_args()
    needed = PLAIN_TENSORS * 4 * options.tokens * options.vocabulary
    if options.variant != "chunked" and needed > available_memory():
        raise SystemExit(
            f"all logits of {options.tokens} tokens need about {needed / 1e9:.0f} GB, and "
            f"{available_memory() / 1e9:.0f} GB are available: expected fewer --tokens, or --variant chunked"
        )
    if options.variant:
        print(json.dumps(measure(options)))
        return
    results = {}
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--variant", variant], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        results[variant] = json.loads(done.stdout.splitlines()[-1])
    ratio = results["chunked"]["peak_bytes"] / results["plain"]["peak_bytes"]
    size = {name: value for name, value in vars(options).items() if name != "variant"}
    print(json.dumps({**size, **results, "memory_ratio": round(ratio, 4)}, indent=1))


if __name__ == "__main__":
    main()
