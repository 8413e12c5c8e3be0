"""The device that an engine runs on: which one, how much memory it took, and the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def resolve_device(device: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU.

    Raises:
        ValueError: the named device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N") from error
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which is not usable here: {error}") from error
    return resolved


def peak_memory(device: torch.device) -> int:
    """Largest resident memory of this process, or largest allocation on the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: there a process inherits the peak of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the CUDA device, or of the host without swapping.

    The limit of the control group counts where it is lower.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = Path("/proc/meminfo").read_text(encoding="utf-8").partition("MemAvailable:")[2]
    free = int(found.split()[0]) * 1024
    for limit, used in _CGROUP_FILES:
        if limit.exists() and (value := limit.read_text().strip()).isdigit():
            free = min(free, int(value) - int(used.read_text()))
    return max(0, free)


_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same bits from run to run; on the CPU that is so already for one number of threads."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
