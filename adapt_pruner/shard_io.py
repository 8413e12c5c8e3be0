"""Safetensors shards put together from parts of other files: in bounded memory, with checksums, resumable.

The bytes are moved by `adapt_pruner._io` (csrc/io), or by numpy where that is not built. No torch.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import reprlib
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapt_pruner.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    CheckpointError,
    read_header,
    weights_layout,
    write_json,
)

logger = logging.getLogger(__name__)

CHECKSUMS_NAME = "checksums.json"
MAX_SHARD_BYTES = 4 * 2**30
FORMAT_VERSION = 1
BUFFER_BYTES = 2**20  # two of each thread, small enough for its cache
MAX_THREADS = 8

# Ascending [first, length] of rows, columns or bytes: [runs, 2]
Runs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Bytes of a file: of each of `rows` rows, `stride` bytes apart from `offset` on, the `runs` one after
    the other."""

    source: Path
    offset: int
    rows: int
    stride: int
    runs: Runs

    @property
    def num_bytes(self) -> int:
        return self.rows * int(self.runs[:, 1].sum())


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: what it is, and the pieces that its bytes come from, one after the other.

    `pieces` is called when they are needed: the runs of all tensors together can be large.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Sequence[Piece]]


def write_shards(directory: Path, tensors: Sequence[NewTensor], *, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes tensors as the safetensors files of a model, with their index and checksums.json.

    The files are those that safetensors itself would write, of at most `max_bytes` of tensors unless one
    tensor is larger. What an earlier call with the same arguments has finished is checked by its checksums
    and kept; a file that is damaged is named in a warning and written again.

    Args:
        tensors: in the order in which they are spread over the files.
    Raises:
        OSError: a file could not be read or written.
    """
    shards = _spread(tensors, max_bytes)
    done = _read_checksums(directory) or {}
    weight_map: dict[str, str] = {}
    checksums: dict[str, Any] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
        problem = _damage(directory / name, done[name]) if name in done else None
        if problem:
            warnings.warn(f"{problem}; it is written again", stacklevel=2)
        if name in done and not problem:
            logger.info("%s was finished before", name)
            checksums[name] = done[name]
        else:
            checksums[name] = _write_shard(directory / name, shard)
        _write_checksums(directory, checksums)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def verify_checksums(checkpoint: Checkpoint) -> int | None:
    """Reads the files of a model that has a checksums.json, and compares.

    Returns:
        The number of tensors; None where there are no checksums.
    Raises:
        CheckpointError: a file is missing, truncated, damaged or has no checksums; the message names it and
            the first tensors.
    """
    directory = checkpoint.directory
    recorded = _read_checksums(directory)
    if recorded is None:
        return None
    if unknown := sorted({shard.name for shard in checkpoint.states} - recorded.keys()):
        raise CheckpointError(
            f"{directory / CHECKSUMS_NAME} has no checksums of {unknown}; delete it if the weights are sound"
        )
    for name, checksums in recorded.items():
        if problem := _damage(directory / name, checksums):
            raise CheckpointError(problem)
    return sum(len(checksums["tensors"]) for checksums in recorded.values())


def _spread(tensors: Sequence[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_shard(path: Path, tensors: Sequence[NewTensor]) -> dict[str, Any]:
    """Writes a file and returns its checksums."""
    text, starts = weights_layout({t.name: (t.dtype, t.shape) for t in tensors})
    by_name = {tensor.name: tensor for tensor in tensors}
    ordered = [by_name[name] for name in starts]
    end = sum(tensor.num_bytes for tensor in tensors)
    head = len(text).to_bytes(8, "little") + text
    path.unlink(missing_ok=True)  # it may be a link to another file
    with path.open("xb") as file:
        file.write(head)
        file.truncate(len(head) + end)
    parts = [(len(head) + starts[t.name], t.pieces()) for t in ordered]
    for tensor, (_, pieces) in zip(ordered, parts, strict=True):
        got = sum(piece.num_bytes for piece in pieces)
        assert got == tensor.num_bytes, f"{tensor.name}: pieces of {got} bytes, expected {tensor.num_bytes}"
    values = _copy(parts, path)
    return {
        "bytes": len(head) + end,
        "header": f"{zlib.crc32(head):08x}",
        "tensors": {t.name: f"{value:08x}" for t, value in zip(ordered, values, strict=True)},
    }


def _damage(path: Path, recorded: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that has checksums, or None."""
    if not path.is_file():
        return f"{path}: the file is missing, {CHECKSUMS_NAME} has it"
    if (size := path.stat().st_size) != recorded["bytes"]:
        return f"{path}: {size} bytes, {CHECKSUMS_NAME} has it with {recorded['bytes']}"
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        return str(error)
    with path.open("rb") as file:
        head = file.read(min((t.start for t in tensors.values()), default=size))
    if f"{zlib.crc32(head):08x}" != recorded["header"] or tensors.keys() != recorded["tensors"].keys():
        return f"{path}: the header differs from its checksum"
    whole = [Piece(path, t.start, 1, 0, np.array([[0, t.end - t.start]])) for t in tensors.values()]
    values = _copy([(0, [piece] if piece.num_bytes else []) for piece in whole], None)
    wrong = [
        name
        for name, value in zip(tensors, values, strict=True)
        if f"{value:08x}" != recorded["tensors"][name]
    ]
    if wrong:
        return f"{path}: {len(wrong)} of {len(tensors)} tensors differ from their checksums: {wrong[:5]}"
    return None


def _read_checksums(directory: Path) -> dict[str, Any] | None:
    path = directory / CHECKSUMS_NAME
    if not path.exists():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version, files = contents["format_version"], dict(contents["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; delete it if the weights are not") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version is {version!r}, expected {FORMAT_VERSION}")
    for name, entry in files.items():
        whole = isinstance(entry, dict) and {"bytes", "header", "tensors"} <= entry.keys()
        if Path(name).name != name or not whole or not isinstance(entry["tensors"], dict):
            raise CheckpointError(
                f"{path} is damaged: {name!r} has {reprlib.repr(entry)}; delete it if the weights are not"
            )
    return files


def _write_checksums(directory: Path, files: Mapping[str, Any]) -> None:
    write_json(
        directory / CHECKSUMS_NAME,
        {"format_version": FORMAT_VERSION, "algorithm": "crc32", "files": dict(files)},
    )


def _copy(tensors: Sequence[tuple[int, Sequence[Piece]]], target: Path | None) -> list[int]:
    """Writes pieces to a file that exists, from the given offsets on, or only reads them; CRC-32 of each."""
    sources = list(dict.fromkeys(piece.source for _, pieces in tensors for piece in pieces))
    numbers = {source: number for number, source in enumerate(sources)}
    plain = [
        (offset, [(numbers[p.source], p.offset, p.rows, p.stride, p.runs) for p in pieces])
        for offset, pieces in tensors
    ]
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    values: list[int] = _engine()(
        [os.fsencode(s) for s in sources], plain, os.fsencode(target or ""), threads, BUFFER_BYTES
    )
    return values


def native_problem() -> str | None:
    """Why `adapt_pruner._io` cannot be used here, or None."""
    try:
        importlib.import_module("adapt_pruner._io")
    except ImportError as error:  # absent, or built for another Python
        return f"extension not built: {error}"
    return None


@functools.cache
def _engine() -> Callable[..., list[int]]:
    """The native `copy`, or what stands in for it."""
    if problem := native_problem():
        warnings.warn(f"native shard I/O cannot be used ({problem}): numpy copies, slower", stacklevel=2)
        return _copy_by_numpy
    copy: Callable[..., list[int]] = importlib.import_module("adapt_pruner._io").copy
    return copy


def _copy_by_numpy(
    sources: Sequence[bytes],
    tensors: Sequence[tuple[int, Sequence[tuple[int, int, int, int, Runs]]]],
    target: bytes,
    threads: int,
    buffer_bytes: int,
) -> list[int]:
    """As `copy` of csrc/io, in one thread."""
    checksums = []
    with open(os.fsdecode(target) or os.devnull, "r+b") as output:
        for target_offset, pieces in tensors:
            output.seek(target_offset)
            checksum = 0
            for source, offset, rows, stride, runs in pieces:
                with open(os.fsdecode(sources[source]), "rb") as file:
                    for part in _parts(file, offset, rows, stride, runs, buffer_bytes):
                        checksum = zlib.crc32(part, checksum)
                        output.write(part)
            checksums.append(checksum)
    return checksums


def _parts(
    file: Any, offset: int, rows: int, stride: int, runs: Runs, buffer_bytes: int
) -> Any:  # an iterator over buffers
    def read(start: int, length: int) -> bytes:
        file.seek(start)
        data: bytes = file.read(length)
        if len(data) != length:
            raise OSError(5, "file ends before the data that was expected in it", file.name)
        return data

    if rows == 1 or stride > buffer_bytes:
        for row in range(rows):
            for first, length in runs.tolist():
                for done in range(0, length, buffer_bytes):
                    start = offset + row * stride + first + done
                    yield read(start, min(buffer_bytes, length - done))
        return
    # Whole elements are taken: the largest ones that all runs consist of.
    size = next(s for s in (8, 4, 2, 1) if not stride % s and not np.any(runs % s))
    columns = np.concatenate([np.arange(first // size, (first + n) // size) for first, n in runs.tolist()])
    step = max(1, buffer_bytes // stride)
    end = int(runs[-1].sum())
    for row in range(0, rows, step):
        count = min(step, rows - row)
        data = read(offset + row * stride, (count - 1) * stride + end).ljust(count * stride)
        yield np.frombuffer(data, f"u{size}").reshape(count, -1)[:, columns].tobytes()
