"""The Triton kernels under Triton's interpreter, on poisoned buffers; run by test_triton_interpreter.py.

The interpreter decides what @triton.jit makes of a kernel, so these tests need a process of their own, with
TRITON_INTERPRET=1 from the start.
"""

from typing import Any

import pytest
import torch
from members import DTYPES, Members, assert_importance_within_budget, make_members
from torch import Tensor

from adapt_pruner.kernels import (
    METRICS,
    MODES,
    ActivationStats,
    NonFiniteError,
    UnitSet,
    backend_status,
    gather_units,
    linear_importance,
    reference,
    residual_similarity,
    unit_importance,
    unit_importances,
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
    grad = torch.ones(3, 3)
    result = unit_importance([weight], [grad], [dim], [1], backend="triton", check_finite=False)
    torch.testing.assert_close(result, torch.tensor([torch.nan, 3.0, torch.inf]), equal_nan=True)


def unit_set(members: Members, mode: str) -> UnitSet:
    arguments = members.arguments(mode)
    del arguments["mode"]
    return UnitSet(**arguments)


@pytest.mark.parametrize("mode", ["first", "vectorize", "mixed"])
def test_several_sets_at_once(mode: str) -> None:
    """As layers of different widths, dtypes, alignments and numbers of members; one has no units left."""
    layers = [
        make_members(5, 33, "bf16", seed=1),
        make_members(16, 64, "bf16", group_size=8, seed=2),  # rows that are read 16 bytes at a time
        make_members(0, 8, "fp32"),
        make_members(3, 300, "fp16_fp32", group_size=2, row_padding=3, seed=3),
        make_members(40, 16, "fp32", seed=4),
    ]
    layers[3].weights[2] = layers[3].weights[2].contiguous()
    sets = [unit_set(members, mode) for members in layers]
    together = unit_importances(sets, mode=mode, backend="triton")
    for members, scores in zip(layers, together, strict=True):
        assert torch.equal(scores, importance(members, mode))
        if scores.numel() > 0:
            assert_importance_within_budget(scores, members, mode)


def test_launches_do_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapt_pruner.kernels import triton_importance

    launched: list[str] = []
    for name in ("row_scores", "column_partial_sums", "column_scores", "unit_scores"):
        kernel = getattr(triton_importance, name)

        class Counted:
            def __getitem__(self, grid: tuple[int, ...], name: str = name, kernel: Any = kernel) -> Any:
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(triton_importance, name, Counted())
    layers = [unit_set(make_members(8, 32, "bf16", seed=i), "first") for i in range(7)]
    unit_importances(layers, backend="triton")
    assert sorted(launched) == ["column_partial_sums", "column_scores", "row_scores", "unit_scores"]


def test_compiled_importance_is_one_graph_with_the_same_bits() -> None:
    members = make_members(6, 20, "bf16", group_size=2)

    def score(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        sets = [
            UnitSet(weights[:2], grads[:2], members.dims[:2], members.group_sizes[:2]),
            UnitSet(weights[2:], grads[2:], members.dims[2:], members.group_sizes[2:]),
        ]
        return [scores * 2 for scores in unit_importances(sets, backend="triton")]

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)(members.weights, members.grads)
    for got, expected in zip(compiled, score(members.weights, members.grads), strict=True):
        assert torch.equal(got, expected)


def test_non_finite_values_are_reported_by_set() -> None:
    layers = [make_members(4, 6, "fp32", seed=i) for i in range(2)]
    layers[1].grads[0][2, 3] = torch.inf
    sets = [UnitSet(**{**vars(unit_set(m, "first")), "names": ["gate", "down", "bias"]}) for m in layers]
    with pytest.raises(NonFiniteError, match=r"gradient of gate\[2, 3\] is inf"):
        unit_importances(sets, backend="triton")


LINEAR_DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def assert_linear_within_budget(
    x: Tensor, dy: Tensor, weight: Tensor, dim: int, group_size: int = 1
) -> Tensor:
    result = linear_importance(x, dy, weight, dim, group_size, backend="triton")
    oracle = reference.linear_importance(x.double(), dy.double(), weight.double(), dim, group_size)
    saliency = (weight * (dy.flatten(0, -2).T @ x.flatten(0, -2))).abs().float()  # plain, in the same dtype
    plain = saliency.sum(1 - dim).view(-1, group_size).sum(1)
    error, plain_error = ((r.double() - oracle).abs().max() / oracle.max() for r in (result, plain))
    assert result.dtype == torch.float32
    assert result.shape == oracle.shape
    assert error <= 2 * plain_error + 2**-22, (error, plain_error)
    return result


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("dtype", "weight_dtype"), LINEAR_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 70), (65, 300, 260)])  # tokens, out, in
def test_linear(dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, rows, cols = shape
    x, dy = torch.randn(tokens, cols).to(dtype), torch.randn(tokens, rows).to(dtype)
    weight = torch.randn(rows, cols).to(weight_dtype)
    result = assert_linear_within_budget(x, dy, weight, dim)
    assert torch.equal(result, linear_importance(x.clone(), dy, weight, dim, backend="triton"))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("group_size", [2, 70])
def test_linear_of_groups_and_strided_rows(dim: int, group_size: int) -> None:
    rows, cols = 140, 280
    x, dy = torch.randn(2, 9, cols + 5)[..., 1 : cols + 1], torch.randn(2, 9, rows + 3)[..., :rows]
    weight = torch.randn(rows, cols + 2)[:, 2:]
    assert_linear_within_budget(x, dy, weight, dim, group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_linear_with_large_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int) -> None:
    from adapt_pruner.kernels import triton_linear

    x, dy = torch.randn(40, 272).to(dtype), torch.randn(40, 304).to(dtype)
    weight = torch.randn(304, 272).to(dtype)
    assert triton_linear._tile(x, weight) == triton_linear.TILES[dtype.itemsize]
    monkeypatch.setattr(triton_linear, "FEWEST_LARGE_TILES", 4)
    assert triton_linear._tile(x, weight) == triton_linear.LARGE_TILES[(dtype.itemsize,) * 2]
    assert_linear_within_budget(x, dy, weight, dim)


def test_linear_of_no_tokens_and_of_zeros() -> None:
    for x, dy in ((torch.empty(0, 4), torch.empty(0, 6)), (torch.ones(3, 4), torch.zeros(3, 6))):
        result = linear_importance(x, dy, torch.randn(6, 4), 0, 2, backend="triton")
        assert torch.equal(result, torch.zeros(3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_linear_lets_nan_and_infinity_through_to_their_unit_only(bad: float) -> None:
    x, dy, weight = torch.ones(3, 5), torch.ones(3, 7), torch.ones(7, 5)
    dy[1, 4] = bad  # of output 4
    rows = linear_importance(x, dy, weight, 0, backend="triton", check_finite=False)
    assert rows.isfinite().tolist() == [True] * 4 + [False] + [True] * 2
    assert torch.equal(rows[4].isnan(), torch.tensor(bad).isnan())
    assert not linear_importance(x, dy, weight, 1, backend="triton", check_finite=False).isfinite().any()
    x[0, 2], dy[1, 4] = bad, 1.0
    cols = linear_importance(x, dy, weight, 1, backend="triton", check_finite=False)
    assert cols.isfinite().tolist() == [True] * 2 + [False] + [True] * 2
    with pytest.raises(NonFiniteError, match=r"input of weight\[0, 2\]"):
        linear_importance(x, dy, weight, 1, backend="triton")


def assert_stats_within_budget(batches: list[Tensor]) -> None:
    """At most twice the error of the reference in fp32, relative to the spread of the column."""
    columns = batches[0].shape[-1]
    stats, again, plain = (ActivationStats.zeros(columns) for _ in range(3))
    for x in batches:
        stats.update(x, backend="triton")
        again.update(x.clone(), backend="triton")
        plain.update(x, backend="reference")
    truth = torch.cat([x.double().reshape(-1, columns) for x in batches])
    m2 = (truth - truth.mean(0)).square().sum(0)
    spread = (m2 / truth.shape[0]).sqrt() + 1e-9

    def errors(result: ActivationStats) -> tuple[float, float]:
        return (
            ((result.mean - truth.mean(0)).abs() / spread).max().item(),
            ((result.m2 - m2).abs() / m2.clamp_min(1e-9)).max().item(),
        )

    assert stats.count.item() == truth.shape[0]
    for error, plain_error in zip(errors(stats), errors(plain), strict=True):
        assert error <= 2 * plain_error + 2**-23, (error, plain_error)
    assert torch.equal(stats.mean, again.mean)
    assert torch.equal(stats.m2, again.m2)


@pytest.mark.parametrize("case", ["plain", "large mean", "outlier first", "outlier within"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activation_stats(case: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 19, generator=generator) for rows in (130, 1, 300, 64)]
    if case == "large mean":
        batches = [1000.0 + 0.01 * x for x in batches]
    for x in batches if "outlier" in case else []:
        x[0 if case == "outlier first" else x.shape[0] // 2] = 1e4
    assert_stats_within_budget([x.to(dtype) for x in batches])


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 300), (2, 70, 17), (128, 16), (8300, 5)])
def test_activation_stats_of_shapes(shape: tuple[int, ...]) -> None:
    padded = torch.randn(*shape[:-1], shape[-1] + 3)
    assert_stats_within_budget([padded[..., 1 : shape[-1] + 1]])


def test_activation_stats_of_equal_rows_are_exact() -> None:
    x = torch.full((200, 4), 0.1)
    stats = ActivationStats.zeros(4)
    for _ in range(3):
        stats.update(x, backend="triton")
    assert torch.equal(stats.m2, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(stats.mean, x[0].double())


def test_activation_stats_keep_nan_and_infinity_in_their_column() -> None:
    x = torch.randn(140, 6)
    x[3, 1], x[0, 2], x[139, 4] = torch.nan, torch.inf, -torch.inf
    stats = ActivationStats.zeros(6)
    stats.update(x, backend="triton")
    finite = [True, False, False, True, False, True]
    assert stats.mean.isfinite().tolist() == finite
    assert stats.m2.isfinite().tolist() == finite


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
        buffers = [torch.empty_like(truth) for truth in expected]
        returned = gather_units(tensors, dims, group_sizes, keep, out=buffers, backend="triton")
        for buffer, same, truth in zip(buffers, returned, expected, strict=True):
            assert same is buffer
            assert torch.equal(buffer, truth)


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


@pytest.mark.parametrize("tests", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_opcheck(tests: str) -> None:
    members = make_members(4, 6, "bf16", group_size=2)
    w, dims, group_sizes = members.weights, members.dims, members.group_sizes
    stats = ActivationStats.zeros(6)
    ops = torch.ops.adapt_pruner
    assert backend_status()["triton"] is None  # registers them
    keep = torch.tensor([0, 2])
    out = [torch.zeros(t.shape) for t in gather_units(w, dims, group_sizes, keep, backend="triton")]
    for op, arguments in (
        (ops.triton_unit_importance, (w, members.grads, members.fishers, dims, group_sizes, "mixed")),
        (ops.triton_unit_importance, (w, members.grads, [], dims, group_sizes, "first", [0, 0, 1])),
        (ops.triton_linear_importance, (torch.randn(3, 6), torch.randn(3, 8), torch.randn(8, 6), 0, 2)),
        (ops.triton_activation_stats, (torch.randn(3, 6), stats.mean, stats.m2, stats.count)),
        (ops.triton_gather_units, (w, dims, group_sizes, keep)),
        (ops.triton_gather_units_out, ([t.float() for t in w], dims, group_sizes, keep, out)),
        (ops.triton_residual_similarity, (w[0], w[0], "cosine")),
    ):
        # without a GPU, the launches of a triton_op can be executed but not traced
        if tests != "test_faketensor" or op is ops.triton_unit_importance:
            torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_wrong_device() -> None:
    meta = torch.empty(2, 2, device="meta")
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on a cpu device, got meta"):
        unit_importance([meta], [meta], [0], [1], backend="triton")
