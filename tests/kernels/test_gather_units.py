import pytest
import torch
from torch import Tensor

from adapt_pruner.kernels import gather_units, reference

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
]


def keep_lists(units: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(units)
    return {
        "all": list(range(units)),
        "none": [],
        "first": [0],
        "last": [units - 1],
        "alternating": list(range(0, units, 2)),
        "random": torch.randperm(units, generator=generator)[: units * 3 // 4].sort().values.tolist(),
        "without_middle": [u for u in range(units) if not units // 3 <= u < units // 2],
    }


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_same(results: list[Tensor], tensors: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(tensors)
    for result, tensor, truth in zip(results, tensors, expected, strict=True):
        assert result.is_contiguous()
        assert result.dtype == tensor.dtype
        assert torch.equal(result, truth)
        assert (
            result.numel() == 0 or result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 3, 64])
@pytest.mark.parametrize("units", [1, 7, 33])
def test_matches_indexing(
    native_cpu: str, backend: str, dtype: torch.dtype, group_size: int, units: int
) -> None:
    length = units * group_size
    tensors = [random_tensor(shape, dtype) for shape in ((length, 5), (3, length), (length,), (length, 33))]
    dims, group_sizes = [0, 1, 0, 0], [group_size] * 4
    for keep in keep_lists(units).values():
        results = gather_units(
            tensors, dims, group_sizes, torch.tensor(keep, dtype=torch.int64), backend=backend
        )
        index = [u * group_size + i for u in keep for i in range(group_size)]
        expected = [t[index] if d == 0 else t[:, index] for t, d in zip(tensors, dims, strict=True)]
        assert_same(results, tensors, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_strided_rows_and_different_group_sizes(native_cpu: str, dtype: torch.dtype) -> None:
    tensors = [random_tensor((14, 20), dtype)[:, :13], random_tensor((5, 300), dtype)[:, :224]]
    keep = torch.tensor([0, 2, 3, 6])
    results = gather_units(tensors, [0, 1], [2, 32], keep, backend=native_cpu)
    assert_same(results, tensors, reference.gather_units(tensors, [0, 1], [2, 32], keep))


def test_large_enough_for_threads(native_cpu: str, threads: None) -> None:
    tensor = torch.randn(600, 700)
    rows, columns = torch.arange(0, 600, 3), torch.arange(1, 700, 2)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(gather_units([tensor], [0], [1], rows, backend=native_cpu)[0], tensor[rows])
        assert torch.equal(
            gather_units([tensor], [1], [1], columns, backend=native_cpu)[0], tensor[:, columns]
        )


@pytest.mark.parametrize("shape", [(6, 0), (0, 6)])
def test_empty_tensors(native_cpu: str, shape: tuple[int, int]) -> None:
    dim = 0 if shape[0] else 1
    (result,) = gather_units([torch.empty(shape)], [dim], [1], torch.tensor([1, 4]), backend=native_cpu)
    assert result.shape == ((2, 0) if dim == 0 else (0, 2))


def test_float8_and_special_values_keep_their_bits(native_cpu: str) -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    keep = torch.tensor([1, 2, 15])
    (result,) = gather_units([bits.view(torch.float8_e4m3fn)], [1], [1], keep, backend=native_cpu)
    assert torch.equal(result.view(torch.uint8), bits[:, keep])


def test_parameters_that_require_gradients() -> None:
    (result,) = gather_units([torch.nn.Parameter(torch.randn(4, 3))], [0], [1], torch.tensor([1]))
    assert not result.requires_grad
