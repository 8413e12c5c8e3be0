"""The cases of `adapt-pruner bench kernels` under pytest-benchmark, on a layer of an 8B model: `make bench`.

Rounds of a case follow one another here and nothing measures the memory: fractions of a roofline come from
the command.
"""

from __future__ import annotations

import pytest
import torch

from adapt_pruner.bench.cases import DTYPES, OPS, Buffers
from adapt_pruner.kernels import backend_status

SHAPE = (4096, 14336)
PROVIDERS = ("eager", "eager_preallocated", "ours")
BACKENDS = [name for name in ("cpu", "cuda", "triton") if backend_status()[name] is None]
CASES = [
    (provider, backend)
    for backend in BACKENDS
    for provider in PROVIDERS
    if provider == "ours" or backend in ("cpu", "cuda")  # plain PyTorch once on each device
]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def buffers(request, dtype):
    return Buffers(SHAPE, DTYPES[dtype], torch.device(request.param), seed=0)


@pytest.mark.parametrize(("provider", "backend"), CASES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op(benchmark, buffers, dtype, op, provider, backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if buffers.device.type != device:
        pytest.skip(f"runs on {device}")

    @torch.no_grad()
    def fresh(provider):
        results = [result.clone() for result in op.providers(buffers, provider, backend)()]
        buffers._kept.zero_()  # gathers write to the same buffer
        return results

    tolerance = {"fp32": 1e-4, "bf16": 4e-2}[dtype]
    for result, expected in zip(fresh(provider), fresh("eager"), strict=True):
        torch.testing.assert_close(result.double(), expected.double(), rtol=tolerance, atol=1e-4)
    run = op.providers(buffers, provider, backend)
    benchmark.group = f"{op.name} {dtype} {device}"

    @torch.no_grad()
    def measured():
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(measured)
