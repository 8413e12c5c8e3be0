"""Tensors of a checkpoint as pruning leaves them, read from its files a few at a time.

Files are read and not mapped: pages of a mapping count as resident memory for as long as there is memory, and
bytes that change under it would change the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from adapt_pruner.checkpoint import DTYPE_BYTES, Checkpoint, CheckpointError, TensorInfo
from adapt_pruner.families import UnitTensor
from adapt_pruner.plan import Indices
from adapt_pruner.saving import DTYPE_NAMES
from adapt_pruner.surgery import gather_members

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ELEMENTS_AT_ONCE = 2**22
KeptMembers = tuple[Sequence[UnitTensor], Indices]  # as `plan.pruned_members` has them


class TensorReader:
    """Reads tensors of a verified checkpoint in one dtype, onto one device; usable from several threads.

    Attributes:
        bytes_read: from files, so far.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, backend: str = "auto"
    ) -> None:
        self.bytes_read = 0
        self._checkpoint, self._dtype, self._device, self._backend = checkpoint, dtype, device, backend
        self._finite: set[str] = set()
        self._lock = threading.Lock()

    def read(self, name: str, kept: KeptMembers | None = None) -> Tensor:
        """One tensor, or what is left of it.

        Args:
            kept: the members in it that belong to units, and the units that stay; None for all of it.
        Raises:
            CheckpointError: the file ends early, or a value is NaN or infinite in this dtype.
        """
        info = self._checkpoint.tensors[name]
        tensor = self._read_range(info, 0, info.numel).view(info.shape).to(self._dtype)
        if name not in self._finite:
            self._require_finite(name, tensor)
            self._finite.add(name)
        if kept is not None:
            members, keep = kept
            # On the CPU, whatever the device is: the whole tensor need not fit there.
            backend = self._backend if self._device.type == "cpu" else "auto"
            tensor = gather_members({name: tensor}, members, keep, backend=backend)[name]
        return tensor.to(self._device)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix: [len(rows), columns].

        Args:
            rows: ascending int64.
        Raises:
            ValueError: the matrix has no such row. CheckpointError: the file ends early.
        """
        info = self._checkpoint.tensors[name]
        count, columns = info.shape
        if len(rows) and int(rows[-1]) >= count:
            raise ValueError(f"{name} has {count} rows, asked for row {int(rows[-1])}")
        breaks = torch.nonzero(rows.diff() != 1)[:, 0] + 1
        runs = rows.tensor_split(breaks)
        parts = [
            self._read_range(info, int(run[0]) * columns, len(run) * columns) for run in runs if len(run)
        ]
        return torch.cat(parts).view(-1, columns).to(self._device, self._dtype)

    def require_finite(self, names: Iterable[str]) -> None:
        """Looks at tensors that have not been read whole so far, a part at a time.

        Raises:
            CheckpointError: as of `read`.
        """
        for name in names:
            info = self._checkpoint.tensors[name]
            for first in range(0, 0 if name in self._finite else info.numel, _ELEMENTS_AT_ONCE):
                numel = min(_ELEMENTS_AT_ONCE, info.numel - first)
                self._require_finite(name, self._read_range(info, first, numel).to(self._dtype))
            self._finite.add(name)

    def _read_range(self, info: TensorInfo, first: int, numel: int) -> Tensor:
        """Consecutive elements of a tensor: [numel], in the dtype of the file."""
        size = DTYPE_BYTES[info.dtype]
        tensor = torch.empty(numel, dtype=TORCH_DTYPES[info.dtype])
        with info.shard.open("rb", buffering=0) as file:
            if not read_into(tensor, file.fileno(), info.start + first * size):
                raise CheckpointError(f"{info.shard}: ends within a tensor that its header has")
        with self._lock:
            self.bytes_read += numel * size
        return tensor

    def _require_finite(self, name: str, tensor: Tensor) -> None:
        """Without a temporary of the size of the tensor."""
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{self._checkpoint.directory}: {count} of {tensor.numel()} values of {name} are NaN or "
                f"infinite in {self._dtype}"
            )


def read_into(tensor: Tensor, file: int, offset: int) -> bool:
    """Fills a contiguous tensor in host memory from a file; false if that ends before."""
    left = tensor.flatten().view(torch.uint8).numpy().data
    while left:
        count = os.preadv(file, [left], offset)
        if count == 0:
            return False
        left, offset = left[count:], offset + count
    return True


def write_from(tensor: Tensor, file: int, offset: int) -> None:
    """Writes a contiguous tensor in host memory to a file."""
    left = tensor.flatten().view(torch.uint8).numpy().data
    while left:
        count = os.pwritev(file, [left], offset)
        left, offset = left[count:], offset + count


def require_fit(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises CheckpointError unless the checkpoint has tensors of these names and shapes."""
    missing = sorted(shapes.keys() - checkpoint.tensors.keys())
    mismatched = [
        f"{name}: {checkpoint.tensors[name].shape}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name not in missing and checkpoint.tensors[name].shape != tuple(shape)
    ]
    if missing or mismatched:
        problems = {"missing_keys": missing, "mismatched_keys": mismatched}
        found = {what: names for what, names in problems.items() if names}
        raise CheckpointError(f"{checkpoint.directory}: tensors do not fit the config: {found}")
