"""The ops of pruning, whichever backend runs them.

None of them is differentiable: they read weights and gradients, and their results never require a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_pruner.kernels import reference
from adapt_pruner.kernels.backends import choose_backend, extension_loaded, triton_for_cuda
from adapt_pruner.kernels.checks import (
    NATIVE_DTYPES,
    check_gather,
    check_importance,
    check_linear,
    check_similarity,
    check_stats,
    gathered_shapes,
    total_units,
)
from adapt_pruner.kernels.finite import check_linear_scores, check_scores


@dataclass(frozen=True)
class UnitSet:
    """The tensors that the same units touch, such as those of one unit kind of one layer.

    Unit u owns the indices [u * group_sizes[i], (u + 1) * group_sizes[i]) of dimension dims[i] of member i.

    Args:
        weights: each [out, in] with contiguous rows or [out] (a bias); fp32, fp16 or bf16, all on one device.
            float64 is taken by the reference alone, which backend "auto" then picks.
        grads: loss per unit of weight, summed over the calibration batch; shapes of the weights, dtype of
            the weight or fp32. Empty for `second` and the magnitudes.
        dims: the unit dimension of each member, 0 (rows, biases) or 1 (columns).
        group_sizes: indices per unit along that dimension.
        fishers: mean squared gradient, like `grads`; only for `second` and `mixed`.
        names: what error messages call the weights; "weights[0]", "weights[1]", ... without them.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    dims: Sequence[int]
    group_sizes: Sequence[int]
    fishers: Sequence[Tensor] = ()
    names: Sequence[str] = ()

    @property
    def units(self) -> int:
        return self.weights[0].shape[self.dims[0]] // self.group_sizes[0]


def unit_importance(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    *,
    fishers: Sequence[Tensor] = (),
    names: Sequence[str] = (),
    mode: str = "first",
    check_finite: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Importance of each unit: its saliency summed over every tensor that it touches.

    `unit_importances` for a single `UnitSet`, whose attributes the arguments are.

    Returns:
        [units], fp32, non-negative, accumulated in fp32 or better. Larger means keep. The same bits for any
        number of threads.
    Raises:
        ValueError, NonFiniteError, BackendUnavailable: as `unit_importances`.
    Source: arXiv 2502.03460 section 3.2; the estimators are LLM-Pruner's, arXiv 2305.11627 section 3.2.
    """
    members = UnitSet(weights, grads, dims, group_sizes, fishers, names)
    return unit_importances([members], mode=mode, check_finite=check_finite, backend=backend)[0]


@torch.no_grad()
def unit_importances(
    sets: Sequence[UnitSet], *, mode: str = "first", check_finite: bool = True, backend: str = "auto"
) -> list[Tensor]:
    """Importance of the units of several sets, such as all layers of a model, at once.

    Per element, with w a weight, g its gradient and h its Fisher diagonal:

    - `first`: abs(w * g)
    - `vectorize`: w * g, the absolute value is taken of each row's (column's) sum
    - `second`: abs(w * h * w)
    - `mixed`: abs(w * g - 0.5 * w * h * w)
    - `magnitude_l1`, `magnitude_l2`: abs(w), w * w

    A matrix that two neighbouring members read, one by rows and one by columns, is read once on the CPU.

    Args:
        sets: at least one; all tensors on one device.
        mode: see above.
        check_finite: look for NaN and infinity among the scores, which waits for the device. Off, and inside
            torch.compile, they are returned: the caller has to look before it ranks (`check_scores`).
        backend: "auto", "reference", "cpu", "cuda" or "triton".
    Returns:
        For each set [units], fp32, non-negative, accumulated in fp32 or better. Larger means keep. The same
        bits for any number of threads.
    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or an unknown mode or backend.
        NonFiniteError: a tensor holds NaN or infinity, or a score overflows fp32.
        BackendUnavailable: the named backend is not built or not usable here.
    Source: arXiv 2502.03460 section 3.2; the estimators are LLM-Pruner's, arXiv 2305.11627 section 3.2.
    """
    if not sets:
        raise ValueError("sets: expected at least one set of units, got none")
    for s in sets:
        check_importance(s.weights, s.grads, s.fishers, s.dims, s.group_sizes, mode, s.names)
        if s.weights[0].device != sets[0].weights[0].device:
            first, device = sets[0].weights[0].device, s.weights[0].device
            raise ValueError(f"sets: expected device {first} as in the first set, got {device}")
    chosen = _choose_for_dtypes(backend, [t for s in sets for t in (*s.weights, *s.grads, *s.fishers)])
    if chosen == "reference":
        scores = [
            reference.unit_importance(s.weights, s.grads, s.fishers, s.dims, s.group_sizes, mode)
            for s in sets
        ]
    else:
        op = "triton_unit_importance" if chosen == "triton" else "unit_importance"
        with _device_of(sets[0].weights[0]) if chosen == "triton" else nullcontext():
            together = getattr(torch.ops.adapt_pruner, op)(
                [w for s in sets for w in s.weights],
                [g for s in sets for g in s.grads],
                [h for s in sets for h in s.fishers],
                [dim for s in sets for dim in s.dims],
                [size for s in sets for size in s.group_sizes],
                mode,
                [i for i, s in enumerate(sets) for _ in s.weights],
            )
        scores = list(together.split([s.units for s in sets]))
    if check_finite and not torch.compiler.is_compiling() and not bool(torch.cat(scores).isfinite().all()):
        # the device is waited for once, however many sets there are; only now is it worth asking which one
        for s, values in zip(sets, scores, strict=True):
            check_scores(values, s.weights, s.grads, s.fishers, s.names)
    return scores


@torch.no_grad()
def linear_importance(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    dim: int,
    group_size: int = 1,
    *,
    name: str = "weight",
    check_finite: bool = True,
    backend: str = "auto",
) -> Tensor:
    """`unit_importance` of a linear layer straight from its input and output gradient.

    The gradient dy^T x exists as tiles only, each multiplied with its part of the weight and summed before
    the next one is made; on the CPU a gradient of a few MB is one tile. There a tile has the dtype of x, as
    the gradient of plain PyTorch has; in Triton its elements are fp32.

    Args:
        x: [..., in], input of the layer: fp32, fp16 or bf16; every leading index is a token. All tokens of
            the calibration batch at once, because importance is the absolute value of the summed gradient.
        dy: [..., out], loss per unit of the layer's output; tokens, dtype and device of x.
        weight: [out, in] with contiguous rows, dtype of x or fp32.
        dim: the unit dimension of the weight, 0 (rows) or 1 (columns).
        group_size: indices per unit along that dimension.
        name: what error messages call the weight.
        check_finite: as in `unit_importances`.
        backend: "auto", "reference", "cpu", "cuda" or "triton". The kernel of "cuda" is the one of Triton.
    Returns:
        [units], fp32, non-negative. On the CPU the matrix products are the BLAS library's: the same bits
        from run to run at one number of threads.
    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or an unknown backend.
        NonFiniteError: a tensor holds NaN or infinity, or a score overflows fp32.
        BackendUnavailable: the named backend is not built or not usable here.
    Source: arXiv 2502.03460 section 3.2.
    """
    check_linear(x, dy, weight, dim, group_size)
    chosen = _choose_for_dtypes(backend, [x, dy, weight])
    if chosen == "cuda":
        chosen = triton_for_cuda("linear_importance", backend, x.device)
    if chosen == "reference":
        scores = reference.linear_importance(x, dy, weight, dim, group_size)
    else:
        op = "linear_importance" if chosen == "cpu" else "triton_linear_importance"
        with nullcontext() if chosen == "cpu" else _device_of(x):
            scores = getattr(torch.ops.adapt_pruner, op)(
                _token_rows(x), _token_rows(dy), weight, dim, group_size
            )
    if check_finite and not torch.compiler.is_compiling():
        check_linear_scores(scores, x, dy, weight, name)
    return scores


@torch.no_grad()
def activation_stats(x: Tensor, mean: Tensor, m2: Tensor, count: Tensor, *, backend: str = "auto") -> None:
    """Merge activations into the running mean and centred second moment of each column, in place.

    Both merges, of blocks of rows and into the running values, are the exact one of Chan et al. (1979) in
    float64; within a block sums are fp32 about a value of the column. `ActivationStats` wraps it.

    Args:
        x: [..., columns], fp32, fp16 or bf16; every leading index is a row. float64 is taken by the reference
            alone, which "auto" then picks.
        mean: [columns], float64, mean of the rows so far.
        m2: [columns], float64, sum over the rows so far of the squared distance from their mean.
        count: 0-dim, int64, rows so far; all three on the device of x, zeros to start with.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
    Raises:
        ValueError: shapes, dtypes or devices do not fit, no rows, or an unknown backend.
        BackendUnavailable: the named backend is not built or not usable here.
    Source: the statistics of Wanda (arXiv 2306.11695) and FLAP (arXiv 2312.11983).
    """
    check_stats(x, mean, m2, count)
    chosen = _choose_for_dtypes(backend, [x])
    if chosen == "reference":
        reference.activation_stats(x, mean, m2, count)
    elif chosen == "triton":
        with _device_of(x):
            torch.ops.adapt_pruner.triton_activation_stats(_token_rows(x), mean, m2, count)
    else:
        torch.ops.adapt_pruner.activation_stats(_token_rows(x), mean, m2, count)


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
        on_device = keep.to(tensors[0].device).contiguous()
        with _device_of(tensors[0]):
            if out is None:
                return torch.ops.adapt_pruner.triton_gather_units(
                    list(tensors), list(dims), list(group_sizes), on_device
                )
            torch.ops.adapt_pruner.triton_gather_units_out(
                list(tensors), list(dims), list(group_sizes), on_device, list(out)
            )
        return list(out)
    arguments = (list(tensors), list(dims), list(group_sizes), keep.cpu().contiguous())
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
    sets: Sequence[int] = (),
) -> Tensor:
    return weights[0].new_empty(total_units(weights, dims, group_sizes, sets), dtype=torch.float32)


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


def _fake_activation_stats(x: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> None:
    return None


if extension_loaded():
    import adapt_pruner.kernels.cpu_linear  # noqa: F401  (registers its op)

    torch.library.register_fake("adapt_pruner::unit_importance", _fake_unit_importance)
    torch.library.register_fake("adapt_pruner::gather_units", _fake_gather_units)
    torch.library.register_fake("adapt_pruner::gather_units.out", _fake_gather_units_out)
    torch.library.register_fake("adapt_pruner::residual_similarity", _fake_residual_similarity)
    torch.library.register_fake("adapt_pruner::activation_stats", _fake_activation_stats)
