"""Running statistics of activations in Triton: importing this module imports triton and registers the op.

A program holds a block of rows in registers: its values are read once, and their distances are taken from
their own mean, rounded, which is then put right. The blocks are put together in float64: first the mean of
all of them, then the squared distances of each from it, so that no block waits for another. The result is
merged into the running values (Chan, Golub and LeVeque 1979).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adapt_pruner.kernels.triton_launch import launch

BLOCK_TILE = {"ROWS": 128, "COLS": 64}
MERGE_TILE = {"BLOCKS": 64, "COLS": 16}
BLOCK_WARPS = 8
MERGE_WARPS = 4


@triton.jit
def block_stats(x, means, moments, tokens, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """means (float64), moments (fp32): [blocks of ROWS rows, cols], contiguous."""
    end = tl.cast(cols, tl.int64)
    col_tiles = (end + COLS - 1) // COLS
    block = tl.program_id(0) // col_tiles
    col = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    mask = (row < tokens) & (col < end)[None, :]
    values = tl.load(x + row * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    rows = tl.minimum(tokens - block * ROWS, ROWS).to(tl.float32)
    center = tl.sum(values, axis=0) / rows
    distances = tl.where(mask, values - center[None, :], 0.0)
    off = tl.sum(distances, axis=0).to(tl.float64)
    moment = tl.sum((distances * distances).to(tl.float64), axis=0) - off * off / rows
    moment = tl.where(moment < 0.0, 0.0, moment)  # tl.maximum would drop NaN
    place = block * end + col
    tl.store(means + place, center.to(tl.float64) + off / rows, mask=col < end)
    tl.store(moments + place, moment.to(tl.float32), mask=col < end)


@triton.jit
def merge_blocks(
    means,
    moments,
    mean,
    m2,
    count,
    tokens,
    cols,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
):
    end = tl.cast(cols, tl.int64)
    blocks = (tl.cast(tokens, tl.int64) + ROWS - 1) // ROWS
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    added = tl.cast(tokens, tl.float64)
    totals = tl.zeros([BLOCKS, COLS], tl.float64)
    for start in range(0, blocks, BLOCKS):
        block = (start + tl.arange(0, BLOCKS))[:, None]
        mask = (block < blocks) & (col < end)[None, :]
        rows = tl.minimum(tokens - block * ROWS, ROWS).to(tl.float64)
        totals += rows * tl.load(means + block * end + col[None, :], mask=mask, other=0.0)
    new_mean = tl.sum(totals, axis=0) / added
    squares = tl.zeros([BLOCKS, COLS], tl.float64)
    for start in range(0, blocks, BLOCKS):
        block = (start + tl.arange(0, BLOCKS))[:, None]
        mask = (block < blocks) & (col < end)[None, :]
        place = block * end + col[None, :]
        rows = tl.minimum(tokens - block * ROWS, ROWS).to(tl.float64)
        distance = tl.load(means + place, mask=mask, other=0.0) - new_mean[None, :]
        squares += tl.where(mask, rows * distance * distance, 0.0)
        squares += tl.load(moments + place, mask=mask, other=0.0)
    before = tl.load(count).to(tl.float64)
    share = added / (before + added)
    old_mean = tl.load(mean + col, mask=col < end, other=0.0)
    old_m2 = tl.load(m2 + col, mask=col < end, other=0.0)
    delta = new_mean - old_mean
    tl.store(mean + col, old_mean + delta * share, mask=col < end)
    tl.store(m2 + col, old_m2 + tl.sum(squares, axis=0) + delta * delta * before * share, mask=col < end)


@triton_op("adapt_pruner::triton_activation_stats", mutates_args={"mean", "m2", "count"})
def activation_stats(x: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> None:
    """The op behind `adapt_pruner.kernels.activation_stats`, for [tokens, columns] with contiguous rows."""
    tokens, cols = x.shape
    blocks = triton.cdiv(tokens, BLOCK_TILE["ROWS"])
    means = x.new_empty((blocks, cols), dtype=torch.float64)
    moments = x.new_empty((blocks, cols), dtype=torch.float32)
    launch(
        block_stats,
        blocks * triton.cdiv(cols, BLOCK_TILE["COLS"]),
        x,
        means,
        moments,
        tokens,
        cols,
        x.stride(0),
        **BLOCK_TILE,
        num_warps=BLOCK_WARPS,
    )
    launch(
        merge_blocks,
        triton.cdiv(cols, MERGE_TILE["COLS"]),
        means,
        moments,
        mean,
        m2,
        count,
        tokens,
        cols,
        ROWS=BLOCK_TILE["ROWS"],
        **MERGE_TILE,
        num_warps=MERGE_WARPS,
    )
    count.add_(tokens)
