"""The CUDA and Triton backends on a real GPU."""

from collections.abc import Callable
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
    backends,
    gather_units,
    linear_importance,
    reference,
    residual_similarity,
    unit_importance,
    unit_importances,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend of this GPU; one that cannot be used here is skipped with its reason."""
    problem = backend_status()[request.param]
    if problem is not None:
        pytest.skip(problem)
    return request.param


def on_gpu(members: Members) -> Members:
    def moved(tensors: list[Tensor]) -> list[Tensor]:
        return [t.cuda() for t in tensors]

    return Members(
        moved(members.weights),
        members.dims,
        members.group_sizes,
        moved(members.grads),
        moved(members.fishers),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("units", "width"), [(1, 1), (7, 33), (257, 40), (130, 2080), (1000, 4096)])
def test_importance(backend: str, mode: str, dtypes: str, units: int, width: int) -> None:
    members = make_members(units, width, dtypes, group_size=2)
    arguments = on_gpu(members).arguments(mode)
    result = unit_importance(**arguments, backend=backend)
    assert result.is_cuda
    assert_importance_within_budget(result.cpu(), members, mode)
    assert torch.equal(result, unit_importance(**arguments, backend=backend))


@pytest.mark.parametrize("mode", MODES)
def test_importance_of_many_sets(backend: str, mode: str) -> None:
    shapes = [(5, 40, 1), (3, 16, 8), (257, 9, 1), (1, 4100, 3), (8, 2048, 512)]
    members = [
        make_members(units, width, list(DTYPES)[i % len(DTYPES)], group_size, seed=i)
        for i, (units, width, group_size) in enumerate(shapes * 8)
    ]
    sets = []
    for m in members:
        arguments = on_gpu(m).arguments(mode)
        del arguments["mode"]
        sets.append(UnitSet(**arguments))
    results = unit_importances(sets, mode=mode, backend=backend)
    again = unit_importances(sets, mode=mode, backend=backend)
    for m, s, result, other in zip(members, sets, results, again, strict=True):
        assert_importance_within_budget(result.cpu(), m, mode)
        assert torch.equal(result, other)
        # the bits of a set do not depend on its company
        assert torch.equal(result, unit_importances([s], mode=mode, backend=backend)[0])


def test_what_is_not_finite_is_reported(backend: str) -> None:
    members = on_gpu(make_members(64, 2048, "bf16"))
    members.grads[1][77, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"gradient of weights\[1\]\[77, 3\] is nan"):
        unit_importance(**members.arguments("first"), backend=backend)
    scores = unit_importance(**members.arguments("first"), check_finite=False, backend=backend)
    assert scores.isfinite().logical_not().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize(("dim", "group_size"), [(0, 1), (1, 1), (0, 64), (1, 64)])
@pytest.mark.parametrize(("tokens", "out", "into"), [(1, 64, 64), (77, 192, 320), (2048, 1024, 448)])
def test_linear_importance(
    backend: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    dim: int,
    group_size: int,
    tokens: int,
    out: int,
    into: int,
) -> None:
    x = torch.randn(tokens, into, device="cuda").to(dtype)
    dy = torch.randn(tokens, out, device="cuda").to(dtype)
    weight = torch.randn(out, into, device="cuda").to(weight_dtype or dtype)
    result = linear_importance(x, dy, weight, dim, group_size, backend=backend)
    oracle = reference.linear_importance(x.double(), dy.double(), weight.double(), dim, group_size)
    gradient = (dy.T @ x).to(dtype)  # written out in the dtype of the layer, as training would
    plain = reference.unit_importance([weight], [gradient], [], [dim], [group_size], "first")
    error = ((result.double() - oracle).abs() / oracle).max().item()
    plain_error = ((plain.double() - oracle).abs() / oracle).max().item()
    assert result.dtype == torch.float32
    assert error <= 2 * plain_error + 2**-22, (error, plain_error)
    assert torch.equal(result, linear_importance(x, dy, weight, dim, group_size, backend=backend))


def stats_of(batches: list[Tensor], backend: str) -> ActivationStats:
    stats = ActivationStats.zeros(batches[0].shape[-1], device="cuda")
    for x in batches:
        stats.update(x, backend=backend)
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (3, 400, 300), (8192, 4096)])
def test_activation_stats(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batches = [(3 + torch.randn(shape, device="cuda")).to(dtype) for _ in range(3)]
    stats = stats_of(batches, backend)
    x = torch.cat(batches).double().reshape(-1, shape[-1])
    mean = x.mean(dim=0)
    m2 = (x - mean).square().sum(dim=0)
    assert stats.count.item() == x.shape[0]
    assert ((stats.mean - mean).abs() <= 1e-6 * (m2 / x.shape[0]).sqrt()).all()
    torch.testing.assert_close(stats.m2, m2, rtol=5e-6, atol=0)
    again = stats_of(batches, backend)
    assert torch.equal(stats.mean, again.mean)
    assert torch.equal(stats.m2, again.m2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_gather(backend: str, dtype: torch.dtype, group_size: int) -> None:
    length = 33 * group_size
    shapes = [(length, 5), (3, length), (length,), (length, 400), (1030, length)]
    tensors = [torch.randint(0, 100, shape).to(dtype).cuda() for shape in shapes]
    tensors.append(tensors[3][:, 1:390])
    dims, group_sizes = [0, 1, 0, 0, 1, 0], [group_size] * 6
    for keep in (
        torch.arange(33),
        torch.arange(0),
        torch.tensor([0, 2, 3, 32]),
        torch.tensor([1, 30]).cuda(),  # copied to the host
    ):
        results = gather_units(tensors, dims, group_sizes, keep, backend=backend)
        expected = reference.gather_units(tensors, dims, group_sizes, keep.cpu())
        assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))
        buffers = [torch.zeros_like(result) for result in results]
        returned = gather_units(tensors, dims, group_sizes, keep, out=buffers, backend=backend)
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(returned, buffers, strict=True))
        assert all(torch.equal(buffer, truth) for buffer, truth in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 2051), (5000, 1024), (2, 65536)])
def test_similarity(backend: str, metric: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    h_in = torch.randn(shape)
    h_in, h_out = h_in.to(dtype).cuda(), (h_in + 0.3 * torch.randn(shape)).to(dtype).cuda()
    result = residual_similarity(h_in, h_out, metric, backend=backend)
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)


def test_auto_chooses_cuda() -> None:
    assert backends.choose_backend("auto", torch.device("cuda", 0)) == "cuda"


def on_a_stream_of_its_own(compute: Callable[[Tensor], Tensor]) -> Tensor:
    """The result of `compute` on a matrix of twos, which are not there yet when it is called."""
    stream = torch.cuda.Stream()
    matrix = torch.zeros(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work queued on the default stream would overtake the fill
        matrix.fill_(2.0)
        result = compute(matrix)
        # memory that the op has given back: its next owner must not get in the way of what is queued
        torch.full((1 << 24,), torch.nan, device="cuda")
    stream.synchronize()
    return result


def test_importance_runs_on_the_current_stream(backend: str) -> None:
    score = on_a_stream_of_its_own(
        lambda w: unit_importance(
            [w, w], [], [0, 1], [1, 1], mode="magnitude_l1", check_finite=False, backend=backend
        )
    )
    assert (score == 8192.0).all()


def test_gather_runs_on_the_current_stream(backend: str) -> None:
    keep = torch.arange(0, 2048, 2)
    gathered = on_a_stream_of_its_own(lambda t: gather_units([t], [1], [1], keep, backend=backend)[0])
    assert (gathered == 2.0).all()


def test_similarity_runs_on_the_current_stream(backend: str) -> None:
    distance = on_a_stream_of_its_own(lambda h: residual_similarity(h, -h, "manhattan", backend=backend))
    assert distance.item() == 4 * 2048


def test_activation_stats_run_on_the_current_stream(backend: str) -> None:
    assert (on_a_stream_of_its_own(lambda x: stats_of([x], backend).mean) == 2.0).all()


def test_linear_importance_runs_on_the_current_stream(backend: str) -> None:
    scores = on_a_stream_of_its_own(
        lambda x: linear_importance(x, x, x, 0, check_finite=False, backend=backend)
    )
    assert (scores == 2.0 * 2048 * (2 * 2 * 2048)).all()


def test_memory_of_any_stream_is_given_back_in_its_order(backend: str) -> None:
    """Two streams at once, each with a workspace of its own."""
    weights = [torch.full((4096, 512), float(i + 1), device="cuda") for i in range(2)]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for weight, stream, scores in zip(weights, streams, results, strict=True):
            with torch.cuda.stream(stream):
                scores.append(
                    unit_importance(
                        [weight], [], [1], [1], mode="magnitude_l1", check_finite=False, backend=backend
                    )
                )
    torch.cuda.synchronize()
    for i, scores in enumerate(results):
        assert all((score == 4096.0 * (i + 1)).all() for score in scores)


def op_of(backend: str, name: str) -> Any:
    return getattr(torch.ops.adapt_pruner, name if backend == "cuda" else f"triton_{name}")


@pytest.mark.parametrize("mode", ["first", "mixed"])
@pytest.mark.parametrize("sets", [[], [0, 0, 1]])
def test_opcheck_unit_importance(backend: str, mode: str, sets: list[int]) -> None:
    arguments = on_gpu(make_members(4, 6, "bf16", group_size=2)).arguments(mode)
    torch.library.opcheck(op_of(backend, "unit_importance").default, (), {**arguments, "sets": sets})


def test_opcheck_gather_units(backend: str) -> None:
    tensors = [torch.randn(8, 3).cuda(), torch.randn(3, 4).cuda(), torch.randn(4).cuda()]
    keep = torch.tensor([0, 2, 3], device="cpu" if backend == "cuda" else "cuda")
    arguments = (tensors, [0, 1, 0], [2, 1, 1], keep)
    torch.library.opcheck(op_of(backend, "gather_units").default, arguments)
    if backend == "cuda":
        out = [torch.zeros(6, 3).cuda(), torch.zeros(3, 3).cuda(), torch.zeros(3).cuda()]
        torch.library.opcheck(torch.ops.adapt_pruner.gather_units.out, arguments, {"out": out})


def test_opcheck_linear_importance() -> None:
    arguments = (torch.randn(5, 8).cuda(), torch.randn(5, 4).cuda(), torch.randn(4, 8).cuda(), 0, 2)
    torch.library.opcheck(torch.ops.adapt_pruner.triton_linear_importance.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_linear_importance_of_a_large_layer_writes_no_gradient(dtype: torch.dtype, dim: int) -> None:
    x, dy, weight = (
        torch.randn(shape, device="cuda").to(dtype) for shape in ((300, 8192), (300, 4096), (4096, 8192))
    )
    linear_importance(x, dy, weight, dim)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = linear_importance(x, dy, weight, dim, check_finite=False)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * weight.nbytes
    oracle = reference.linear_importance(x.double(), dy.double(), weight.double(), dim, 1)
    plain = (weight * (dy.T @ x)).abs().float().sum(1 - dim)
    error, plain_error = ((got.double() - oracle).abs().max() / oracle.max() for got in (result, plain))
    assert error <= 2 * plain_error + 2**-22


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_residual_similarity(backend: str, metric: str) -> None:
    arguments = (torch.randn(5, 8).cuda(), torch.randn(5, 8).cuda(), metric)
    torch.library.opcheck(op_of(backend, "residual_similarity").default, arguments)


def test_opcheck_activation_stats(backend: str) -> None:
    stats = ActivationStats.zeros(8, device="cuda")
    arguments = (torch.randn(5, 8).cuda(), stats.mean, stats.m2, stats.count)
    torch.library.opcheck(op_of(backend, "activation_stats").default, arguments)


def test_compiles_without_graph_breaks(backend: str) -> None:
    def score_and_gather(weight: Tensor, grad: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = unit_importance([weight], [grad], [1], [2], backend=backend) * 2
        (kept,) = gather_units([weight], [1], [2], keep, backend=backend)
        return scores, kept + 1, residual_similarity(weight, grad, backend=backend)

    weight, grad = torch.randn(5, 12).cuda(), torch.randn(5, 12).cuda()
    arguments = (weight, grad, torch.tensor([1, 2, 5]).cuda())
    compiled = torch.compile(score_and_gather, fullgraph=True)
    for got, expected in zip(compiled(*arguments), score_and_gather(*arguments), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_table_in_host_memory_is_not_captured_in_a_graph() -> None:
    weight = torch.ones(64, 64, device="cuda")
    arguments = ([weight], [], [0], [1])
    options = {"mode": "magnitude_l1", "check_finite": False, "backend": "cuda"}
    unit_importance(*arguments, **options)
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        unit_importance(*arguments, **options)
