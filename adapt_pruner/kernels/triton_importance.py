"""Unit importance in Triton: importing this module imports triton and registers the op.

Per member: one score per index of the unit dimension (rows directly; columns as partial sums of fixed blocks
of rows, then their sum), then the indices of each unit are added to its score. No atomics. Every element has
its fp32 accumulator, chosen by the shape alone; the accumulators are added up in float64, because the order
of that sum is the compiler's, and float64 adds values of like magnitude exactly in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from adapt_pruner.kernels.checks import MODES_WITH_FISHERS, MODES_WITH_GRADS

# Elements of a tile: 8 per thread, which is one or two loads of 16 bytes per tensor; 16 per thread spill.
ROW_TILE = {"ROWS": 2, "COLS": 1024}
COLUMN_TILE = {"ROWS": 8, "COLS": 256}
ROWS_PER_BLOCK = 128  # of a matrix, added up by one program into a row of partial sums
FOLD_TILE = {"ROWS": 16, "COLS": 64}
UNIT_TILE = {"UNITS": 16, "INDICES": 64}
ROW_WARPS = 8
COLUMN_WARPS = 8
FOLD_WARPS = 4


@triton.jit
def _elements(
    weight, grad, fisher, row, col, mask, weight_stride, grad_stride, fisher_stride, MODE: tl.constexpr
):
    """The element-wise quantity of a mode at rows x columns, 0 outside the mask."""
    row = row[:, None]
    col = col[None, :]
    w = tl.load(weight + row * weight_stride + col, mask=mask, other=0.0).to(tl.float32)
    if MODE == "magnitude_l1":
        element = tl.abs(w)
    elif MODE == "magnitude_l2":
        element = w * w
    elif MODE == "second":
        h = tl.load(fisher + row * fisher_stride + col, mask=mask, other=0.0).to(tl.float32)
        element = tl.abs(w * h * w)
    else:
        g = tl.load(grad + row * grad_stride + col, mask=mask, other=0.0).to(tl.float32)
        element = w * g
        if MODE == "mixed":
            h = tl.load(fisher + row * fisher_stride + col, mask=mask, other=0.0).to(tl.float32)
            element -= 0.5 * (w * h * w)
        if MODE != "vectorize":
            element = tl.abs(element)
    return element


@triton.jit
def row_scores(
    weight,
    grad,
    fisher,
    scores,
    rows,
    cols,
    weight_stride,
    grad_stride,
    fisher_stride,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    end = tl.cast(cols, tl.int64)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, end, COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < rows)[:, None] & (col < end)[None, :]
        sums += _elements(
            weight, grad, fisher, row, col, mask, weight_stride, grad_stride, fisher_stride, MODE
        )
    score = tl.sum(sums.to(tl.float64), axis=1)
    if MODE == "vectorize":
        score = tl.abs(score)
    tl.store(scores + row, score.to(tl.float32), mask=row < rows)


@triton.jit
def column_partial_sums(
    weight,
    grad,
    fisher,
    partial_sums,
    rows,
    cols,
    weight_stride,
    grad_stride,
    fisher_stride,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """partial_sums: [blocks of BLOCK rows, cols], contiguous."""
    end = tl.cast(cols, tl.int64)
    col_blocks = (end + COLS - 1) // COLS
    block = tl.program_id(0) // col_blocks
    col = tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)
    last_row = tl.minimum((block + 1) * BLOCK, rows)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(block * BLOCK, last_row, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last_row)[:, None] & (col < end)[None, :]
        sums += _elements(
            weight, grad, fisher, row, col, mask, weight_stride, grad_stride, fisher_stride, MODE
        )
    total = tl.sum(sums.to(tl.float64), axis=0)
    tl.store(partial_sums + block * end + col, total.to(tl.float32), mask=col < end)


@triton.jit
def column_scores(
    partial_sums, scores, blocks, cols, ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    end = tl.cast(cols, tl.int64)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
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
def add_unit_scores(
    index_scores,
    scores,
    units,
    group_size,
    FIRST: tl.constexpr,
    UNITS: tl.constexpr,
    INDICES: tl.constexpr,
):
    """scores += the sum of each unit's group_size index scores; the first member overwrites them."""
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    end = tl.cast(group_size, tl.int64)
    sums = tl.zeros([UNITS, INDICES], tl.float64)
    for start in range(0, end, INDICES):
        index = start + tl.arange(0, INDICES)
        mask = (unit < units)[:, None] & (index < end)[None, :]
        sums += tl.load(index_scores + unit[:, None] * end + index[None, :], mask=mask, other=0.0)
    score = tl.sum(sums, axis=1)
    if not FIRST:
        score += tl.load(scores + unit, mask=unit < units, other=0.0)
    tl.store(scores + unit, score.to(tl.float32), mask=unit < units)


@triton_op("adapt_pruner::triton_unit_importance", mutates_args=())
def unit_importance(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    dims: list[int],
    group_sizes: list[int],
    mode: str,
) -> Tensor:
    """The op behind `adapt_pruner.kernels.unit_importance`; arguments are checked there."""
    units = weights[0].shape[dims[0]] // group_sizes[0]
    scores = weights[0].new_empty(units, dtype=torch.float32)
    if units == 0:
        return scores
    for i, weight in enumerate(weights):
        # a mode that does not read gradients gets the weight in their place: the kernel drops the argument
        grad = grads[i] if mode in MODES_WITH_GRADS else weight
        fisher = fishers[i] if mode in MODES_WITH_FISHERS else weight
        index_scores = _index_scores(weight, grad, fisher, dims[i], mode)
        wrap_triton(add_unit_scores)[(triton.cdiv(units, UNIT_TILE["UNITS"]),)](
            index_scores, scores, units, group_sizes[i], FIRST=i == 0, **UNIT_TILE, num_warps=FOLD_WARPS
        )
    return scores


def _index_scores(weight: Tensor, grad: Tensor, fisher: Tensor, dim: int, mode: str) -> Tensor:
    """One fp32 score for each index of dimension `dim`."""
    scores = weight.new_empty(weight.shape[dim], dtype=torch.float32)
    # a bias is one row of columns
    rows, cols = (1, weight.shape[0]) if weight.dim() == 1 else weight.shape
    strides = [t.shape[0] if t.dim() == 1 else t.stride(0) for t in (weight, grad, fisher)]
    if weight.dim() == 2 and dim == 0:
        wrap_triton(row_scores)[(triton.cdiv(rows, ROW_TILE["ROWS"]),)](
            weight, grad, fisher, scores, rows, cols, *strides, MODE=mode, **ROW_TILE, num_warps=ROW_WARPS
        )
        return scores
    blocks = triton.cdiv(rows, ROWS_PER_BLOCK)
    partial_sums = weight.new_empty((blocks, cols), dtype=torch.float32)
    if blocks > 0:
        wrap_triton(column_partial_sums)[(blocks * triton.cdiv(cols, COLUMN_TILE["COLS"]),)](
            weight,
            grad,
            fisher,
            partial_sums,
            rows,
            cols,
            *strides,
            MODE=mode,
            BLOCK=ROWS_PER_BLOCK,
            **COLUMN_TILE,
            num_warps=COLUMN_WARPS,
        )
    wrap_triton(column_scores)[(triton.cdiv(cols, FOLD_TILE["COLS"]),)](
        partial_sums, scores, blocks, cols, ABSOLUTE=mode == "vectorize", **FOLD_TILE, num_warps=FOLD_WARPS
    )
    return scores
