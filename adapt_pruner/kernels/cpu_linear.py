"""Importance of a linear layer on the CPU: the BLAS library's matrix product, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_FRACTION = 32  # a tile is at most this part of the gradient, unless that is tiny
SMALLEST_TILE = 1 << 16  # elements
LONGEST_SIDE = 2048


def tile_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """As square as a tile can be: packing its operands costs the least."""
    elements = max(out_features * in_features // TILE_FRACTION, SMALLEST_TILE)
    cols = min(in_features, LONGEST_SIDE)
    return min(out_features, max(1, elements // cols)), cols


@torch.library.custom_op("adapt_pruner::linear_importance", mutates_args=(), device_types="cpu")
def linear_importance(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> Tensor:
    """The op behind `adapt_pruner.kernels.linear_importance`; x and dy are [tokens, features]."""
    rows, cols = tile_shape(*weight.shape)
    tile = torch.empty(rows * cols, dtype=x.dtype)
    scores = torch.zeros(weight.shape[dim] // group_size, dtype=torch.float64)
    index_scores = torch.zeros(weight.shape[dim], dtype=torch.float64)
    for row in range(0, weight.shape[0], rows):
        for col in range(0, weight.shape[1], cols):
            part = weight[row : row + rows, col : col + cols]
            grad = tile[: part.numel()].view(part.shape)
            torch.mm(dy[:, row : row + rows].T, x[:, col : col + cols], out=grad)
            first = (row, col)[dim]
            # the product is symmetric, and it is the second factor that may be fp32 beside a 16-bit one
            index_scores[first : first + part.shape[dim]] += torch.ops.adapt_pruner.unit_importance(
                [grad], [part], [], [dim], [1], "first"
            )
    torch.sum(index_scores.view(-1, group_size), dim=1, out=scores)
    return scores.float()


@linear_importance.register_fake
def _(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> Tensor:
    return weight.new_empty(weight.shape[dim] // group_size, dtype=torch.float32)
