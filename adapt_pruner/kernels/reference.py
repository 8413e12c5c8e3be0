"""The truth: every op in plain PyTorch, obvious rather than fast, and frozen.

All other backends are tested against this file. It accumulates in fp32, or in float64 when an input is
float64, so the same code serves as the oracle of the tests. Inputs are assumed to be validated (ops.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COSINE_EPS = 1e-8  # the clamp of each norm in torch.nn.functional.cosine_similarity


def unit_importance(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    mode: str,
) -> Tensor:
    """One score per unit, summed over all members; see `adapt_pruner.kernels.unit_importance`."""
    total: Tensor | None = None
    for i, weight in enumerate(weights):
        dtype = _accumulation_dtype(weight, *grads[i : i + 1], *fishers[i : i + 1])
        w = weight.to(dtype)
        g = grads[i].to(dtype) if grads else None
        h = fishers[i].to(dtype) if fishers else None
        element = _element(w, g, h, mode)
        per_index = element if element.dim() == 1 else element.sum(dim=1 - dims[i])
        if mode == "vectorize":
            per_index = per_index.abs()
        per_unit = per_index.reshape(-1, group_sizes[i]).sum(dim=1)
        total = per_unit if total is None else total + per_unit
    assert total is not None, "at least one member is checked by the caller"
    return total


def linear_importance(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> Tensor:
    """Importance of a linear layer's units, its gradient written out; see `adapt_pruner.kernels`."""
    dtype = _accumulation_dtype(x, dy, weight)
    grad = dy.to(dtype).reshape(-1, dy.shape[-1]).T @ x.to(dtype).reshape(-1, x.shape[-1])
    return unit_importance([weight.to(dtype)], [grad], [], [dim], [group_size], "first")


def gather_units(
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    keep: Tensor,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Every tensor restricted to the kept units; see `adapt_pruner.kernels.gather_units`."""
    outputs = []
    for tensor, dim, group_size in zip(tensors, dims, group_sizes, strict=True):
        within = torch.arange(group_size, device=keep.device)
        index = (keep[:, None] * group_size + within).reshape(-1)
        outputs.append(tensor.index_select(dim, index.to(tensor.device)))
    if out is None:
        return outputs
    for buffer, output in zip(out, outputs, strict=True):
        buffer.copy_(output)
    return list(out)


def residual_similarity(h_in: Tensor, h_out: Tensor, metric: str) -> Tensor:
    """Mean over tokens of a similarity or distance; see `adapt_pruner.kernels.residual_similarity`."""
    dtype = _accumulation_dtype(h_in, h_out)
    a = h_in.to(dtype).reshape(-1, h_in.shape[-1])
    b = h_out.to(dtype).reshape(-1, h_out.shape[-1])
    if metric == "cosine":
        norm_a = a.square().sum(dim=1).sqrt().clamp_min(COSINE_EPS)
        norm_b = b.square().sum(dim=1).sqrt().clamp_min(COSINE_EPS)
        # a norm that overflows must not pass for orthogonality: zero times infinity is NaN
        per_token = (a * b).sum(dim=1) / (norm_a * norm_b) + 0.0 * (norm_a + norm_b)
    elif metric == "euclidean":
        per_token = (a - b).square().sum(dim=1).sqrt()
    else:
        assert metric == "manhattan", metric
        per_token = (a - b).abs().sum(dim=1)
    return per_token.mean()


def activation_stats(x: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> None:
    """Merges the columns of x into their statistics; see `adapt_pruner.kernels.activation_stats`."""
    values = x.to(_accumulation_dtype(x)).reshape(-1, x.shape[-1])
    batch_mean = values.mean(dim=0)
    batch_m2 = (values - batch_mean).square().sum(dim=0)
    merge_activation_stats(mean, m2, count, batch_mean, batch_m2, torch.full_like(count, values.shape[0]))


def merge_activation_stats(
    mean: Tensor, m2: Tensor, count: Tensor, other_mean: Tensor, other_m2: Tensor, other_count: Tensor
) -> None:
    """Mean, centred second moment and count of the union of two sets, in place of those of the first."""
    total = count + other_count
    delta = other_mean.double() - mean
    share = other_count.double() / total.clamp_min(1)
    mean.add_(delta * share)
    m2.add_(other_m2.double() + delta.square() * share * count)
    count.copy_(total)


def _element(w: Tensor, g: Tensor | None, h: Tensor | None, mode: str) -> Tensor:
    """The element-wise quantity of a mode; `vectorize` takes the absolute value after its sum instead."""
    if mode == "magnitude_l1":
        return w.abs()
    if mode == "magnitude_l2":
        return w * w
    if mode == "second":
        assert h is not None
        return (w * h * w).abs()
    assert g is not None
    if mode == "mixed":
        assert h is not None
        return (w * g - 0.5 * (w * h * w)).abs()
    return w * g if mode == "vectorize" else (w * g).abs()


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
