"""What the memory of a device can do: the bounds that `bench kernels` measures the other ops against.

On CPUs these are native ops (csrc/cpu/roofline.cpp) on torch's threads, on other devices torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapt_pruner.kernels.backends import BackendUnavailable, backend_status


def require_roofline(device: torch.device) -> None:
    """Raises BackendUnavailable where nothing measures the memory of `device`."""
    problem = backend_status()["cpu"]
    if device.type == "cpu" and problem is not None:
        raise BackendUnavailable(f"the memory's bandwidth cannot be measured: {problem}")


def read_pair(first: Tensor, second: Tensor, *, ahead: bool = False) -> None:
    """Reads every byte of two contiguous tensors of equal size, on a CPU a cache line of each in turn.

    Args:
        first, second: on the same device.
        ahead: asks for memory early (software prefetch), as the ops do; CPU only.
    """
    if first.device.type == "cpu":
        torch.ops.adapt_pruner.roofline_read(first, second, ahead)
    else:
        first.sum(), second.sum()


def copy(target: Tensor, source: Tensor, *, streaming: bool = False) -> None:
    """Copies a contiguous tensor: on a CPU by one memcpy per thread.

    Args:
        target: as large as the source, on the same device; aligned to 64 bytes.
        source: any dtype.
        streaming: stores around the caches, which do not read the target's lines first; CPU only.
    """
    if target.device.type == "cpu":
        torch.ops.adapt_pruner.roofline_copy(target, source, streaming)
    else:
        target.copy_(source)
