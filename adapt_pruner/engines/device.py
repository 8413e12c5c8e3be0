"""The device that an engine runs on: which one, how much memory it took, and the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

    The limits of the control groups that this process is in count where they are lower. What caches hold that
    can be dropped, those of PyTorch and of files, is available.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = Path("/proc/meminfo").read_text(encoding="utf-8").partition("MemAvailable:")[2]
    return max(0, min([int(found.split()[0]) * 1024, *_left_in_groups()]))


def _left_in_groups(root: Path = Path("/")) -> Iterator[int]:
    """What the limits of the control groups leave, of this process's and of those around it."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = ("memory.max", "memory.current", "inactive_file")
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = top / path.strip("/")
        for place in (group, *group.parents):
            limit, used, droppable = (place / files[0], place / files[1], files[2])
            if limit.exists() and (value := limit.read_text().strip()).isdigit():
                of_cache = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                yield int(value) - int(used.read_text()) + int(of_cache.get(droppable, 0))
            if place == top:
                break


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same bits from run to run; on the CPU that is so already for one number of threads."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    settings: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # all of it is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fills
