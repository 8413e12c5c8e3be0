"""The logic of the CUDA kernels, run on the CPU with the threads of a block in several orders."""

import ctypes
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import emulated_cuda
import pytest
import torch
from members import DTYPES, Members, assert_importance_within_budget, make_members

from adapt_pruner.kernels import METRICS, MODES, reference

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulation needs x86-64 and g++"
)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_cuda.compile_kernels(tmp_path_factory.mktemp("emulation"))


def importance_of_seeds(kernels: ctypes.CDLL, members: Members, mode: str) -> list[torch.Tensor]:
    results = []
    for seed in SEEDS:
        kernels.cuda_emulation_seed(seed)
        results.append(emulated_cuda.unit_importance(kernels, **members.arguments(mode)))
    return results


def assert_importance_is_right(kernels: ctypes.CDLL, members: Members, mode: str) -> None:
    results = importance_of_seeds(kernels, members, mode)
    assert_importance_within_budget(results[0], members, mode)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_importance_of_every_dtype(kernels: ctypes.CDLL, mode: str, dtypes: str) -> None:
    assert_importance_is_right(kernels, make_members(9, 16, dtypes, group_size=2), mode)


@pytest.mark.parametrize("mode", ["vectorize", "mixed"])
@pytest.mark.parametrize(("units", "width"), [(1, 1), (7, 33), (33, 7), (5, 257), (3, 2080), (140, 300)])
@pytest.mark.parametrize("row_padding", [0, 1])
def test_importance_of_odd_shapes(
    kernels: ctypes.CDLL, mode: str, units: int, width: int, row_padding: int
) -> None:
    assert_importance_is_right(kernels, make_members(units, width, "bf16_fp32", 1, row_padding), mode)


@pytest.mark.parametrize("group_size", [7, 64])
def test_importance_of_groups(kernels: ctypes.CDLL, group_size: int) -> None:
    assert_importance_is_right(kernels, make_members(3, 20, "fp16", group_size), "first")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [1, 3, 8, 64])
def test_gather(kernels: ctypes.CDLL, dtype: torch.dtype, group_size: int) -> None:
    units = 6
    length = units * group_size
    shapes = [(length, 5), (3, length), (length,), (length, 400), (19, length)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 100, shape, generator=generator).to(dtype) for shape in shapes]
    tensors.append(tensors[3][:, :399])  # rows apart from each other
    dims, group_sizes = [0, 1, 0, 0, 1, 0], [group_size] * 6
    for keep in ([0, 1, 2, 3, 4, 5], [], [5], [0, 2, 3]):
        index = torch.tensor(keep, dtype=torch.int64)
        results = emulated_cuda.gather_units(kernels, tensors, dims, group_sizes, index)
        expected = reference.gather_units(tensors, dims, group_sizes, index)
        assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 2051)])
def test_similarity(kernels: ctypes.CDLL, metric: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    h_in = torch.randn(shape, generator=generator)
    h_out = h_in + 0.3 * torch.randn(shape, generator=generator)
    h_in, h_out = h_in.to(dtype), h_out.to(dtype)
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    results = []
    for seed in SEEDS:
        kernels.cuda_emulation_seed(seed)
        results.append(emulated_cuda.residual_similarity(kernels, h_in, h_out, metric))
    torch.testing.assert_close(results[0].double(), oracle, rtol=5e-7, atol=0)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_mean_of_more_tokens_than_threads(kernels: ctypes.CDLL) -> None:
    h_in, h_out = torch.randn(1030, 4), torch.randn(1030, 4)
    result = emulated_cuda.residual_similarity(kernels, h_in, h_out, "manhattan")
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), "manhattan")
    torch.testing.assert_close(result.double(), oracle, rtol=5e-7, atol=0)


def test_cosine_of_zero_vectors(kernels: ctypes.CDLL) -> None:
    zero = torch.zeros(3, 8)
    assert emulated_cuda.residual_similarity(kernels, zero, zero, "cosine").item() == 0.0


def test_too_large_a_grid_is_an_error(kernels: ctypes.CDLL) -> None:
    weight = torch.zeros(1, 1).expand(65536 * 128, 1)
    members = Members(weights=[weight], dims=[1], group_sizes=[1])
    with pytest.raises(emulated_cuda.LaunchFailed, match="CUDA error 1"):
        emulated_cuda.unit_importance(kernels, **members.arguments("magnitude_l1"))


def without_barrier_in(file: str) -> Callable[[str, str], str]:
    def edit(name: str, text: str) -> str:
        assert name != file or text.count("__syncthreads();") == 1
        return text.replace("__syncthreads();", "") if name == file else text

    return edit


@pytest.mark.parametrize("file", ["common.cuh", "saliency.cu"])
def test_a_missing_barrier_is_noticed(tmp_path: Path, file: str) -> None:
    broken = emulated_cuda.compile_kernels(tmp_path, ["saliency.cu"], without_barrier_in(file))
    with pytest.raises(AssertionError):
        assert_importance_is_right(broken, make_members(40, 300), "first")


def test_a_barrier_that_not_all_threads_reach_is_an_error(tmp_path: Path) -> None:
    def edit(name: str, text: str) -> str:
        return text.replace("value = warp_sum(value);\n", "if (threadIdx.x < 7) __syncthreads();\n", 1)

    broken = emulated_cuda.compile_kernels(tmp_path, ["saliency.cu"], edit)
    with pytest.raises(emulated_cuda.LaunchFailed, match="CUDA error 719"):
        emulated_cuda.unit_importance(broken, **make_members(2, 300).arguments("first"))
