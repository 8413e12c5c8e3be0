import pytest
import torch
from torch import Tensor

from adapt_pruner.kernels import cpu_linear, linear_importance, reference

# dtype of x and dy, of the weight
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16_fp32": (torch.bfloat16, torch.float32),
}


def make_layer(tokens: int, out: int, features: int, dtypes: str = "fp32") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype, weight_dtype = DTYPES[dtypes]
    x, dy, weight = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, features), (tokens, out), (out, features))
    )
    return x.to(dtype), dy.to(dtype), weight.to(weight_dtype)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 12, 7), (3, 7, 2100), (40, 260, 300), (2, 1050, 1100), (3, 2100, 2100)])
def test_matches_oracle(native_cpu: str, dtypes: str, dim: int, shape: tuple[int, int, int]) -> None:
    """At most twice the error of the plain expression in the same dtype."""
    x, dy, weight = make_layer(*shape, dtypes)
    oracle = reference.linear_importance(x.double(), dy.double(), weight.double(), dim, 1)
    result = linear_importance(x, dy, weight, dim, backend=native_cpu)
    plain = (weight * (dy.T @ x)).abs().float().sum(1 - dim)
    assert result.dtype == torch.float32
    assert result.shape == oracle.shape
    error, plain_error = ((got.double() - oracle).abs().max() / oracle.max() for got in (result, plain))
    assert error <= 2 * plain_error + 2**-22


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_importance_of_the_written_gradient(native_cpu: str, backend: str) -> None:
    x, dy, weight = make_layer(30, 24, 18)
    for dim, group_size in ((0, 1), (0, 8), (1, 6)):
        expected = reference.unit_importance([weight], [dy.T @ x], [], [dim], [group_size], "first")
        result = linear_importance(x, dy, weight, dim, group_size, backend=backend)
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=0)


def test_leading_dimensions_and_strides(native_cpu: str) -> None:
    x, dy, weight = make_layer(30, 24, 18)
    expected = linear_importance(x, dy, weight, 0, backend=native_cpu)
    batched = linear_importance(x.view(5, 6, 18), dy.view(5, 6, 24), weight, 0, backend=native_cpu)
    assert torch.equal(batched, expected)
    padded = torch.full((24, 20), torch.nan)
    padded[:, :18] = weight
    assert torch.equal(linear_importance(x, dy, padded[:, :18], 0, backend=native_cpu), expected)


def test_same_bits_from_run_to_run(native_cpu: str) -> None:
    x, dy, weight = make_layer(64, 300, 260, "bf16")
    results = [linear_importance(x, dy, weight, 1, backend=native_cpu) for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("longest", [(512, 1024), (2048, 2048)])
@pytest.mark.parametrize(
    "shape", [(4096, 14336), (14336, 4096), (576, 1536), (1, 10**7), (10**7, 1), (3, 10**6), (4096, 1024)]
)
def test_a_tile_is_a_small_part_of_a_large_gradient(shape: tuple[int, int], longest: tuple[int, int]) -> None:
    rows, cols = cpu_linear.tile_shape(*shape, longest=longest)
    assert 1 <= rows <= shape[0]
    assert 1 <= cols <= shape[1]
    gradient = shape[0] * shape[1]
    assert rows * cols <= (0.04 * gradient if gradient > cpu_linear.SMALL_GRADIENT else gradient)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 5)}, r"x: expected \[..., 6\], got shape \(3, 5\)"),
        ({"dy": torch.ones(3, 5)}, r"dy: expected \[..., 4\], got shape \(3, 5\)"),
        ({"dy": torch.ones(2, 4)}, r"dy: expected the tokens of x \(3,\), got \(2,\)"),
        ({"dy": torch.ones(3, 4).half()}, "dy: expected the dtype of x torch.float32, got torch.float16"),
        ({"weight": torch.ones(4, 6).half()}, "weight: expected the dtype of x torch.float32 or"),
        ({"weight": torch.ones(4)}, r"weight: expected \[out, in\], got shape \(4,\)"),
        ({"dim": 2}, r"dims\[0\]: expected a dimension of a 2-D tensor, got 2"),
        ({"group_size": 3}, "expected a divisor of the 4 indices of dimension 0, got 3"),
        ({"x": torch.ones(3, 6).int()}, "x: expected float32, float16 or bfloat16, got torch.int32"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(3, 6), "dy": torch.ones(3, 4), "weight": torch.ones(4, 6), "dim": 0}
    with pytest.raises(ValueError, match=message):
        linear_importance(**{**arguments, **changes})  # type: ignore[arg-type]
