"""The registered ops as torch sees them, and the binary itself."""

import os
import subprocess
import sys

import pytest
import torch
from members import digest_of_native_results, make_members
from torch import Tensor

from adapt_pruner.kernels import METRICS, MODES, gather_units, residual_similarity, unit_importance
from adapt_pruner.kernels.backends import extension_loaded

pytestmark = pytest.mark.skipif(not extension_loaded(), reason="extension not built")


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_unit_importance(mode: str) -> None:
    arguments = make_members(4, 6, "bf16", group_size=2).arguments(mode)
    torch.library.opcheck(torch.ops.adapt_pruner.unit_importance.default, (), arguments)


@pytest.mark.parametrize("keep", [[], [0, 2, 3]])
def test_opcheck_gather_units(keep: list[int]) -> None:
    tensors = [torch.randn(8, 3), torch.randn(3, 4), torch.randn(4)]
    arguments = (tensors, [0, 1, 0], [2, 1, 1], torch.tensor(keep, dtype=torch.int64))
    torch.library.opcheck(torch.ops.adapt_pruner.gather_units.default, arguments)


@pytest.mark.parametrize("keep", [[], [0, 2, 3]])
def test_opcheck_gather_units_out(keep: list[int]) -> None:
    tensors = [torch.randn(8, 3), torch.randn(3, 4), torch.randn(4)]
    out = [torch.zeros(2 * len(keep), 3), torch.zeros(3, len(keep)), torch.zeros(len(keep))]
    arguments = (tensors, [0, 1, 0], [2, 1, 1], torch.tensor(keep, dtype=torch.int64))
    torch.library.opcheck(torch.ops.adapt_pruner.gather_units.out, arguments, {"out": out})


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_residual_similarity(metric: str) -> None:
    arguments = (torch.randn(2, 5, 8), torch.randn(2, 5, 8), metric)
    torch.library.opcheck(torch.ops.adapt_pruner.residual_similarity.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    def score_and_gather(weight: Tensor, grad: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = unit_importance([weight], [grad], [1], [2]) * 2
        (kept,) = gather_units([weight], [1], [2], keep)
        return scores, kept + 1, residual_similarity(weight, grad)

    arguments = (torch.randn(5, 12), torch.randn(5, 12), torch.tensor([1, 2, 5]))
    compiled = torch.compile(score_and_gather, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*arguments), score_and_gather(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_preallocated_outputs_compile_without_graph_breaks() -> None:
    def gather_into(weight: Tensor, keep: Tensor, buffer: Tensor) -> Tensor:
        (kept,) = gather_units([weight], [1], [2], keep, out=[buffer])
        return kept + 1

    weight, keep, buffer = torch.randn(5, 12), torch.tensor([1, 2, 5]), torch.zeros(5, 6)
    result = torch.compile(gather_into, backend="aot_eager", fullgraph=True)(weight, keep, buffer)
    assert torch.equal(buffer, weight[:, [2, 3, 4, 5, 10, 11]])
    assert torch.equal(result, buffer + 1)


def test_same_bits_for_any_instruction_set_and_any_garbage_in_memory() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from adapt_pruner.kernels import build_info; from members import digest_of_native_results;"
        "print(build_info()['cpu_isa'], digest_of_native_results())"
    )
    # MALLOC_PERTURB_ fills allocated memory, which the kernels' own scratch comes from
    environment = {**os.environ, "ADAPT_PRUNER_CPU_ISA": "baseline", "MALLOC_PERTURB_": "85"}
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["baseline", digest_of_native_results()]
