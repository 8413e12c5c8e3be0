"""Tokens per second of a training, and how much of the processor's arithmetic they use."""

from __future__ import annotations

import functools
import time

import torch

_SIZE = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
_ROUNDS = 5


@functools.cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What multiplying large square matrices reaches on this device with its threads; the best of five."""
    size = _SIZE.get(device.type, 1024)
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one warms up
        _wait(device)
        began = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Throughput:
    """Counts the tokens of this process between two calls of `rates`.

    Args:
        flops_per_token: of forward and backward pass; what gradient checkpointing computes again does not
            count.
        peak: FLOPs per second of a process at best, as `matmul_flops_per_second` measures them.
        processes: how many train together.
    """

    def __init__(self, flops_per_token: float, peak: float, processes: int) -> None:
        self._flops, self._peak, self._processes = flops_per_token, peak, processes
        self._tokens, self._since = 0, time.perf_counter()  # of this process, since the last call of `rates`

    def count(self, tokens: int) -> None:
        """So many tokens have gone through forward and backward pass."""
        self._tokens += tokens

    def rates(self) -> dict[str, float]:
        """Tokens per second of all processes together since the last call, and their MFU within 0 and 1."""
        now = time.perf_counter()
        per_process = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        return {
            "tokens_per_second": per_process * self._processes,
            "mfu": per_process * self._flops / self._peak,
        }
