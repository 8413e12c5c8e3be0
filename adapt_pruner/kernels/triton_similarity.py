"""Similarity of residual streams in Triton: importing this module imports triton and registers the op.

One value per token, then one program for their mean. fp32 accumulators chosen by the shape alone, added up in
float64 as in triton_importance.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adapt_pruner.kernels.reference import COSINE_EPS
from adapt_pruner.kernels.triton_launch import launch

TOKEN_TILE = {"TOKENS": 4, "COLS": 1024}
MEAN_TILE = {"TOKENS": 2048}
WARPS = 8


@triton.jit
def token_values(
    h_in,
    h_out,
    values,
    tokens,
    hidden,
    in_stride,
    out_stride,
    METRIC: tl.constexpr,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    end = tl.cast(hidden, tl.int64)
    sums = tl.zeros([TOKENS, COLS], tl.float32)
    if METRIC == "cosine":
        squares_in = tl.zeros([TOKENS, COLS], tl.float32)
        squares_out = tl.zeros([TOKENS, COLS], tl.float32)
    for start in range(0, end, COLS):
        col = start + tl.arange(0, COLS)
        mask = (token < tokens)[:, None] & (col < end)[None, :]
        a = tl.load(h_in + token[:, None] * in_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(h_out + token[:, None] * out_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if METRIC == "cosine":
            sums += a * b
            squares_in += a * a
            squares_out += b * b
        elif METRIC == "euclidean":
            sums += (a - b) * (a - b)
        else:
            sums += tl.abs(a - b)
    value = tl.sum(sums.to(tl.float64), axis=1)
    if METRIC == "cosine":
        norm_in = tl.sqrt(tl.sum(squares_in.to(tl.float64), axis=1))
        norm_out = tl.sqrt(tl.sum(squares_out.to(tl.float64), axis=1))
        # tl.maximum would drop NaN
        norm_in = tl.where(norm_in < EPS, EPS, norm_in)
        norm_out = tl.where(norm_out < EPS, EPS, norm_out)
        # a norm that overflows must not pass for orthogonality: zero times infinity is NaN
        value = value / norm_in / norm_out + 0.0 * (norm_in + norm_out)
    elif METRIC == "euclidean":
        value = tl.sqrt(value)
    tl.store(values + token, value.to(tl.float32), mask=token < tokens)


@triton.jit
def mean_of_tokens(values, mean, tokens, TOKENS: tl.constexpr):
    end = tl.cast(tokens, tl.int64)
    sums = tl.zeros([TOKENS], tl.float64)
    for start in range(0, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        sums += tl.load(values + token, mask=token < end, other=0.0)
    tl.store(mean, (tl.sum(sums, axis=0) / end.to(tl.float64)).to(tl.float32))


@triton_op("adapt_pruner::triton_residual_similarity", mutates_args=())
def residual_similarity(h_in: Tensor, h_out: Tensor, metric: str) -> Tensor:
    """The op behind `adapt_pruner.kernels.residual_similarity`, for [tokens, hidden] with contiguous rows."""
    tokens, hidden = h_in.shape
    values = h_in.new_empty(tokens, dtype=torch.float32)
    mean = h_in.new_empty((), dtype=torch.float32)
    launch(
        token_values,
        triton.cdiv(tokens, TOKEN_TILE["TOKENS"]),
        h_in,
        h_out,
        values,
        tokens,
        hidden,
        h_in.stride(0),
        h_out.stride(0),
        METRIC=metric,
        EPS=COSINE_EPS,
        **TOKEN_TILE,
        num_warps=WARPS,
    )
    launch(mean_of_tokens, 1, values, mean, tokens, **MEAN_TILE, num_warps=WARPS)
    return mean
