import pytest
import torch
from torch import Tensor

from adapt_pruner.kernels import METRICS, reference, residual_similarity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def residual_streams(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_in = torch.randn(shape, generator=generator)
    h_out = h_in + 0.3 * torch.randn(shape, generator=generator)
    return h_in.to(dtype), h_out.to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 33), (33, 7), (2, 3, 257), (5, 2051), (600, 64)])
def test_matches_oracle(
    native_cpu: str, backend: str, metric: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    h_in, h_out = residual_streams(shape, dtype)
    result = residual_similarity(h_in, h_out, metric, backend=backend)
    oracle = reference.residual_similarity(h_in.double(), h_out.double(), metric)
    plain = reference.residual_similarity(h_in, h_out, metric)
    assert result.dtype == torch.float32
    assert result.shape == ()
    error, plain_error = (abs(x.double() - oracle) / oracle.abs() for x in (result, plain))
    assert error <= min(2 * plain_error + 2**-23, 1e-6)


def test_agrees_with_torch_functions(native_cpu: str) -> None:
    h_in, h_out = residual_streams((40, 100), torch.float32)
    expected = {
        "cosine": torch.nn.functional.cosine_similarity(h_in, h_out, dim=1).mean(),
        "euclidean": torch.linalg.vector_norm(h_in - h_out, ord=2, dim=1).mean(),
        "manhattan": torch.linalg.vector_norm(h_in - h_out, ord=1, dim=1).mean(),
    }
    for metric, value in expected.items():
        for backend in ("cpu", "reference"):
            torch.testing.assert_close(residual_similarity(h_in, h_out, metric, backend=backend), value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cosine_of_vanishing_vectors(native_cpu: str, backend: str) -> None:
    h_in = torch.ones(4, 8)
    h_in[1] = 0.0
    h_in[2] = 1e-10  # norm below the clamp
    h_out = torch.ones(4, 8)
    h_out[3] = -1e-9
    expected = torch.nn.functional.cosine_similarity(h_in, h_out, dim=1).mean()
    torch.testing.assert_close(residual_similarity(h_in, h_out, backend=backend), expected)
    zero = torch.zeros(3, 8)
    assert residual_similarity(zero, zero, backend=backend).item() == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_views_with_strides(native_cpu: str, metric: str) -> None:
    h_in, h_out = residual_streams((2, 6, 40), torch.float32)
    for view in (lambda h: h[:, :-1], lambda h: h[0, :, :33], lambda h: h.transpose(1, 2), lambda h: h[:, 1]):
        a, b = view(h_in), view(h_out)
        result = residual_similarity(a, b, metric, backend=native_cpu)
        expected = residual_similarity(a.contiguous(), b.contiguous(), metric, backend=native_cpu)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_for_any_number_of_threads(native_cpu: str, threads: None, metric: str) -> None:
    h_in, h_out = residual_streams((501, 577), torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(residual_similarity(h_in, h_out, metric, backend=native_cpu))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_float64_runs_the_reference_in_float64() -> None:
    h_in, h_out = residual_streams((4, 5), torch.float64)
    assert residual_similarity(h_in, h_out).dtype == torch.float64


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("hidden", [64, 96])
def test_a_norm_that_overflows_is_not_orthogonality(native_cpu: str, backend: str, hidden: int) -> None:
    huge, ones = torch.full((1, hidden), 1e20), torch.ones(1, hidden)
    assert residual_similarity(huge, ones, backend=backend).isnan()
