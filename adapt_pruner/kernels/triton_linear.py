"""Importance of a linear layer in Triton: importing this module imports triton and registers the op.

A matrix product over the tokens, dy^T x, whose tiles meet their part of the weight in registers and leave as
sums: the gradient itself is never written. Every tile writes its sums to a place of its own, then they are
added up in float64 (triton_launch.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adapt_pruner.kernels.triton_launch import (
    FOLD_TILE,
    FOLD_WARPS,
    UNIT_TILE,
    fold_columns,
    launch,
    sums_of_units,
)

# By bytes per element of x.
TILES = {
    2: {"ROWS": 64, "COLS": 128, "TOKENS": 32},
    4: {"ROWS": 64, "COLS": 128, "TOKENS": 16},
}
# By bytes per element of x and of the weight. Larger tiles read less, but have the registers for it only
# where rows are read 16 bytes at a time.
LARGE_TILES = {
    (2, 2): {"ROWS": 256, "COLS": 128, "TOKENS": 32},
    (2, 4): {"ROWS": 128, "COLS": 128, "TOKENS": 64},
    (4, 4): {"ROWS": 128, "COLS": 128, "TOKENS": 16},
}
FEWEST_LARGE_TILES = 256  # with fewer, processors would be left without one
VECTOR = 16  # features, of which Triton looks for multiples
GROUP = 8  # rows of tiles that neighbouring programs work on, so that their operands meet in the cache
WARPS = 8
STAGES = 3  # up to 96 KB of shared memory, on AMD all 64 KB that there are


@triton.jit
def tile_sums(
    x,
    dy,
    weight,
    partial_sums,
    tokens,
    rows,
    cols,
    x_stride,
    dy_stride,
    weight_stride,
    DIM: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """partial_sums: [tiles of the other axis, length of axis DIM], contiguous."""
    row_tiles = tl.cdiv(rows, ROWS)
    col_tiles = tl.cdiv(cols, COLS)
    in_group = GROUP * col_tiles
    first_tile = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(row_tiles - first_tile, GROUP)
    row_tile = first_tile + tl.program_id(0) % in_group % height
    col_tile = tl.program_id(0) % in_group // height

    first_row = row_tile.to(tl.int64) * ROWS
    first_col = col_tile.to(tl.int64) * COLS
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    token = tl.arange(0, TOKENS).to(tl.int64)[:, None]
    in_rows = (row < rows - first_row)[None, :]
    in_cols = (col < cols - first_col)[None, :]
    dy += first_row
    x += first_col
    grad = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, tokens, TOKENS):
        left = token < tokens - start
        d = tl.load(dy + token * dy_stride + row[None, :], mask=left & in_rows, other=0.0)
        v = tl.load(x + token * x_stride + col[None, :], mask=left & in_cols, other=0.0)
        if WIDEN:
            d = d.to(tl.float32)
            v = v.to(tl.float32)
        grad = tl.dot(tl.trans(d), v, grad, input_precision="ieee")
        dy += TOKENS * tl.cast(dy_stride, tl.int64)
        x += TOKENS * tl.cast(x_stride, tl.int64)

    row = first_row + row
    col = first_col + col
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    w = tl.load(weight + row[:, None] * weight_stride + col[None, :], mask=mask, other=0.0)
    # beyond the matrix the product may be NaN, of zero and infinity
    saliency = tl.where(mask, tl.abs(grad * w.to(tl.float32)), 0.0)
    if DIM == 0:
        tl.store(partial_sums + col_tile.to(tl.int64) * rows + row, tl.sum(saliency, axis=1), mask=row < rows)
    else:
        tl.store(partial_sums + row_tile.to(tl.int64) * cols + col, tl.sum(saliency, axis=0), mask=col < cols)


@triton.jit
def sum_tiles(partial_sums, scores, blocks, length, ROWS: tl.constexpr, COLS: tl.constexpr):
    fold_columns(partial_sums, scores, blocks, length, tl.program_id(0).to(tl.int64), False, ROWS, COLS)


@triton.jit
def sum_indices(index_scores, scores, units, group_size, UNITS: tl.constexpr, INDICES: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    score = sums_of_units(index_scores, unit, units, group_size, UNITS, INDICES)
    tl.store(scores + unit, score.to(tl.float32), mask=unit < units)


@triton_op("adapt_pruner::triton_linear_importance", mutates_args=())
def linear_importance(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> Tensor:
    """The op behind `adapt_pruner.kernels.linear_importance`; x and dy are [tokens, features]."""
    rows, cols = weight.shape
    length = weight.shape[dim]
    tile = _tile(x, weight)
    tiles = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(cols, tile["COLS"])
    partial_sums = x.new_empty((tiles[1 - dim], length), dtype=torch.float32)
    scores = x.new_empty(length, dtype=torch.float32)
    launch(
        tile_sums,
        tiles[0] * tiles[1],
        x,
        dy,
        weight,
        partial_sums,
        x.shape[0],
        rows,
        cols,
        x.stride(0),
        dy.stride(0),
        weight.stride(0),
        DIM=dim,
        WIDEN=triton.knobs.runtime.interpret,  # the interpreter multiplies the bits of bfloat16 as integers
        **tile,
        GROUP=GROUP,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    launch(
        sum_tiles,
        triton.cdiv(length, FOLD_TILE["COLS"]),
        partial_sums,
        scores,
        tiles[1 - dim],
        length,
        **FOLD_TILE,
        num_warps=FOLD_WARPS,
    )
    if group_size == 1:
        return scores
    units = length // group_size
    sums = x.new_empty(units, dtype=torch.float32)
    launch(
        sum_indices,
        triton.cdiv(units, UNIT_TILE["UNITS"]),
        scores,
        sums,
        units,
        group_size,
        **UNIT_TILE,
        num_warps=FOLD_WARPS,
    )
    return sums


def _tile(x: Tensor, weight: Tensor) -> dict[str, int]:
    """Chosen by shapes and dtypes, as the order of the sums depends on it."""
    rows, cols = weight.shape
    large = LARGE_TILES[x.element_size(), weight.element_size()]
    tiles = triton.cdiv(rows, large["ROWS"]) * triton.cdiv(cols, large["COLS"])
    if tiles >= FEWEST_LARGE_TILES and rows % VECTOR == 0 and cols % VECTOR == 0:
        return large
    return TILES[x.element_size()]
