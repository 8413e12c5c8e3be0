"""Importance of a linear layer on the CPU: the BLAS library's matrix product, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from adapt_pruner.kernels.checks import check_linear

SMALL_GRADIENT = 1 << 20  # elements; a few MB are not worth a loop
LARGEST_PART = (
    25  # a tile, and the copy of outputs beside it, are at most one of so many parts of the gradient
)
ROWS_STEP = 256  # rows of a tile are a multiple of this, where there are as many: the libraries like it


def tile_shape(out_features: int, in_features: int, longest: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile: long sides, because every tile packs its operands anew."""
    gradient = out_features * in_features
    if gradient <= SMALL_GRADIENT:
        return out_features, in_features
    cols = min(in_features, longest[1])
    rows = min(out_features, longest[0], max(1, gradient // LARGEST_PART // cols))
    return rows // ROWS_STEP * ROWS_STEP or rows, cols


@torch.library.custom_op("adapt_pruner::linear_importance", mutates_args=(), device_types="cpu")
def linear_importance(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> Tensor:
    """The op behind `adapt_pruner.kernels.linear_importance`; x and dy are [tokens, features]."""
    check_linear(x, dy, weight, dim, group_size)
    # 16-bit products spend their time on operands: half of them are copied, so that rows lie close together
    copy = x.element_size() == 2 and (x.shape[0] + 1024) * 512 * LARGEST_PART <= weight.numel()
    rows, cols = tile_shape(weight.shape[0], weight.shape[1], (512, 1024) if copy else (2048, 2048))
    tile = torch.empty(rows * cols, dtype=x.dtype)
    index_scores = torch.zeros(weight.shape[dim], dtype=torch.float64)
    for row in range(0, weight.shape[0], rows):
        outputs = dy[:, row : row + rows]
        if copy:
            outputs = outputs.contiguous()
        for col in range(0, weight.shape[1], cols):
            part = weight[row : row + rows, col : col + cols]
            grad = tile[: part.numel()].view(part.shape)
            torch.mm(outputs.T, x[:, col : col + cols], out=grad)
            first = (row, col)[dim]
            # the product is symmetric, and it is the second factor that may be fp32 beside a 16-bit one
            index_scores[first : first + part.shape[dim]] += torch.ops.adapt_pruner.unit_importance(
                [grad], [part], [], [dim], [1], "first"
            )
    return index_scores.view(-1, group_size).sum(1).float()


@linear_importance.register_fake
def _(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> Tensor:
    return weight.new_empty(weight.shape[dim] // group_size, dtype=torch.float32)
