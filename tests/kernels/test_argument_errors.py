"""Every bad argument is a ValueError that names what was seen, and a RuntimeError with the same in C++."""

import re
from typing import Any

import pytest
import torch

from adapt_pruner.kernels import gather_units, residual_similarity, unit_importance
from adapt_pruner.kernels.backends import extension_loaded

W = torch.ones(4, 6)
CROSSED = torch.ones(6, 4).t()
SHARED = torch.ones(1, 6)

IMPORTANCE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown mode": ({"mode": "third"}, "mode 'third': expected one of first, vectorize"),
    "no weights": ({"weights": []}, "weights: expected at least one tensor, got none"),
    "too few dims": ({"dims": []}, "dims: expected one for each of 1 tensors, got 0"),
    "too many group sizes": (
        {"group_sizes": [1, 2]},
        "group_sizes: expected one for each of 1 tensors, got 2",
    ),
    "dim out of range": ({"dims": [2]}, "dims[0]: expected a dimension of a 2-D tensor, got 2"),
    "negative dim": ({"dims": [-1]}, "dims[0]: expected a dimension of a 2-D tensor, got -1"),
    "bias by columns": (
        {"weights": [torch.ones(4)], "grads": [torch.ones(4)], "dims": [1]},
        "dims[0]: expected a dimension of a 1-D tensor, got 1",
    ),
    "3-D": ({"weights": [torch.ones(2, 2, 2)]}, "weights[0]: expected a 1-D or 2-D tensor, got shape"),
    "group size does not divide": (
        {"group_sizes": [3]},
        "expected a divisor of the 4 indices of dimension 0, got 3",
    ),
    "group size 0": ({"group_sizes": [0]}, "group_sizes[0]: expected a divisor"),
    "units differ": (
        {"weights": [W, W], "grads": [W, W], "dims": [0, 1], "group_sizes": [1, 1]},
        "weights[1]: expected 4 units as in weights[0], got 6",
    ),
    "integer weights": ({"weights": [W.int()]}, "expected float32, float16 or bfloat16, got"),
    "columns not contiguous": ({"weights": [CROSSED]}, "weights[0]: expected contiguous rows"),
    "overlapping rows": ({"weights": [torch.ones(6).expand(4, 6)]}, "row stride >= 6), got strides"),
    "grad missing": ({"grads": []}, "grads: mode 'first' expects 1 tensors, got 0"),
    "grad not wanted": ({"mode": "magnitude_l1"}, "grads: mode 'magnitude_l1' expects 0 tensors, got 1"),
    "fisher missing": ({"mode": "mixed"}, "fishers: mode 'mixed' expects 1 tensors, got 0"),
    "fisher not wanted": ({"fishers": [W]}, "fishers: mode 'first' expects 0 tensors, got 1"),
    "grad of another shape": ({"grads": [torch.ones(6, 4)]}, "grads[0]: expected the weight's shape"),
    "grad of another dtype": ({"grads": [W.half()]}, "grads[0]: expected the weight's dtype"),
    "grad not contiguous": ({"grads": [CROSSED]}, "grads[0]: expected contiguous rows"),
}

GATHER_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no tensors": ({"tensors": []}, "tensors: expected at least one tensor, got none"),
    "keep is int32": (
        {"keep": torch.tensor([0], dtype=torch.int32)},
        "keep: expected a 1-D int64 tensor, got",
    ),
    "keep is 2-D": ({"keep": torch.tensor([[0]])}, "keep: expected a 1-D int64 tensor, got"),
    "negative unit": ({"keep": torch.tensor([-1, 2])}, "keep[0] = -1: expected 0 <= unit < 4"),
    "unit too large": ({"keep": torch.tensor([0, 4])}, "keep[1] = 4: expected 0 <= unit < 4"),
    "out of order": ({"keep": torch.tensor([0, 3, 2])}, "keep[2] = 2: expected more than keep[1] = 3"),
    "repeated": ({"keep": torch.tensor([1, 1])}, "keep[1] = 1: expected more than keep[0] = 1"),
    "complex128": ({"tensors": [W.to(torch.complex128)]}, "expected elements of 1, 2, 4 or 8 bytes, got 16"),
    "columns not contiguous": ({"tensors": [CROSSED]}, "tensors[0]: expected contiguous rows"),
}

OUT_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no outputs": ({"out": []}, "out: expected one for each of 1 tensors, got 0"),
    "out of another shape": ({"out": [torch.ones(2, 6)]}, "out[0]: expected shape [1, 6], got [2, 6]"),
    "out of another dtype": ({"out": [torch.ones(1, 6).int()]}, "out[0]: expected the dtype of tensors[0]"),
    "out not contiguous": (
        {"out": [torch.ones(4, 2)[:, :1]], "dims": [1]},
        "out[0]: expected a contiguous tensor, got strides",
    ),
    "out is its tensor": ({"out": [W[1:2]]}, "out[0]: shares memory with tensors[0]"),
    "out is used twice": (
        {"tensors": [W, W], "dims": [0, 0], "group_sizes": [1, 1], "out": [SHARED, SHARED]},
        "out[1]: shares memory with out[0]",
    ),
    "bad keep": ({"out": [SHARED], "keep": torch.tensor([7])}, "keep[0] = 7: expected 0 <= unit < 4"),
}

SIMILARITY_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown metric": ({"metric": "angle"}, "metric 'angle': expected one of cosine, euclidean, manhattan"),
    "shapes differ": ({"h_out": torch.ones(4, 5)}, "h_out: expected the shape of h_in"),
    "dtypes differ": ({"h_out": W.half()}, "h_out: expected the dtype of h_in"),
    "no tokens": ({"h_in": W[:0], "h_out": W[:0]}, "at least one token, got"),
    "scalar": ({"h_in": torch.tensor(1.0), "h_out": torch.tensor(1.0)}, "at least one token, got"),
    "integers": ({"h_in": W.int(), "h_out": W.int()}, "expected float32, float16 or bfloat16, got"),
}

IMPORTANCE_ARGUMENTS = {
    "weights": [W], "grads": [W], "fishers": [], "dims": [0], "group_sizes": [1], "mode": "first",
}  # fmt: skip
GATHER_ARGUMENTS = {"tensors": [W], "dims": [0], "group_sizes": [1], "keep": torch.tensor([0])}
SIMILARITY_ARGUMENTS = {"h_in": W, "h_out": W, "metric": "cosine"}

ALL_ERRORS = [
    pytest.param(op, {**defaults, **changes}, message, id=f"{op.__name__}: {name}")
    for op, defaults, errors in (
        (unit_importance, IMPORTANCE_ARGUMENTS, IMPORTANCE_ERRORS),
        (gather_units, GATHER_ARGUMENTS, GATHER_ERRORS),
        (gather_units, GATHER_ARGUMENTS, OUT_ERRORS),
        (residual_similarity, SIMILARITY_ARGUMENTS, SIMILARITY_ERRORS),
    )
    for name, (changes, message) in errors.items()
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("op", "arguments", "message"), ALL_ERRORS)
def test_wrapper_raises_value_error(op: Any, arguments: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        op(**arguments, backend=backend)


@pytest.mark.skipif(not extension_loaded(), reason="extension not built")
@pytest.mark.parametrize(("op", "arguments", "message"), ALL_ERRORS)
def test_native_op_checks_by_itself(op: Any, arguments: dict[str, Any], message: str) -> None:
    tensors = arguments.get("weights", arguments.get("tensors"))
    if tensors == []:
        pytest.skip("without a tensor the dispatcher finds no device to run on")
    packet = getattr(torch.ops.adapt_pruner, op.__name__)
    native_op = packet.out if "out" in arguments else packet.default
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native_op(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_only_python_can_get_wrong(backend: str) -> None:
    with pytest.raises(ValueError, match=r"grads\[0\]: expected a tensor, got NoneType"):
        unit_importance([W], [None], [0], [1], backend=backend)  # type: ignore[list-item]


def test_devices_must_agree() -> None:
    elsewhere = torch.ones(4, 6, device="meta")
    with pytest.raises(ValueError, match=r"weights\[1\]: expected device cpu, got meta"):
        unit_importance([W, elsewhere], [W, W], [0, 0], [1, 1])
    with pytest.raises(ValueError, match=r"grads\[0\]: expected device cpu, got meta"):
        unit_importance([W], [elsewhere], [0], [1])
    with pytest.raises(ValueError, match=r"out\[0\]: expected device cpu, got meta"):
        gather_units([W], [0], [1], torch.tensor([0]), out=[torch.ones(1, 6, device="meta")])
    with pytest.raises(ValueError, match="h_out: expected the device of h_in cpu, got meta"):
        residual_similarity(W, elsewhere)


def test_float64_is_refused_by_native_backends(native_cpu: str) -> None:
    double = W.double()
    with pytest.raises(
        ValueError, match=r"backend 'cpu' takes float32, float16 or bfloat16, got torch.float64"
    ):
        unit_importance([double], [double], [0], [1], backend=native_cpu)
    with pytest.raises(ValueError, match=r"got torch.float64"):
        residual_similarity(double, double, backend=native_cpu)
