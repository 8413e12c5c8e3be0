"""Argument checks shared by every backend: ValueError with what was seen and what was expected.

The native ops repeat them in C++ (csrc/checks.h) because they can be called without the wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("first", "vectorize", "second", "mixed", "magnitude_l1", "magnitude_l2")
MODES_WITH_GRADS = ("first", "vectorize", "mixed")
MODES_WITH_FISHERS = ("second", "mixed")
METRICS = ("cosine", "euclidean", "manhattan")
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_importance(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    mode: str,
    names: Sequence[str] = (),
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    check_members("weights", weights, dims, group_sizes)
    _check_companions("grads", grads, weights, needed=mode in MODES_WITH_GRADS, mode=mode)
    _check_companions("fishers", fishers, weights, needed=mode in MODES_WITH_FISHERS, mode=mode)
    if len(names) not in (0, len(weights)):
        raise ValueError(f"names: expected one for each of {len(weights)} weights or none, got {len(names)}")
    for i, weight in enumerate(weights):
        _check_floating(f"weights[{i}]", weight)


def check_linear(x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int) -> None:
    check_members("weight", [weight], [dim], [group_size])
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected [out, in], neither of them 0, got shape {tuple(weight.shape)}")
    for name, tensor, features in (("x", x, weight.shape[1]), ("dy", dy, weight.shape[0])):
        if tensor.dim() < 1 or tensor.shape[-1] != features:
            raise ValueError(f"{name}: expected [..., {features}], got shape {tuple(tensor.shape)}")
        _check_floating(name, tensor)
        if tensor.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device}, got {tensor.device}")
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"dy: expected the tokens of x {tuple(x.shape[:-1])}, got {tuple(dy.shape[:-1])}")
    if x.dtype != dy.dtype:
        raise ValueError(f"dy: expected the dtype of x {x.dtype}, got {dy.dtype}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight: expected the dtype of x {x.dtype} or torch.float32, got {weight.dtype}")


def check_stats(x: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> None:
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"x: expected [..., columns] with at least one row, got shape {tuple(x.shape)}")
    _check_floating("x", x)
    for name, tensor, dtype, shape in (
        ("mean", mean, torch.float64, x.shape[-1:]),
        ("m2", m2, torch.float64, x.shape[-1:]),
        ("count", count, torch.int64, torch.Size([])),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {dtype} of shape {tuple(shape)} on {x.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_gather(
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    group_sizes: Sequence[int],
    keep: Tensor,
    out: Sequence[Tensor] | None = None,
) -> None:
    units = check_members("tensors", tensors, dims, group_sizes)
    for i, tensor in enumerate(tensors):
        if tensor.element_size() not in (1, 2, 4, 8):
            raise ValueError(
                f"tensors[{i}]: expected elements of 1, 2, 4 or 8 bytes, got {tensor.element_size()} "
                f"({tensor.dtype})"
            )
    if keep.dim() != 1 or keep.dtype != torch.int64:
        raise ValueError(f"keep: expected a 1-D int64 tensor, got {keep.dim()}-D {keep.dtype}")
    if not torch.compiler.is_compiling():  # values are unknown while tracing; the native op checks them too
        _check_keep_values(keep.cpu(), units)
    if out is not None:
        _check_outputs(out, tensors, gathered_shapes(tensors, dims, group_sizes, keep))


def gathered_shapes(
    tensors: Sequence[Tensor], dims: Sequence[int], group_sizes: Sequence[int], keep: Tensor
) -> list[list[int]]:
    """The shapes of the tensors restricted to the kept units."""
    shapes = [list(tensor.shape) for tensor in tensors]
    for shape, dim, group_size in zip(shapes, dims, group_sizes, strict=True):
        shape[dim] = keep.shape[0] * group_size
    return shapes


def total_units(
    weights: Sequence[Tensor], dims: Sequence[int], group_sizes: Sequence[int], sets: Sequence[int]
) -> int:
    """Units of all sets, numbered as in the native op: `sets[i]` is that of member i, one without it."""
    return sum(weights[i].shape[dims[i]] // group_sizes[i] for i in first_members(len(weights), sets))


def first_members(members: int, sets: Sequence[int]) -> list[int]:
    """The first member of each set."""
    return [i for i in range(members) if i == 0 or (sets and sets[i] != sets[i - 1])]


def check_similarity(h_in: Tensor, h_out: Tensor, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
    if h_in.shape != h_out.shape:
        raise ValueError(f"h_out: expected the shape of h_in {tuple(h_in.shape)}, got {tuple(h_out.shape)}")
    if h_in.dim() < 1 or h_in.numel() == 0:
        raise ValueError(f"h_in: expected [..., hidden] with at least one token, got {tuple(h_in.shape)}")
    if h_in.dtype != h_out.dtype:
        raise ValueError(f"h_out: expected the dtype of h_in {h_in.dtype}, got {h_out.dtype}")
    if h_in.device != h_out.device:
        raise ValueError(f"h_out: expected the device of h_in {h_in.device}, got {h_out.device}")
    _check_floating("h_in", h_in)


def check_members(
    name: str, tensors: Sequence[Tensor], dims: Sequence[int], group_sizes: Sequence[int]
) -> int:
    """Check shapes, strides and devices of the members of one unit kind; returns the number of units."""
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    for other, values in (("dims", dims), ("group_sizes", group_sizes)):
        if len(values) != len(tensors):
            raise ValueError(f"{other}: expected one for each of {len(tensors)} tensors, got {len(values)}")
    units = -1
    for i, (tensor, dim, group_size) in enumerate(zip(tensors, dims, group_sizes, strict=True)):
        _check_layout(f"{name}[{i}]", tensor)
        if not 0 <= dim < tensor.dim():
            raise ValueError(f"dims[{i}]: expected a dimension of a {tensor.dim()}-D tensor, got {dim}")
        length = tensor.shape[dim]
        if group_size < 1 or length % group_size != 0:
            raise ValueError(
                f"group_sizes[{i}]: expected a divisor of the {length} indices of dimension {dim}, "
                f"got {group_size}"
            )
        if units >= 0 and length // group_size != units:
            raise ValueError(
                f"{name}[{i}]: expected {units} units as in {name}[0], got {length // group_size}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(f"{name}[{i}]: expected device {tensors[0].device}, got {tensor.device}")
        units = length // group_size
    return units


def _check_layout(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: expected a 1-D or 2-D tensor, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        return
    strides, columns = tensor.stride(), tensor.shape[-1]
    dense_rows = strides[-1] == 1 or columns == 1
    rows_apart = tensor.dim() == 1 or tensor.shape[0] == 1 or strides[0] >= columns
    if not (dense_rows and rows_apart):
        raise ValueError(
            f"{name}: expected contiguous rows (last stride 1, row stride >= {columns}), "
            f"got strides {strides}"
        )


def _check_companions(
    name: str, companions: Sequence[Tensor], weights: Sequence[Tensor], *, needed: bool, mode: str
) -> None:
    expected = len(weights) if needed else 0
    if len(companions) != expected:
        raise ValueError(f"{name}: mode {mode!r} expects {expected} tensors, got {len(companions)}")
    for i, (companion, weight) in enumerate(zip(companions, weights, strict=False)):
        _check_layout(f"{name}[{i}]", companion)
        if companion.shape != weight.shape:
            raise ValueError(
                f"{name}[{i}]: expected the weight's shape {tuple(weight.shape)}, "
                f"got {tuple(companion.shape)}"
            )
        if companion.dtype not in (weight.dtype, torch.float32):
            raise ValueError(
                f"{name}[{i}]: expected the weight's dtype {weight.dtype} or torch.float32, "
                f"got {companion.dtype}"
            )
        if companion.device != weight.device:
            raise ValueError(f"{name}[{i}]: expected device {weight.device}, got {companion.device}")


def _check_outputs(out: Sequence[Tensor], tensors: Sequence[Tensor], shapes: list[list[int]]) -> None:
    if len(out) != len(tensors):
        raise ValueError(f"out: expected one for each of {len(tensors)} tensors, got {len(out)}")
    for i, (output, tensor, shape) in enumerate(zip(out, tensors, shapes, strict=True)):
        if list(output.shape) != shape:
            raise ValueError(f"out[{i}]: expected shape {shape}, got {list(output.shape)}")
        if output.dtype != tensor.dtype:
            raise ValueError(
                f"out[{i}]: expected the dtype of tensors[{i}] ({tensor.dtype}), got {output.dtype}"
            )
        if output.device != tensor.device:
            raise ValueError(f"out[{i}]: expected device {tensor.device}, got {output.device}")
        if not output.is_contiguous():
            raise ValueError(f"out[{i}]: expected a contiguous tensor, got strides {output.stride()}")
        if torch.compiler.is_compiling():  # addresses are unknown; the native op checks them too
            continue
        for name, others in (("tensors", tensors), ("out", out[:i])):
            for j, other in enumerate(others):
                if _overlap(output, other):
                    raise ValueError(f"out[{i}]: shares memory with {name}[{j}]")


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or a.device.type == "meta":
        return False
    (first_a, end_a), (first_b, end_b) = _extent(a), _extent(b)
    return first_a < end_b and first_b < end_a


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last one."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (*NATIVE_DTYPES, torch.float64):
        raise ValueError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")


def _check_keep_values(keep: Tensor, units: int) -> None:
    out_of_range = ((keep < 0) | (keep >= units)).nonzero()
    if out_of_range.numel() > 0:
        i = int(out_of_range[0])
        raise ValueError(f"keep[{i}] = {int(keep[i])}: expected 0 <= unit < {units}")
    disordered = (keep[1:] <= keep[:-1]).nonzero()
    if disordered.numel() > 0:
        i = int(disordered[0]) + 1
        raise ValueError(
            f"keep[{i}] = {int(keep[i])}: expected more than keep[{i - 1}] = {int(keep[i - 1])} "
            "(sorted, each unit once)"
        )
