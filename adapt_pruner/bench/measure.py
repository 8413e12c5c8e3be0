"""Time and memory of functions that take turns."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Function = Callable[[], object]
SECONDS_OF_CLOCK = {
    "wall": 1e-3,
    "cpu": 20e-3,
}  # of a measurement at least: the CPU clock may tick every 4 ms
MOST_CALLS = 1024


class CpuTimer:
    """Seconds per call: of the wall, or of all threads' CPU time divided by their number."""

    def __init__(self, clock: str, threads: int) -> None:
        self.clock, self.threads = clock, threads
        self.least_seconds = SECONDS_OF_CLOCK[clock]

    def seconds(self, function: Function, calls: int) -> float:
        now, share = (time.process_time, self.threads) if self.clock == "cpu" else (time.perf_counter, 1)
        started = now()
        for _ in range(calls):
            function()
        return (now() - started) / share / calls

    def extra_bytes(self, function: Function) -> int | None:
        """Growth of the resident memory during a call at its peak; None where Linux's /proc does not say."""
        try:
            _return_free_memory()  # or what the allocator holds back would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
            before = _status("VmRSS")
            function()
            return max(0, _status("VmHWM") - before)
        except OSError:
            return None


class CudaTimer:
    """Seconds per call by CUDA events, with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.least_seconds = 0.0
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * max(cache, 1 << 20), dtype=torch.int8, device=device)

    def seconds(self, function: Function, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            self._flush.zero_()  # takes longer than a launch, so that none is waited for below
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3

    def extra_bytes(self, function: Function) -> int | None:
        """Growth of the memory allocated on the device during a call at its peak."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def make_timer(device: torch.device, clock: str, threads: int) -> CpuTimer | CudaTimer:
    return CpuTimer(clock, threads) if device.type == "cpu" else CudaTimer(device)


def take_turns(functions: Sequence[Function], timer: CpuTimer | CudaTimer, rounds: int) -> list[list[float]]:
    """Seconds per call of each function in each round; every round measures all of them one after the other.

    Functions have run before: nothing is compiled, allocated for good or touched for the first time here.
    """
    calls = [_calls_for(function, timer) for function in functions]
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, count, measured in zip(functions, calls, seconds, strict=True):
            measured.append(timer.seconds(function, count))
    return seconds


def _calls_for(function: Function, timer: CpuTimer | CudaTimer) -> int:
    """So many that one measurement takes long enough."""
    calls = 1
    while timer.seconds(function, calls) * calls < timer.least_seconds and calls < MOST_CALLS:
        calls *= 2
    return calls


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on the device can have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (
            line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines() if line
        )
    }
    free = pages["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def _status(name: str) -> int:
    """A value of this process in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


def _return_free_memory() -> None:
    """glibc's malloc gives what it holds back to the system; other allocators cannot be asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
