"""What the Triton ops share: a launch that torch.compile can trace, matrices, and sums of partial sums.

Importing this module imports triton.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

FOLD_TILE = {"ROWS": 16, "COLS": 64}
UNIT_TILE = {"UNITS": 16, "INDICES": 64}
FOLD_WARPS = 4


def launch(kernel: Any, programs: int, *arguments: object, **options: object) -> None:
    """Launch on a one-dimensional grid, from the body of a `triton_op`."""
    if programs > 0:
        wrap_triton(kernel)[(programs,)](*arguments, **options)


def matrix_of(tensor: Tensor) -> tuple[int, int, int]:
    """Rows, columns and row stride; a bias is one row of columns."""
    if tensor.dim() == 1:
        return 1, tensor.shape[0], tensor.shape[0]
    return tensor.shape[0], tensor.shape[1], tensor.stride(0)


@triton.jit
def fold_columns(
    partial_sums, scores, blocks, cols, tile, ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The sum of each column of partial_sums, [blocks, cols], contiguous, or its absolute value."""
    end = tl.cast(cols, tl.int64)
    col = tile * COLS + tl.arange(0, COLS)
    sums = tl.zeros([ROWS, COLS], tl.float64)
    for start in range(0, tl.cast(blocks, tl.int64), ROWS):
        block = start + tl.arange(0, ROWS)
        mask = (block < blocks)[:, None] & (col < end)[None, :]
        sums += tl.load(partial_sums + block[:, None] * end + col[None, :], mask=mask, other=0.0)
    score = tl.sum(sums, axis=0)
    if ABSOLUTE:
        score = tl.abs(score)
    tl.store(scores + col, score.to(tl.float32), mask=col < end)


@triton.jit
def sums_of_units(index_scores, unit, units, group_size, UNITS: tl.constexpr, INDICES: tl.constexpr):
    """The sum in float64 of each unit's group_size index scores."""
    end = tl.cast(group_size, tl.int64)
    sums = tl.zeros([UNITS, INDICES], tl.float64)
    for start in range(0, end, INDICES):
        index = start + tl.arange(0, INDICES)
        mask = (unit < units)[:, None] & (index < end)[None, :]
        sums += tl.load(index_scores + unit[:, None] * end + index[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=1)
