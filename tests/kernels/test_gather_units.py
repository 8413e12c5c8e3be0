import itertools

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


WIDTHS = [1, 7, 8, 9, 31, 33, 257, 2049]
GUARD = 64


def guarded(shape: list[int], dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
    """An output, `offset` elements off a cache line, and the bytes around it: all 0xA5."""
    size = torch.empty(0, dtype=dtype).element_size()
    numel = shape[0] * shape[1]
    around = torch.full((numel * size + 3 * GUARD + offset * size,), 0xA5, dtype=torch.uint8)
    start = -around.data_ptr() % GUARD + GUARD + offset * size
    return around[start : start + numel * size].view(dtype).view(shape), around


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_out_is_written_and_nothing_around_it(
    native_cpu: str, backend: str, dtype: torch.dtype, width: int
) -> None:
    for (name, units), dim in itertools.product(keep_lists(width).items(), (0, 1)):
        shape = (width, 5) if dim == 0 else (5, width)
        tensor = random_tensor(shape, dtype)
        keep = torch.tensor(units, dtype=torch.int64)
        expected = tensor.index_select(dim, keep)
        for offset in (0, 1, 5):
            out, around = guarded(list(expected.shape), dtype, offset)
            before = around.clone()
            (result,) = gather_units([tensor], [dim], [1], keep, out=[out], backend=backend)
            assert result is out
            assert torch.equal(out, expected), (name, dim, offset)
            out.view(-1).view(torch.uint8).fill_(0xA5)
            assert torch.equal(around, before), (name, dim, offset)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_byte_behind_an_output_row_is_written(native_cpu: str, dtype: torch.dtype, width: int) -> None:
    tensor = random_tensor((3, width), dtype)
    keep = torch.arange(0, width, 2)
    for row in range(3):  # the bytes behind each row, were it the last one
        out, around = guarded([row + 1, len(keep)], dtype, 1)
        gather_units([tensor[: row + 1]], [1], [1], keep, out=[out], backend=native_cpu)
        end = out.data_ptr() - around.data_ptr() + out.nbytes
        assert (around[end:] == 0xA5).all()
        assert torch.equal(out, tensor[: row + 1, ::2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("group_size", "dim"), [(1, 0), (1, 1), (37, 1), (129, 1), (3, 0)])
def test_large_outputs_go_around_the_caches(
    native_cpu: str, threads: None, dtype: torch.dtype, group_size: int, dim: int
) -> None:
    units, other = 2053 // group_size, 4099
    size = torch.empty(0, dtype=dtype).element_size()
    shape = [units * group_size, other] if dim == 0 else [other, units * group_size]
    tensor = random_tensor((shape[0], shape[1]), dtype)
    keep = torch.tensor(keep_lists(units)["random"])
    shape[dim] = len(keep) * group_size
    assert shape[0] * shape[1] * size > 4 << 20
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, around = guarded(shape, dtype, count)
        gather_units([tensor], [dim], [group_size], keep, out=[out], backend=native_cpu)
        assert torch.equal(out, reference.gather_units([tensor], [dim], [group_size], keep)[0])
        start = out.data_ptr() - around.data_ptr()
        assert (around[:start] == 0xA5).all()
        assert (around[start + out.nbytes :] == 0xA5).all()


def test_out_of_several_members(native_cpu: str) -> None:
    tensors = [torch.randn(8, 5), torch.randn(3, 16), torch.randn(8)]
    keep = torch.tensor([0, 3])
    buffers = [torch.empty(4, 5), torch.empty(3, 8), torch.empty(4)]
    for backend in (native_cpu, "reference"):
        for buffer in buffers:
            buffer.fill_(torch.nan)
        gather_units(tensors, [0, 1, 0], [2, 4, 2], keep, out=buffers, backend=backend)
        assert_same(buffers, tensors, reference.gather_units(tensors, [0, 1, 0], [2, 4, 2], keep))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_keep_may_be_a_view(native_cpu: str, backend: str) -> None:
    tensor, every_other = torch.randn(4, 3), torch.tensor([0, 9, 2, 9])[::2]
    (result,) = gather_units([tensor], [0], [1], every_other, backend=backend)
    assert torch.equal(result, tensor[[0, 2]])
