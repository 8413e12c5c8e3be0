"""Sequences of tokens that begin alike, laid out so that a model reads their common beginnings once.

A row is a prefix tree: each sequence has a path of columns through it, and a token sees what is before it on
its path. A row without branches is an ordinary sequence, which needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A sequence goes into the row of another one where it shares at least this part of itself with it: the rest
# reads, in vain, a mask over the whole row.
_SHARED = 0.25
# Columns of a row with branches, or twice those of a sequence if that is more: attention takes their square.
_COLUMNS = 2048
# Rows of a batch are at least this part of the longest one, the rest being padding.
_FILLED = 0.75


@dataclass(frozen=True)
class Row:
    """A prefix tree of sequences.

    Args:
        tokens: [columns], int32.
        sequences: indices of the sequences in it.
        paths: for each of them its columns, int64, ascending.
    """

    tokens: np.ndarray
    sequences: tuple[int, ...]
    paths: tuple[np.ndarray, ...]

    @property
    def branches(self) -> bool:
        return len(self.tokens) > max(map(len, self.paths))


@dataclass(frozen=True)
class Batch:
    """Rows as a model reads them.

    Args:
        rows: longest first.
        tokens: [rows, columns], int64, padded on the right.
        positions: [rows, columns], int64, of the tokens in their sequences; None for 0, 1, 2 and so on.
        seen: [rows, columns, columns], bool: the column of the last dimension is seen from the one before;
            None where every column sees all before it.
    """

    rows: tuple[Row, ...]
    tokens: Tensor
    positions: Tensor | None
    seen: Tensor | None


def shared_rows(sequences: Sequence[np.ndarray], longest: int) -> list[Row]:
    """Rows that hold every sequence.

    Args:
        sequences: tokens of each, [length], not empty.
        longest: sequences of more tokens get a row without branches, all if it is 0.
    """
    # Big-endian bytes sort as the tokens do, so that a sequence shares most with the one before it.
    keys = [np.asarray(sequence, ">i4").tobytes() for sequence in sequences]
    rows: list[_Growing] = []
    for index in sorted(range(len(sequences)), key=keys.__getitem__):
        sequence = sequences[index]
        if not rows or not rows[-1].takes(sequence, longest):
            rows.append(_Growing())
        rows[-1].add(index, sequence)
    return [row.finish() for row in rows]


class _Growing:
    """A row while sequences are added to it, in the order of their tokens."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._columns = 0
        self._sequences: list[int] = []
        self._paths: list[np.ndarray] = []
        self._last = np.zeros(0, np.int32)

    def takes(self, sequence: np.ndarray, longest: int) -> bool:
        shared = _common(self._last, sequence)
        if shared == len(self._last) == self._columns:  # goes on where the row ends, or repeats it
            return True
        columns = self._columns + len(sequence) - shared
        allowed = len(sequence) <= longest and len(self._last) <= longest
        fits = columns <= max(_COLUMNS, 2 * len(sequence))
        return allowed and fits and shared >= _SHARED * len(sequence)

    def add(self, index: int, sequence: np.ndarray) -> None:
        shared = _common(self._last, sequence)
        new = np.arange(self._columns, self._columns + len(sequence) - shared)
        before = self._paths[-1][:shared] if self._paths else new[:0]
        self._paths.append(np.concatenate((before, new)))
        self._sequences.append(index)
        self._tokens.append(sequence[shared:])
        self._columns += len(new)
        self._last = sequence

    def finish(self) -> Row:
        tokens = np.concatenate(self._tokens).astype(np.int32)
        return Row(tokens, tuple(self._sequences), tuple(self._paths))


def _common(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def batches(rows: Sequence[Row], tokens: int) -> Iterator[Batch]:
    """The rows in batches of at most so many tokens, padding included, or of one row.

    Longest first: rows of a batch are of similar length, and memory runs out at the start if at all. Rows
    with branches and rows without are not mixed, so that the latter need no mask.
    """
    for branches in (True, False):
        ordered = sorted(
            (row for row in rows if row.branches == branches),
            key=lambda row: (-len(row.tokens), row.sequences),
        )
        start = 0
        while start < len(ordered):
            columns = len(ordered[start].tokens)
            fitting = ordered[start : start + max(1, tokens // columns)]
            rows_here = tuple(row for row in fitting if len(row.tokens) >= _FILLED * columns)
            yield _batch(rows_here, branches)
            start += len(rows_here)


def _batch(rows: tuple[Row, ...], branches: bool) -> Batch:
    columns = len(rows[0].tokens)
    tokens = np.zeros((len(rows), columns), np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
    if not branches:
        return Batch(rows, torch.from_numpy(tokens), None, None)
    positions = np.zeros_like(tokens)
    # Padding sees itself, or its attention would be a mean of nothing.
    seen = np.tile(np.eye(columns, dtype=bool), (len(rows), 1, 1))
    before = np.tri(max(len(path) for row in rows for path in row.paths), dtype=bool)
    for number, row in enumerate(rows):
        for path in row.paths:
            positions[number, path] = np.arange(len(path))
            seen[number][np.ix_(path, path)] = before[: len(path), : len(path)]
    return Batch(rows, torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(seen))
