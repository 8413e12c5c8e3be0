"""Throughput of the ops beside plain PyTorch, on the layer shape of an 8B model: `make bench`."""

from __future__ import annotations

import pytest
import torch

from adapt_pruner import kernels
from adapt_pruner.kernels import reference

ROWS, COLUMNS = 4096, 14336
KEEP = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))[: COLUMNS * 3 // 4].sort().values
DTYPES = [torch.float32, torch.bfloat16]
PROVIDERS = {"ours": "auto", "eager": "reference"}


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def pair(request):
    """Two matrices [4096, 14336] of one dtype: a weight and its gradient, or two residual streams."""
    return torch.randn(ROWS, COLUMNS).to(request.param), torch.randn(ROWS, COLUMNS).to(request.param)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_unit_importance(benchmark, pair, dim, provider):
    weight, grad = pair
    benchmark.group = f"unit_importance {'columns' if dim else 'rows'} {weight.dtype}"
    result = benchmark(kernels.unit_importance, [weight], [grad], [dim], [1], backend=PROVIDERS[provider])
    expected = reference.unit_importance([weight], [grad], [], [dim], [1], "first")
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gather_columns(benchmark, pair, provider):
    weight = pair[0]
    benchmark.group = f"gather 75% of columns {weight.dtype}"
    (result,) = benchmark(kernels.gather_units, [weight], [1], [1], KEEP, backend=PROVIDERS[provider])
    assert torch.equal(result, weight[:, KEEP])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_residual_similarity(benchmark, pair, provider):
    h_in, h_out = (h[:, :ROWS].contiguous() for h in pair)
    benchmark.group = f"cosine similarity of 4096 tokens {h_in.dtype}"
    result = benchmark(kernels.residual_similarity, h_in, h_out, backend=PROVIDERS[provider])
    expected = torch.nn.functional.cosine_similarity(h_in.double(), h_out.double(), dim=-1).mean()
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-5)
