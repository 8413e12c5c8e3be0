"""The CUDA and Triton backends on a real GPU."""

import pytest
import torch
from members import DTYPES, Members, assert_importance_within_budget, make_members
from torch import Tensor

from adapt_pruner.kernels import (
    METRICS,
    MODES,
    backend_status,
    backends,
    gather_units,
    reference,
    residual_similarity,
    unit_importance,
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
        torch.tensor([1, 30]).cuda(),
    ):
        results = gather_units(tensors, dims, group_sizes, keep, backend=backend)
        expected = reference.gather_units(tensors, dims, group_sizes, keep.cpu())
        assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))
        buffers = [torch.zeros_like(result) for result in results]
        gather_units(tensors, dims, group_sizes, keep, out=buffers, backend="cuda")
        assert all(torch.equal(buffer, truth) for buffer, truth in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 2051), (5000, 1024)])
def test_similarity(backend: str, metric: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    h_in = torch.randn(shape)
    h_in, h_out = h_in.to(dtype).cuda(), (h_in + 0.3 * torch.randn(shape)).to(dtype).cuda()
    result = residual_similarity(h_in, h_out, metric, backend=backend)
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)


def test_auto_chooses_cuda() -> None:
    assert backends.choose_backend("auto", torch.device("cuda", 0)) == "cuda"


def test_runs_on_the_current_stream(backend: str) -> None:
    stream = torch.cuda.Stream()
    weight = torch.zeros(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work queued on the default stream would overtake the fill
        weight.fill_(2.0)
        score = unit_importance([weight], [], [0], [1], mode="magnitude_l1", backend=backend)
    stream.synchronize()
    assert (score == 4096.0).all()


@pytest.mark.parametrize("mode", ["first", "mixed"])
def test_opcheck(backend: str, mode: str) -> None:
    arguments = on_gpu(make_members(4, 6, "bf16", group_size=2)).arguments(mode)
    ops = torch.ops.adapt_pruner
    op = ops.unit_importance if backend == "cuda" else ops.triton_unit_importance
    torch.library.opcheck(op.default, (), arguments)


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
