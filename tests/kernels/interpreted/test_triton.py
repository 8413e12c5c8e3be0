"""The Triton kernels under Triton's interpreter, on poisoned buffers; run by test_triton_interpreter.py.

The interpreter decides what @triton.jit makes of a kernel, so these tests need a process of their own, with
TRITON_INTERPRET=1 from the start.
"""

import pytest
import torch
from members import DTYPES, Members, assert_importance_within_budget, make_members
from torch import Tensor

from adapt_pruner.kernels import (
    METRICS,
    MODES,
    backend_status,
    gather_units,
    reference,
    residual_similarity,
    unit_importance,
)


def importance(members: Members, mode: str) -> Tensor:
    return unit_importance(**members.arguments(mode), backend="triton")


def test_backend_is_usable() -> None:
    assert backend_status()["triton"] is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_importance(mode: str, dtypes: str) -> None:
    members = make_members(7, 33, dtypes)
    assert_importance_within_budget(importance(members, mode), members, mode)


# one row and column; more rows than a block adds up; more columns than a tile; more units than a program
@pytest.mark.parametrize(("units", "width"), [(1, 1), (33, 7), (3, 1030), (9, 131)])
@pytest.mark.parametrize(
    ("mode", "dtypes"), [("first", "fp32"), ("vectorize", "bf16"), ("mixed", "fp16_fp32")]
)
def test_importance_sizes(mode: str, dtypes: str, units: int, width: int) -> None:
    members = make_members(units, width, dtypes)
    assert_importance_within_budget(importance(members, mode), members, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", [2, 70])
def test_groups_and_strided_rows(mode: str, group_size: int) -> None:
    members = make_members(3, 17, "bf16_fp32", group_size, row_padding=3)
    members.weights[2] = members.weights[2].contiguous()
    assert not members.weights[0].is_contiguous()
    assert_importance_within_budget(importance(members, mode), members, mode)


def test_gradient_and_fisher_of_different_dtypes() -> None:
    members = make_members(5, 20, "bf16")
    members.fishers = [fisher.float() for fisher in members.fishers]
    assert_importance_within_budget(importance(members, "mixed"), members, "mixed")


@pytest.mark.parametrize("dim", [0, 1])
def test_accuracy_of_long_sums(dim: int) -> None:
    shape = (4, 14336) if dim == 0 else (2500, 4)
    members = Members([torch.randn(shape)], [dim], [1], [torch.randn(shape)])
    for mode in ("first", "vectorize"):
        assert_importance_within_budget(importance(members, mode), members, mode)


def test_importance_has_the_same_bits_every_time() -> None:
    members = make_members(9, 1100, "fp32")
    first = importance(members, "vectorize")
    members.weights = [w.clone() for w in members.weights]
    assert torch.equal(first, importance(members, "vectorize"))


@pytest.mark.parametrize("shape", [(6, 0), (0, 6)])
def test_empty_sums(shape: tuple[int, int]) -> None:
    weight = torch.empty(shape)
    for dim in (0, 1):
        result = unit_importance([weight], [weight], [dim], [1], backend="triton")
        assert torch.equal(result, torch.zeros(shape[dim]))


@pytest.mark.parametrize("dim", [0, 1])
def test_nan_and_infinity_reach_their_unit_only(dim: int) -> None:
    weight = torch.ones(3, 3)
    weight[0, 0], weight[2, 2] = torch.nan, torch.inf
    result = unit_importance([weight], [torch.ones(3, 3)], [dim], [1], backend="triton")
    torch.testing.assert_close(result, torch.tensor([torch.nan, 3.0, torch.inf]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [1, 3, 65])
def test_gather(dtype: torch.dtype, group_size: int) -> None:
    length = 7 * group_size
    shapes = [(length, 5), (35, length), (length,), (length, 1030 if group_size == 1 else 40)]
    tensors = [torch.randint(-100, 100, shape).to(dtype) for shape in shapes]
    tensors.append(tensors[3][:, 1:38])
    dims, group_sizes = [0, 1, 0, 0, 0], [group_size] * 5
    for keep in (torch.arange(7), torch.arange(0), torch.tensor([0, 2, 3, 6]), torch.tensor([5])):
        results = gather_units(tensors, dims, group_sizes, keep, backend="triton")
        expected = reference.gather_units(tensors, dims, group_sizes, keep)
        for result, truth in zip(results, expected, strict=True):
            assert result.dtype == dtype
            assert result.is_contiguous()
            assert torch.equal(result, truth)


def test_gather_with_64_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapt_pruner.kernels import triton_gather

    monkeypatch.setattr(triton_gather, "LAST_NARROW", 0)
    tensor = torch.randn(21, 300)
    keep = torch.tensor([0, 2, 6])
    for dim, group_size, units in ((0, 3, 7), (1, 3, 100)):
        assert tensor.shape[dim] == group_size * units
        (result,) = gather_units([tensor], [dim], [group_size], keep, backend="triton")
        assert torch.equal(result, reference.gather_units([tensor], [dim], [group_size], keep)[0])


def test_gather_keeps_the_bits_of_float8() -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    keep = torch.tensor([1, 2, 15])
    (result,) = gather_units([bits.view(torch.float8_e4m3fn)], [1], [1], keep, backend="triton")
    assert torch.equal(result.view(torch.uint8), bits[:, keep])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7, 33), (2, 3, 1030), (300, 4)])
def test_similarity(metric: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    h_in = torch.randn(shape, generator=generator)
    h_out = (h_in + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
    h_in = h_in.to(dtype)
    result = residual_similarity(h_in, h_out, metric, backend="triton")
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    assert result.dtype == torch.float32
    assert result.shape == ()
    torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)
    assert torch.equal(result, residual_similarity(h_in, h_out, metric, backend="triton"))


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_of_strided_rows(metric: str) -> None:
    h_in, h_out = torch.randn(9, 40)[:, 1:38], torch.randn(9, 50)[:, :37]
    result = residual_similarity(h_in, h_out, metric, backend="triton")
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    torch.testing.assert_close(result.double(), oracle, rtol=1e-6, atol=1e-7)


def test_cosine_of_vanishing_vectors() -> None:
    h_in, h_out = torch.ones(4, 8), torch.ones(4, 8)
    h_in[1], h_in[2], h_out[3] = 0.0, 1e-10, -1e-9  # no norm, and norms below the clamp
    torch.testing.assert_close(
        residual_similarity(h_in, h_out, backend="triton"),
        reference.residual_similarity(h_in, h_out, "cosine"),
    )
    zero = torch.zeros(3, 8)
    assert residual_similarity(zero, zero, backend="triton").item() == 0.0


def test_nan_is_not_hidden() -> None:
    h_in = torch.ones(4, 8)
    h_in[2, 3] = torch.nan
    for metric in METRICS:
        assert residual_similarity(h_in, torch.ones(4, 8), metric, backend="triton").isnan()


def test_parameters_that_require_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    assert not unit_importance([weight], [weight], [0], [1], backend="triton").requires_grad
    assert not gather_units([weight], [0], [1], torch.tensor([1]), backend="triton")[0].requires_grad


@pytest.mark.parametrize("tests", ["test_schema", "test_autograd_registration"])
def test_opcheck(tests: str) -> None:
    members = make_members(4, 6, "bf16", group_size=2)
    w, dims, group_sizes = members.weights, members.dims, members.group_sizes
    ops = torch.ops.adapt_pruner
    assert backend_status()["triton"] is None  # registers them
    keep = torch.tensor([0, 2])
    for op, arguments in (
        (ops.triton_unit_importance, (w, members.grads, members.fishers, dims, group_sizes, "mixed")),
        (ops.triton_gather_units, (w, dims, group_sizes, keep)),
        (ops.triton_residual_similarity, (w[0], w[0], "cosine")),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_wrong_device() -> None:
    meta = torch.empty(2, 2, device="meta")
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on a cpu device, got meta"):
        unit_importance([meta], [meta], [0], [1], backend="triton")
