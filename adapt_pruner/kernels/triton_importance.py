"""Unit importance in Triton: importing this module imports triton and registers the op.

All members of all sets are worked on together. Tables of addresses and sizes tell a program what is its own,
so that the number of launches depends on how many combinations of dtypes and alignments there are, not on how
many layers. Three steps: one score per index of a member's unit dimension (rows directly; columns as partial
sums of fixed blocks of rows), the sums of those partial sums, and the sum over indices and members per unit.

No atomics. Every element has its fp32 accumulator, chosen by the shape alone; the accumulators are added up
in float64, because the order of that sum is the compiler's, and float64 adds values of like magnitude exactly
in any order.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapt_pruner.kernels.checks import (
    MODES_WITH_FISHERS,
    MODES_WITH_GRADS,
    first_members,
    total_units,
)
from adapt_pruner.kernels.triton_launch import (
    FOLD_TILE,
    FOLD_WARPS,
    UNIT_TILE,
    fold_columns,
    matrix_of,
    sums_of_units,
)

# Elements of a tile: 8 per thread, which is one or two loads of 16 bytes per tensor; 16 per thread spill.
ROW_TILE = {"ROWS": 2, "COLS": 1024}
COLUMN_TILE = {"ROWS": 8, "COLS": 256}
ROWS_PER_BLOCK = 128  # of a matrix, added up by one program into a row of partial sums
ROW_WARPS = 8
COLUMN_WARPS = 8
VECTOR = 8  # elements; rows that begin and end at multiples of it are read 16 bytes at a time

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Tables are int64, with a row for each member or set. Nothing is specialised on what varies with them.
# Fields of a row, after the number of its first program:
PASS_FIELDS = 10  # target, rows, cols; address and row stride of weight, gradient and Fisher diagonal
FOLD_FIELDS = 5  # partial sums, index scores, blocks, cols
SET_FIELDS = 5  # scores, units, first member, end of the members
MEMBER_FIELDS = 2  # and of the table of members: index scores, indices per unit
_reads_table = triton.jit(do_not_specialize=["entries"], do_not_specialize_on_alignment=["table", "members"])


@triton.jit
def _entry_of_program(table, entries, FIELDS: tl.constexpr):
    """The table's row of this program, and the program's number among those of that row.

    The first field of a row is the number of its first program; rows without programs are never found.
    """
    program = tl.program_id(0).to(tl.int64)
    low = 0
    high = entries
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * FIELDS) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    entry = table + low * FIELDS
    return entry, program - tl.load(entry)


@triton.jit
def _matrix_at(field, TYPE: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer and row stride of a matrix, from two fields of a table."""
    pointer = tl.load(field).to(tl.pointer_type(TYPE))
    stride = tl.load(field + 1)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        stride = tl.multiple_of(stride, VECTOR)
    return pointer, stride


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


@_reads_table
def row_scores(
    table,
    entries,
    scores,
    MODE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    FISHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    entry, tile = _entry_of_program(table, entries, FIELDS)
    scores += tl.load(entry + 1)
    rows = tl.load(entry + 2)
    cols = tl.load(entry + 3)
    if ALIGNED:
        cols = tl.multiple_of(cols, VECTOR)
    weight, weight_stride = _matrix_at(entry + 4, WEIGHT, ALIGNED, VECTOR)
    grad, grad_stride = _matrix_at(entry + 6, GRAD, ALIGNED, VECTOR)
    fisher, fisher_stride = _matrix_at(entry + 8, FISHER, ALIGNED, VECTOR)
    row = tile * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        sums += _elements(
            weight, grad, fisher, row, col, mask, weight_stride, grad_stride, fisher_stride, MODE
        )
    score = tl.sum(sums.to(tl.float64), axis=1)
    if MODE == "vectorize":
        score = tl.abs(score)
    tl.store(scores + row, score.to(tl.float32), mask=row < rows)


@_reads_table
def column_partial_sums(
    table,
    entries,
    partial_sums,
    MODE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    FISHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Of each member [blocks of BLOCK rows, cols], contiguous."""
    entry, tile = _entry_of_program(table, entries, FIELDS)
    partial_sums += tl.load(entry + 1)
    rows = tl.load(entry + 2)
    cols = tl.load(entry + 3)
    if ALIGNED:
        cols = tl.multiple_of(cols, VECTOR)
    weight, weight_stride = _matrix_at(entry + 4, WEIGHT, ALIGNED, VECTOR)
    grad, grad_stride = _matrix_at(entry + 6, GRAD, ALIGNED, VECTOR)
    fisher, fisher_stride = _matrix_at(entry + 8, FISHER, ALIGNED, VECTOR)
    col_tiles = (cols + COLS - 1) // COLS
    block = tile // col_tiles
    col = tile % col_tiles * COLS + tl.arange(0, COLS)
    first_row = block * BLOCK
    height = tl.minimum(rows - first_row, BLOCK).to(tl.int32)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, height, ROWS):
        within = start + tl.arange(0, ROWS)
        row = first_row + within
        mask = (within < height)[:, None] & (col < cols)[None, :]
        sums += _elements(
            weight, grad, fisher, row, col, mask, weight_stride, grad_stride, fisher_stride, MODE
        )
    total = tl.sum(sums.to(tl.float64), axis=0)
    tl.store(partial_sums + block * cols + col, total.to(tl.float32), mask=col < cols)


@_reads_table
def column_scores(
    table,
    entries,
    partial_sums,
    scores,
    ABSOLUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    entry, tile = _entry_of_program(table, entries, FIELDS)
    fold_columns(
        partial_sums + tl.load(entry + 1),
        scores + tl.load(entry + 2),
        tl.load(entry + 3),
        tl.load(entry + 4),
        tile,
        ABSOLUTE,
        ROWS,
        COLS,
    )


@_reads_table
def unit_scores(
    table,
    entries,
    members,
    index_scores,
    scores,
    FIELDS: tl.constexpr,
    MEMBER_FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    INDICES: tl.constexpr,
):
    """Of each set: the sum over its members and over the indices of each unit."""
    entry, tile = _entry_of_program(table, entries, FIELDS)
    units = tl.load(entry + 2)
    unit = tile * UNITS + tl.arange(0, UNITS)
    score = tl.zeros([UNITS], tl.float64)
    for i in range(tl.load(entry + 3), tl.load(entry + 4)):
        member = members + i * MEMBER_FIELDS
        score += sums_of_units(
            index_scores + tl.load(member), unit, units, tl.load(member + 1), UNITS, INDICES
        )
    tl.store(scores + tl.load(entry + 1) + unit, score.to(tl.float32), mask=unit < units)


class _Table:
    """Rows of integers, the first of each being the programs of the rows before it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.programs = 0

    def add(self, programs: int, *fields: int) -> None:
        self.rows.append((self.programs, *fields))
        self.programs += programs


class _Work:
    """Who does what: the tables of the kernels, and the sizes of what passes between them."""

    def __init__(self) -> None:
        # by unit dimension, dtypes and alignment
        self.passes: dict[tuple[bool, tuple[torch.dtype, ...], bool], _Table] = defaultdict(_Table)
        self.folds = _Table()
        self.sets = _Table()
        self.members: list[tuple[int, ...]] = []
        self.index_scores = self.partial_sums = self.units = 0

    def add_member(self, tensors: tuple[Tensor, Tensor, Tensor], dim: int, group_size: int) -> None:
        """tensors: weight, gradient, Fisher diagonal; the weight in place of what the mode does not read."""
        rows, cols, _ = matrix_of(tensors[0])
        by_rows = tensors[0].dim() == 2 and dim == 0
        key = by_rows, tuple(t.dtype for t in tensors), all(_is_aligned(t) for t in tensors)
        places = [place for t in tensors for place in (t.data_ptr(), matrix_of(t)[2])]
        self.members.append((self.index_scores, group_size))
        if by_rows:
            programs = triton.cdiv(rows, ROW_TILE["ROWS"])
            self.passes[key].add(programs, self.index_scores, rows, cols, *places)
            self.index_scores += rows
        else:
            blocks = triton.cdiv(rows, ROWS_PER_BLOCK)
            programs = blocks * triton.cdiv(cols, COLUMN_TILE["COLS"])
            self.passes[key].add(programs, self.partial_sums, rows, cols, *places)
            self.folds.add(
                triton.cdiv(cols, FOLD_TILE["COLS"]), self.partial_sums, self.index_scores, blocks, cols
            )
            self.partial_sums += blocks * cols
            self.index_scores += cols

    def add_set(self, units: int, first_member: int, end_member: int) -> None:
        programs = triton.cdiv(units, UNIT_TILE["UNITS"])
        self.sets.add(programs, self.units, units, first_member, end_member)
        self.units += units


def _is_aligned(tensor: Tensor) -> bool:
    _, cols, stride = matrix_of(tensor)
    return tensor.data_ptr() % 16 == 0 and cols % VECTOR == 0 and stride % VECTOR == 0


def _on_device(tables: list[list[tuple[int, ...]]], device: torch.device) -> tuple[Tensor, ...]:
    """All of them in one copy, which the host does not wait for."""
    sizes = [sum(len(row) for row in table) for table in tables]
    fields = [field for table in tables for row in table for field in row]
    return torch.tensor(fields, dtype=torch.int64).to(device, non_blocking=True).split(sizes)


def _launch_pass(
    by_rows: bool,
    dtypes: tuple[torch.dtype, ...],
    aligned: bool,
    work: _Table,
    table: Tensor,
    sums: Tensor,
    mode: str,
) -> None:
    weight, grad, fisher = (TYPES[dtype] for dtype in dtypes)
    kernel = row_scores if by_rows else column_partial_sums
    tile = ROW_TILE if by_rows else {**COLUMN_TILE, "BLOCK": ROWS_PER_BLOCK}
    kernel[(work.programs,)](
        table,
        len(work.rows),
        sums,
        MODE=mode,
        WEIGHT=weight,
        GRAD=grad,
        FISHER=fisher,
        ALIGNED=aligned,
        VECTOR=VECTOR,
        FIELDS=PASS_FIELDS,
        **tile,
        num_warps=ROW_WARPS if by_rows else COLUMN_WARPS,
    )


# Opaque to torch.compile, because an address cannot be traced. A CUDA graph would replay a stale table.
@torch.library.custom_op(
    "adapt_pruner::triton_unit_importance",
    mutates_args=(),
    schema="(Tensor[] weights, Tensor[] grads, Tensor[] fishers, int[] dims, int[] group_sizes, str mode, "
    "int[] sets=[]) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def unit_importance(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    dims: list[int],
    group_sizes: list[int],
    mode: str,
    sets: Sequence[int] = (),
) -> Tensor:
    """The op behind `adapt_pruner.kernels.unit_importances`; arguments are checked there."""
    work = _Work()
    for i, weight in enumerate(weights):
        grad = grads[i] if mode in MODES_WITH_GRADS else weight
        fisher = fishers[i] if mode in MODES_WITH_FISHERS else weight
        work.add_member((weight, grad, fisher), dims[i], group_sizes[i])
    firsts = first_members(len(weights), sets)
    for first, end in zip(firsts, [*firsts[1:], len(weights)], strict=True):
        work.add_set(weights[first].shape[dims[first]] // group_sizes[first], first, end)

    scores = weights[0].new_empty(work.units, dtype=torch.float32)
    index_scores, partial_sums = scores.new_empty(work.index_scores), scores.new_empty(work.partial_sums)
    set_table, member_table, fold_table, *pass_tables = _on_device(
        [work.sets.rows, work.members, work.folds.rows, *(p.rows for p in work.passes.values())],
        scores.device,
    )
    for (key, part), table in zip(work.passes.items(), pass_tables, strict=True):
        if part.programs > 0:
            _launch_pass(*key, part, table, index_scores if key[0] else partial_sums, mode)
    if work.folds.programs > 0:
        column_scores[(work.folds.programs,)](
            fold_table,
            len(work.folds.rows),
            partial_sums,
            index_scores,
            ABSOLUTE=mode == "vectorize",
            FIELDS=FOLD_FIELDS,
            **FOLD_TILE,
            num_warps=FOLD_WARPS,
        )
    if work.sets.programs > 0:
        unit_scores[(work.sets.programs,)](
            set_table,
            len(work.sets.rows),
            member_table,
            index_scores,
            scores,
            FIELDS=SET_FIELDS,
            MEMBER_FIELDS=MEMBER_FIELDS,
            **UNIT_TILE,
            num_warps=FOLD_WARPS,
        )
    return scores


@unit_importance.register_fake
def _fake(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    dims: list[int],
    group_sizes: list[int],
    mode: str,
    sets: Sequence[int] = (),
) -> Tensor:
    return weights[0].new_empty(total_units(weights, dims, group_sizes, sets), dtype=torch.float32)
