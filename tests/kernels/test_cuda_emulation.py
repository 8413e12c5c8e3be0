"""The logic of the CUDA kernels, run on the CPU with the threads of a block in several orders."""

import ctypes
import mmap
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
import torch
from members import DTYPES, Members, assert_importance_within_budget, make_members
from torch import Tensor

from adapt_pruner.kernels import METRICS, MODES, ActivationStats, reference
from adapt_pruner.kernels.checks import MODES_WITH_FISHERS, MODES_WITH_GRADS

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulation needs x86-64 and g++"
)
# A seed for the order of the threads, and the blocks in a grid: one for all the work, some, or one per item.
RUNS = ((0, 1), (1, 3), (2, 1000))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_cuda.compile_kernels(tmp_path_factory.mktemp("emulation"))


def run_repeatedly(kernels: ctypes.CDLL, run: Callable[[], Tensor]) -> Tensor:
    """The result, the same bits for every order of the threads and every size of the device."""
    results = []
    for seed, multiprocessors in RUNS:
        kernels.cuda_emulation_seed(seed)
        kernels.cuda_emulation_multiprocessors(multiprocessors)
        results.append(run())
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


def assert_importance_is_right(kernels: ctypes.CDLL, sets: list[Members], mode: str) -> None:
    """Scores all sets in one call."""
    arguments = [members.arguments(mode) for members in sets]
    together: dict[str, Any] = {
        name: [value for a in arguments for value in a[name]]
        for name in ("weights", "grads", "fishers", "dims", "group_sizes")
    }
    numbers = [i for i, members in enumerate(sets) for _ in members.weights]
    launches = kernels.cuda_emulation_launches()
    scores = run_repeatedly(
        kernels, lambda: emulated_cuda.unit_importance(kernels, **together, mode=mode, sets=numbers)
    )
    assert kernels.cuda_emulation_launches() - launches <= 3 * len(RUNS)
    for members in sets:
        units = members.units
        if units > 0:
            assert_importance_within_budget(scores[:units], members, mode)
        scores = scores[units:]
    assert scores.numel() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_importance_of_every_dtype(kernels: ctypes.CDLL, mode: str, dtypes: str) -> None:
    assert_importance_is_right(kernels, [make_members(9, 16, dtypes, group_size=2)], mode)


@pytest.mark.parametrize("mode", ["vectorize", "mixed"])
@pytest.mark.parametrize(("units", "width"), [(1, 1), (7, 33), (33, 7), (5, 257), (3, 4100), (140, 300)])
@pytest.mark.parametrize("row_padding", [0, 1])
def test_importance_of_odd_shapes(
    kernels: ctypes.CDLL, mode: str, units: int, width: int, row_padding: int
) -> None:
    assert_importance_is_right(kernels, [make_members(units, width, "bf16_fp32", 1, row_padding)], mode)


@pytest.mark.parametrize("group_size", [7, 64])
def test_importance_of_groups(kernels: ctypes.CDLL, group_size: int) -> None:
    assert_importance_is_right(kernels, [make_members(3, 20, "fp16", group_size)], "first")


@pytest.mark.parametrize("mode", MODES)
def test_importance_of_many_sets(kernels: ctypes.CDLL, mode: str) -> None:
    shapes = [(5, 40, 1), (3, 16, 8), (70, 9, 1), (1, 2100, 3), (2, 8, 40)]
    sets = [
        make_members(units, width, list(DTYPES)[i % len(DTYPES)], group_size, seed=i)
        for i, (units, width, group_size) in enumerate(shapes * 4)
    ]
    assert_importance_is_right(kernels, sets, mode)


def test_importance_of_dtypes_mixed_within_a_set(kernels: ctypes.CDLL) -> None:
    assert_importance_is_right(kernels, [mixed_members(24)], "mixed")


def test_importance_of_empty_matrices(kernels: ctypes.CDLL) -> None:
    """Sets without units, and units of which a member has no elements, between ordinary ones."""
    hollow = make_members(4, 8)
    for name in ("weights", "grads", "fishers"):
        getattr(hollow, name)[1:1] = [torch.zeros(4, 0), torch.zeros(0, 8)]
    hollow.dims[1:1], hollow.group_sizes[1:1] = [0, 1], [1, 2]
    nothing = Members([torch.zeros(0, 8), torch.zeros(8, 0)], [0, 1], [1, 3])
    nothing.grads = nothing.fishers = nothing.weights
    only_hollow = Members([torch.zeros(0, 6)], [1], [2], [torch.zeros(0, 6)], [torch.zeros(0, 6)])
    for mode in ("vectorize", "mixed"):
        arguments = only_hollow.arguments(mode)
        assert torch.equal(emulated_cuda.unit_importance(kernels, **arguments), torch.zeros(3))
        assert emulated_cuda.unit_importance(kernels, **nothing.arguments(mode)).shape == (0,)
        assert_importance_is_right(kernels, [make_members(3, 5), nothing, nothing, hollow, nothing], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [24, 25])  # with and without vector loads
def test_what_is_not_finite_reaches_its_score_alone(
    kernels: ctypes.CDLL, mode: str, value: float, width: int
) -> None:
    spoilt = ["weights"] + ["grads"] * (mode in MODES_WITH_GRADS) + ["fishers"] * (mode in MODES_WITH_FISHERS)
    for name in spoilt:
        members = make_members(8, width, "bf16")
        getattr(members, name)[0][2, 3] = value
        getattr(members, name)[1][width - 1, 2 * 6 + 1] = value  # of two columns per unit
        scores = emulated_cuda.unit_importance(kernels, **members.arguments(mode))
        assert scores.isfinite().logical_not().nonzero().flatten().tolist() == [2, 6]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [1, 3, 8, 64])
def test_gather(kernels: ctypes.CDLL, dtype: torch.dtype, group_size: int) -> None:
    units = 6
    length = units * group_size
    shapes = [(length, 5), (3, length), (length,), (length, 400), (19, length)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 100, shape, generator=generator).to(dtype) for shape in shapes]
    tensors.append(tensors[3][:, :399])  # rows apart from each other
    tensors.append(torch.zeros(0, length, dtype=dtype))
    dims, group_sizes = [0, 1, 0, 0, 1, 0, 1], [group_size] * 7
    for multiprocessors, keep in enumerate(([0, 1, 2, 3, 4, 5], [], [5], [0, 2, 3]), start=1):
        kernels.cuda_emulation_multiprocessors(multiprocessors)
        index = torch.tensor(keep, dtype=torch.int64)
        launches = kernels.cuda_emulation_launches()
        results = emulated_cuda.gather_units(kernels, tensors, dims, group_sizes, index)
        assert kernels.cuda_emulation_launches() - launches == (1 if keep else 0)
        expected = reference.gather_units(tensors, dims, group_sizes, index)
        assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_gather_from_a_tall_and_a_wide_tensor(kernels: ctypes.CDLL, dim: int) -> None:
    """More rows than a tile, its last rows fewer than are loaded at once; mixed sizes of words."""
    tensors = [torch.randn(600, 70), torch.randn(70, 600).half()]
    if dim == 1:
        tensors = [tensor.T.contiguous() for tensor in tensors]
    keep = torch.randperm(10)[:7].sort().values
    results = emulated_cuda.gather_units(kernels, tensors, [dim] * 2, [60, 7], keep)
    expected = reference.gather_units(tensors, [dim] * 2, [60, 7], keep)
    assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 2051), (2, 9000)])
def test_similarity(kernels: ctypes.CDLL, metric: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    h_in = torch.randn(shape, generator=generator)
    h_out = h_in + 0.3 * torch.randn(shape, generator=generator)
    h_in, h_out = h_in.to(dtype), h_out.to(dtype)
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    result = run_repeatedly(kernels, lambda: emulated_cuda.residual_similarity(kernels, h_in, h_out, metric))
    torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)


def test_mean_of_more_tokens_than_threads(kernels: ctypes.CDLL) -> None:
    h_in, h_out = torch.randn(1030, 4), torch.randn(1030, 4)
    result = emulated_cuda.residual_similarity(kernels, h_in, h_out, "manhattan")
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), "manhattan")
    torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)


def test_cosine_of_zero_vectors(kernels: ctypes.CDLL) -> None:
    zero = torch.zeros(3, 8)
    assert emulated_cuda.residual_similarity(kernels, zero, zero, "cosine").item() == 0.0


def make_activations(rows: int, cols: int, kind: str) -> Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    if kind == "far from zero":
        return 1000 + 0.01 * x
    if kind == "outlier in front":
        x[0] = 1e4
    return x


def stats_of(kernels: ctypes.CDLL, batches: list[Tensor]) -> ActivationStats:
    stats = ActivationStats.zeros(batches[0].shape[1])
    for x in batches:
        emulated_cuda.activation_stats(kernels, x, stats.mean, stats.m2, stats.count)
    return stats


def assert_stats_are_right(kernels: ctypes.CDLL, batches: list[Tensor]) -> None:
    def run() -> Tensor:
        stats = stats_of(kernels, batches)
        return torch.stack([stats.mean, stats.m2, stats.count.expand_as(stats.mean)])

    mean, m2, count = run_repeatedly(kernels, run)
    x = torch.cat(batches).double()
    deviation = x.std(dim=0, correction=0)
    assert (count == x.shape[0]).all()
    assert ((mean - x.mean(dim=0)).abs() <= 1e-6 * deviation).all()
    torch.testing.assert_close(m2, deviation.square() * x.shape[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ordinary", "far from zero", "outlier in front"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 7), (300, 16), (256, 257), (1030, 300)])
def test_activation_stats(kernels: ctypes.CDLL, dtype: torch.dtype, kind: str, rows: int, cols: int) -> None:
    assert_stats_are_right(kernels, [make_activations(rows, cols, kind).to(dtype)])


def test_activation_stats_of_several_calls(kernels: ctypes.CDLL) -> None:
    batches = [make_activations(rows, 40, "far from zero") for rows in (1, 300, 2, 32, 31)]
    batches.append(make_activations(70, 48, "outlier in front")[:, 1:41])  # rows apart and not aligned
    assert_stats_are_right(kernels, batches)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_stay_in_their_column(kernels: ctypes.CDLL, value: float) -> None:
    x = make_activations(300, 24, "ordinary")
    x[290, 5] = value
    stats = stats_of(kernels, [x, make_activations(4, 24, "ordinary")])
    for result in (stats.mean, stats.m2):
        assert result.isfinite().logical_not().nonzero().flatten().tolist() == [5]


def test_offsets_beyond_32_bits(kernels: ctypes.CDLL) -> None:
    """Rows more than 2^31 elements apart, in memory that is only touched where they are."""
    stride = 2**31 + 8
    memory = mmap.mmap(-1, 2 * (2 * stride + 64))  # of two bytes each
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 64), (stride, 1))
    far[:] = torch.randn(3, 64)
    near = far.clone()
    for dim in (0, 1):
        far_scores, near_scores = (
            emulated_cuda.unit_importance(kernels, [w], [w], [], [dim], [1], "first") for w in (far, near)
        )
        assert torch.equal(far_scores, near_scores)
        keep = torch.tensor([0, 2])
        (gathered,) = emulated_cuda.gather_units(kernels, [far], [dim], [1], keep)
        assert torch.equal(gathered, near.index_select(dim, keep))
    far_similarity, near_similarity = (
        emulated_cuda.residual_similarity(kernels, h, near.flip(0), "cosine") for h in (far, near)
    )
    assert torch.equal(far_similarity, near_similarity)
    assert torch.equal(stats_of(kernels, [far]).m2, stats_of(kernels, [near]).m2)


def mixed_members(width: int) -> Members:
    """One set whose weights, gradients and Fisher diagonals have different dtypes, member by member."""
    members = make_members(10, width)
    weight_dtypes = [torch.bfloat16, torch.float32, torch.float16]
    for i, dtype in enumerate(weight_dtypes):
        members.weights[i] = members.weights[i].to(dtype)
    members.grads[0] = members.grads[0].bfloat16()
    members.fishers[2] = members.fishers[2].half()
    return members


def without_barrier(file: str, number: int) -> Callable[[str, str], str]:
    def edit(name: str, text: str) -> str:
        if name != file:
            return text
        parts = text.split("__syncthreads();")
        assert len(parts) - 1 == BARRIERS[file]
        parts[number : number + 2] = [parts[number] + parts[number + 1]]
        return "__syncthreads();".join(parts)

    return edit


BARRIERS = {"common.cuh": 3, "saliency.cu": 2, "activations.cu": 2}


def check_importance_of_columns(kernels: ctypes.CDLL) -> None:
    assert_importance_is_right(kernels, [make_members(70, 300)], "first")


def check_activation_stats(kernels: ctypes.CDLL) -> None:
    assert_stats_are_right(kernels, [make_activations(300, 520, "ordinary")])


def check_similarity_of_tokens(kernels: ctypes.CDLL) -> None:
    h = torch.randn(5, 2500)
    oracle = reference.residual_similarity(h.double(), -h.flip(0).double(), "manhattan")
    for _ in range(3):
        result = emulated_cuda.residual_similarity(kernels, h, -h.flip(0), "manhattan")
        torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    ("file", "number", "source", "check"),
    [
        ("common.cuh", 0, "similarity.cu", check_similarity_of_tokens),
        ("common.cuh", 0, "similarity.cu", test_mean_of_more_tokens_than_threads),
        ("common.cuh", 1, "saliency.cu", check_importance_of_columns),
        ("common.cuh", 1, "activations.cu", check_activation_stats),
        ("common.cuh", 2, "saliency.cu", check_importance_of_columns),
        ("common.cuh", 2, "activations.cu", check_activation_stats),
        ("saliency.cu", 0, "saliency.cu", check_importance_of_columns),
        ("saliency.cu", 1, "saliency.cu", check_importance_of_columns),
        ("activations.cu", 0, "activations.cu", check_activation_stats),
        ("activations.cu", 1, "activations.cu", check_activation_stats),
    ],
)
def test_a_missing_barrier_is_noticed(
    kernels: ctypes.CDLL,
    tmp_path: Path,
    file: str,
    number: int,
    source: str,
    check: Callable[[ctypes.CDLL], None],
) -> None:
    check(kernels)
    broken = emulated_cuda.compile_kernels(tmp_path, [source], without_barrier(file, number))
    with pytest.raises(AssertionError):
        check(broken)


def test_a_barrier_that_not_all_threads_reach_is_an_error(tmp_path: Path) -> None:
    def edit(name: str, text: str) -> str:
        return text.replace("value = warp_sum(value);\n", "if (threadIdx.x < 7) __syncthreads();\n", 1)

    broken = emulated_cuda.compile_kernels(tmp_path, ["similarity.cu"], edit)
    with pytest.raises(emulated_cuda.LaunchFailed, match="CUDA error 719"):
        emulated_cuda.residual_similarity(broken, torch.ones(2, 300), torch.ones(2, 300), "cosine")
