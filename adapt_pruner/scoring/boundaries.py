"""The residual stream at the boundaries of all layers, kept from the forward to the backward sweep."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from adapt_pruner.tensor_reader import read_into, write_from


class Boundaries:
    """Tensors of one shape, in memory as far as a budget allows and the others in a file.

    Attributes:
        in_memory, on_disk: how many of them.
        bytes_moved: to and from the file, so far.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        memory: int,
        file: int | None,
    ) -> None:
        self._shape, self._dtype, self._device, self._file = shape, dtype, device, file
        self._bytes = math.prod(shape) * dtype.itemsize
        self.in_memory = min(count, memory // self._bytes)
        self.on_disk, self.bytes_moved = count - self.in_memory, 0
        on_device = self.in_memory
        if device.type == "cuda":  # half of what is free: layers need the rest
            torch.cuda.empty_cache()
            on_device = min(self.in_memory, torch.cuda.mem_get_info(device)[0] // 2 // self._bytes)
        self._tensors = [
            torch.empty(shape, dtype=dtype, device=device if i < on_device else "cpu")
            for i in range(self.in_memory)
        ]

    def read(self, index: int, rows: range) -> Tensor:
        """Some rows of a tensor, on the device; writing them anew may change what was read before."""
        if index < self.in_memory:
            return self._tensors[index][rows.start : rows.stop].to(self._device)
        assert self._file is not None
        value = torch.empty(len(rows), *self._shape[1:], dtype=self._dtype)
        complete = read_into(value, self._file, self._offset(index, rows))
        assert complete, "rows are written before they are read"
        self.bytes_moved += value.nbytes
        return value.to(self._device)

    def write(self, index: int, rows: range, value: Tensor) -> None:
        """Replaces some rows of a tensor.

        Raises:
            OSError: the disk is full.
        """
        if index < self.in_memory:
            self._tensors[index][rows.start : rows.stop].copy_(value)
            return
        assert self._file is not None
        value = value.to("cpu", self._dtype).contiguous()
        write_from(value, self._file, self._offset(index, rows))
        self.bytes_moved += value.nbytes

    def _offset(self, index: int, rows: range) -> int:
        return (index - self.in_memory) * self._bytes + rows.start * (self._bytes // self._shape[0])


def bytes_on_disk(count: int, shape: tuple[int, ...], dtype: torch.dtype, memory: int) -> int:
    """Of tensors as those of `open_boundaries`."""
    size = math.prod(shape) * dtype.itemsize
    return (count - min(count, memory // size)) * size


@contextmanager
def open_boundaries(
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory: int,
    directory: Path,
) -> Iterator[Boundaries]:
    """Room for tensors that are gone at the end, on disk too, and even if the process is killed.

    Args:
        count: of tensors. shape: of each; rows are read and written.
        memory: bytes that they may take in memory. On a CUDA device that is device memory, up to half of
            what is free, and then the host's.
        directory: where a file of those beyond it goes; it has no name there.
    Raises:
        OSError: there is not enough room for it.
    """
    on_disk = bytes_on_disk(count, shape, dtype, memory)
    if not on_disk:
        yield Boundaries(count, shape, dtype, device, memory=memory, file=None)
        return
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, on_disk)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {on_disk:,} bytes of activations beyond the {memory:,} of --memory: "
                f"{error.strerror}",
                str(directory),
            ) from error
        yield Boundaries(count, shape, dtype, device, memory=memory, file=file.fileno())
