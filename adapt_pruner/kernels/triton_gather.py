"""Gathering of kept units in Triton: importing this module imports triton and registers the op.

Elements are moved as integers of their size. Rows, and runs of columns (units of many columns: heads), are
contiguous in the source, so that aligned ones are moved 16 bytes at a time; lone columns are read one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adapt_pruner.kernels.checks import gathered_shapes
from adapt_pruner.kernels.triton_launch import launch, matrix_of

ROW_TILE = {"ROWS": 4, "COLS": 1024}
RUN_TILE = {"ROWS": 32, "COLS": 64}
COLUMN_TILE = {"ROWS": 8, "COLS": 256}  # the source column is worked out once for all rows
WARPS = 8
RUN_WARPS = 4
SHORTEST_RUN = 32  # columns per unit from which a program moves a run; half its lanes are busy then
LAST_NARROW = 2**31 - 4096  # beyond it 32-bit indices of a tile would overflow; 64-bit divisions are slow

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def gather_rows(
    source,
    target,
    keep,
    kept_rows,
    cols,
    col_blocks,
    source_stride,
    group_size,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """target: [kept_rows, cols], contiguous."""
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    row = program // col_blocks * ROWS + tl.arange(0, ROWS)
    col = program % col_blocks * COLS + tl.arange(0, COLS)
    unit = tl.load(keep + row // group_size, mask=row < kept_rows, other=0)
    source_row = unit * group_size + row % group_size
    mask = (row < kept_rows)[:, None] & (col < cols)[None, :]
    words = tl.load(source + source_row[:, None] * source_stride + col[None, :], mask=mask, other=0)
    tl.store(target + row.to(tl.int64)[:, None] * cols + col[None, :], words, mask=mask)


@triton.jit
def gather_runs(
    source,
    target,
    keep,
    kept,
    rows,
    source_stride,
    group_size,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """target: [rows, kept * group_size], contiguous; one kept unit and ROWS rows per program."""
    run = tl.cast(group_size, tl.int64)
    position = tl.program_id(0).to(tl.int64) % kept
    row = tl.program_id(0).to(tl.int64) // kept * ROWS + tl.arange(0, ROWS)
    first = tl.load(keep + position) * run
    for start in range(0, run, COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < rows)[:, None] & (col < run)[None, :]
        words = tl.load(source + row[:, None] * source_stride + first + col[None, :], mask=mask, other=0)
        tl.store(target + (row[:, None] * kept + position) * run + col[None, :], words, mask=mask)


@triton.jit
def gather_columns(
    source,
    target,
    keep,
    kept_cols,
    rows,
    col_blocks,
    source_stride,
    group_size,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """target: [rows, kept_cols], contiguous."""
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    row = (program // col_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = program % col_blocks * COLS + tl.arange(0, COLS)
    unit = tl.load(keep + col // group_size, mask=col < kept_cols, other=0)
    source_col = unit * group_size + col % group_size
    mask = (row < rows)[:, None] & (col < kept_cols)[None, :]
    words = tl.load(source + row[:, None] * source_stride + source_col[None, :], mask=mask, other=0)
    tl.store(target + row[:, None] * kept_cols + col[None, :], words, mask=mask)


@triton_op("adapt_pruner::triton_gather_units", mutates_args=())
def gather_units(
    tensors: list[Tensor], dims: list[int], group_sizes: list[int], keep: Tensor
) -> list[Tensor]:
    """The op behind `adapt_pruner.kernels.gather_units`; `keep` is on the device of the tensors."""
    shapes = gathered_shapes(tensors, dims, group_sizes, keep)
    out = [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
    _gather_all(tensors, dims, group_sizes, keep, out)
    return out


@triton_op("adapt_pruner::triton_gather_units_out", mutates_args={"out"})
def gather_units_out(
    tensors: list[Tensor], dims: list[int], group_sizes: list[int], keep: Tensor, out: list[Tensor]
) -> None:
    """`gather_units` into contiguous buffers."""
    _gather_all(tensors, dims, group_sizes, keep, out)


def _gather_all(
    tensors: list[Tensor], dims: list[int], group_sizes: list[int], keep: Tensor, out: list[Tensor]
) -> None:
    for tensor, dim, group_size, output in zip(tensors, dims, group_sizes, out, strict=True):
        if output.numel() > 0:
            word = WORDS[tensor.element_size()]
            _gather(tensor.view(word), output.view(word), keep, dim, group_size)


def _gather(source: Tensor, target: Tensor, keep: Tensor, dim: int, group_size: int) -> None:
    rows, cols, _ = matrix_of(target)
    stride = matrix_of(source)[2]
    by_rows = source.dim() == 2 and dim == 0
    if group_size >= SHORTEST_RUN and not by_rows:
        kept = keep.shape[0]
        launch(
            gather_runs,
            triton.cdiv(rows, RUN_TILE["ROWS"]) * kept,
            source,
            target,
            keep,
            kept,
            rows,
            stride,
            group_size,
            **RUN_TILE,
            num_warps=RUN_WARPS,
        )
        return
    tile = ROW_TILE if by_rows else COLUMN_TILE
    col_blocks = triton.cdiv(cols, tile["COLS"])
    launch(
        gather_rows if by_rows else gather_columns,
        triton.cdiv(rows, tile["ROWS"]) * col_blocks,
        source,
        target,
        keep,
        *((rows, cols) if by_rows else (cols, rows)),
        col_blocks,
        stride,
        group_size,
        WIDE=max(rows, cols) > LAST_NARROW,
        **tile,
        num_warps=WARPS,
    )
