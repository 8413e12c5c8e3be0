"""The three ops of pruning, whichever backend runs them.

None of them is differentiable: they read weights and gradients, and their results never require a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adapt_pruner.kernels import reference
from adapt_pruner.kernels.backends import choose_backend, extension_loaded
from adapt_pruner.kernels.checks import (
    NATIVE_DTYPES,
    check_gather,
    check_importance,
    check_similarity,
    gathered_shapes,
)


@torch.no_grad()
def unit_importance(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    *,
    fishers: Sequence[Tensor] = (),
    mode: str = "first",
    backend: str = "auto",
) -> Tensor:
    """Importance of each unit: its saliency summed over every tensor that it touches.

    Unit u owns the indices [u * group_sizes[i], (u + 1) * group_sizes[i]) of dimension dims[i] of member i.
    Per element, with w a weight, g its gradient and h its Fisher diagonal:

    - `first`: abs(w * g)
    - `vectorize`: w * g, the absolute value is taken of each row's (column's) sum
    - `second`: abs(w * h * w)
    - `mixed`: abs(w * g - 0.5 * w * h * w)
    - `magnitude_l1`, `magnitude_l2`: abs(w), w * w

    Args:
        weights: members of one unit kind, each [out, in] with contiguous rows or [out] (a bias); fp32, fp16
            or bf16, all on one device. float64 is taken by the reference alone, which "auto" then picks.
        grads: loss per unit of weight, summed over the calibration batch; shapes of the weights, dtype of
            the weight or fp32. Empty for `second` and the magnitudes.
        dims: the unit dimension of each member, 0 (rows, biases) or 1 (columns).
        group_sizes: indices per unit along that dimension.
        fishers: mean squared gradient, like `grads`; only for `second` and `mixed`.
        mode: see above.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
    Returns:
        [units], fp32, non-negative, accumulated in fp32 or better. Larger means keep. The same bits for any
        number of threads.
    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or an unknown mode or backend.
        BackendUnavailable: the named backend is not built or not usable here.
    Source: arXiv 2502.03460 section 3.2; the estimators are LLM-Pruner's, arXiv 2305.11627 section 3.2.
    """
    check_importance(weights, grads, fishers, dims, group_sizes, mode)
    tensors = [*weights, *grads, *fishers]
    chosen = _choose_for_dtypes(backend, tensors)
    if chosen == "reference":
        return reference.unit_importance(weights, grads, fishers, dims, group_sizes, mode)
    arguments = (list(weights), list(grads), list(fishers), list(dims), list(group_sizes), mode)
    if chosen == "triton":
        with _device_of(weights[0]):
            return torch.ops.adapt_pruner.triton_unit_importance(*arguments)
    return torch.ops.adapt_pruner.unit_importance(*arguments)


@torch.no_grad()
def gather_units(
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    keep: Tensor,
    *,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Restrict every member of a unit kind (weights, biases, optimizer moments) to the kept units.

    Args:
        tensors: each [out, in] with contiguous rows or [out]; any dtype of 1, 2, 4 or 8 bytes; one device.
        dims: the unit dimension of each tensor, 0 (rows, biases) or 1 (columns).
        group_sizes: indices per unit along that dimension.
        keep: [kept], int64, sorted, each unit once; may be empty. Host data: a CUDA tensor is copied over,
            which waits for the device.
        out: where the results go, contiguous and of their shapes, dtypes and device, sharing no memory with
            the tensors or each other. Reused buffers save the page faults of new ones, which cost more than
            the gather itself.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
    Returns:
        One contiguous tensor per member, with kept * group_size indices along its dimension: new, or `out`.
    Raises:
        ValueError: shapes, strides or devices do not fit, a unit is out of range, repeated or out of order.
        BackendUnavailable: the named backend is not built or not usable here.
    """
    check_gather(tensors, dims, group_sizes, keep, out)
    chosen = choose_backend(backend, tensors[0].device)
    if chosen == "reference":
        return reference.gather_units(tensors, dims, group_sizes, keep, out)
    if chosen == "triton":
        device_keep = keep.to(tensors[0].device).contiguous()
        with _device_of(tensors[0]):
            gathered = torch.ops.adapt_pruner.triton_gather_units(
                list(tensors), list(dims), list(group_sizes), device_keep
            )
        if out is None:
            return gathered
        for target, value in zip(out, gathered, strict=True):
            target.copy_(value)
        return list(out)
    arguments = (list(tensors), list(dims), list(group_sizes), keep.cpu())
    if out is None:
        return torch.ops.adapt_pruner.gather_units(*arguments)
    torch.ops.adapt_pruner.gather_units.out(*arguments, out=list(out))
    return list(out)


@torch.no_grad()
def residual_similarity(
    h_in: Tensor, h_out: Tensor, metric: str = "cosine", *, backend: str = "auto"
) -> Tensor:
    """Mean over tokens of how alike the residual stream is before and after a decoder layer.

    Args:
        h_in: [..., hidden], fp32, fp16 or bf16; every leading index is a token. float64 is taken by the
            reference alone, which "auto" then picks.
        h_out: same shape, dtype and device.
        metric: `cosine` similarity (each norm clamped to 1e-8), `euclidean` or `manhattan` distance.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
    Returns:
        0-dim, fp32. The same bits for any number of threads.
    Raises:
        ValueError: shapes, dtypes or devices differ, no tokens, or an unknown metric or backend.
        BackendUnavailable: the named backend is not built or not usable here.
    Source: arXiv 2502.03460 section 3.1.
    """
    check_similarity(h_in, h_out, metric)
    chosen = _choose_for_dtypes(backend, [h_in, h_out])
    if chosen == "reference":
        return reference.residual_similarity(h_in, h_out, metric)
    arguments = (_token_rows(h_in), _token_rows(h_out), metric)
    if chosen == "triton":
        with _device_of(h_in):
            return torch.ops.adapt_pruner.triton_residual_similarity(*arguments)
    return torch.ops.adapt_pruner.residual_similarity(*arguments)


def _choose_for_dtypes(backend: str, tensors: Sequence[Tensor]) -> str:
    unsupported = [t.dtype for t in tensors if t.dtype not in NATIVE_DTYPES]
    if unsupported and backend == "auto":
        return "reference"
    chosen = choose_backend(backend, tensors[0].device)
    if unsupported and chosen != "reference":
        raise ValueError(f"backend {backend!r} takes float32, float16 or bfloat16, got {unsupported[0]}")
    return chosen


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are; compiled code takes care of itself."""
    if tensor.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _token_rows(hidden: Tensor) -> Tensor:
    """[tokens, hidden] with contiguous rows; copies only what no row stride can describe."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _fake_unit_importance(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    dims: list[int],
    group_sizes: list[int],
    mode: str,
) -> Tensor:
    return weights[0].new_empty(weights[0].shape[dims[0]] // group_sizes[0], dtype=torch.float32)


def _fake_gather_units(
    tensors: list[Tensor], dims: list[int], group_sizes: list[int], keep: Tensor
) -> list[Tensor]:
    shapes = gathered_shapes(tensors, dims, group_sizes, keep)
    return [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]


def _fake_gather_units_out(
    tensors: list[Tensor], dims: list[int], group_sizes: list[int], keep: Tensor, *, out: list[Tensor]
) -> None:
    return None


def _fake_residual_similarity(h_in: Tensor, h_out: Tensor, metric: str) -> Tensor:
    return h_in.new_empty((), dtype=torch.float32)


if extension_loaded():
    torch.library.register_fake("adapt_pruner::unit_importance", _fake_unit_importance)
    torch.library.register_fake("adapt_pruner::gather_units", _fake_gather_units)
    torch.library.register_fake("adapt_pruner::gather_units.out", _fake_gather_units_out)
    torch.library.register_fake("adapt_pruner::residual_similarity", _fake_residual_similarity)
