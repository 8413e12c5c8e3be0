"""The registered ops as torch sees them, and the binary itself."""

import os
import subprocess
import sys

import pytest
import torch
from members import digest_of_native_results, make_members
from torch import Tensor

from adapt_pruner.kernels import (
    METRICS,
    MODES,
    ActivationStats,
    UnitSet,
    build_info,
    gather_units,
    linear_importance,
    residual_similarity,
    unit_importance,
    unit_importances,
)
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


def test_opcheck_several_sets() -> None:
    first, second = make_members(4, 6, "bf16", group_size=2), make_members(5, 3, "bf16")
    arguments = first.arguments("first")
    for name, values in second.arguments("first").items():
        if name != "mode":
            arguments[name] = [*arguments[name], *values]
    torch.library.opcheck(
        torch.ops.adapt_pruner.unit_importance.default, (), {**arguments, "sets": [0, 0, 0, 1, 1, 1]}
    )


@pytest.mark.parametrize("sets", [[0], [1, 1], [0, 2], [1, 0]])
def test_sets_are_numbered_in_order(sets: list[int]) -> None:
    weight = torch.ones(4, 6)
    with pytest.raises(RuntimeError, match="sets"):
        torch.ops.adapt_pruner.unit_importance([weight] * 2, [weight] * 2, [], [0, 0], [1, 1], "first", sets)


@pytest.mark.parametrize("dim", [0, 1])
def test_opcheck_linear_importance(dim: int) -> None:
    arguments = (torch.randn(5, 6), torch.randn(5, 4), torch.randn(4, 6), dim, 2)
    torch.library.opcheck(torch.ops.adapt_pruner.linear_importance.default, arguments)


def test_opcheck_activation_stats() -> None:
    state = (torch.zeros(6).double(), torch.zeros(6).double(), torch.tensor(0))
    torch.library.opcheck(torch.ops.adapt_pruner.activation_stats.default, (torch.randn(5, 6), *state))


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_residual_similarity(metric: str) -> None:
    arguments = (torch.randn(2, 5, 8), torch.randn(2, 5, 8), metric)
    torch.library.opcheck(torch.ops.adapt_pruner.residual_similarity.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    def score_and_gather(weight: Tensor, grad: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        scores = unit_importance([weight], [grad], [1], [2]) * 2
        rows, columns = unit_importances([UnitSet([weight], [grad], [dim], [1]) for dim in (0, 1)])
        (kept,) = gather_units([weight], [1], [2], keep)
        linear = linear_importance(grad[:3], weight[:3, :5].contiguous(), weight, 0)
        stats = ActivationStats.zeros(12)
        stats.update(weight)
        similarity = residual_similarity(weight, grad)
        return scores, rows, columns, kept + 1, linear, stats.mean, stats.variance, similarity

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


ISAS = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_instruction_set_and_any_garbage_in_memory(isa: str) -> None:
    if ISAS.index(isa) > ISAS.index(build_info()["cpu_isa"]):
        pytest.skip(f"this machine has no {isa}")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from adapt_pruner.kernels import build_info; from members import digest_of_native_results;"
        "print(build_info()['cpu_isa'], digest_of_native_results())"
    )
    # MALLOC_PERTURB_ fills allocated memory, which the kernels' own scratch comes from
    environment = {**os.environ, "ADAPT_PRUNER_CPU_ISA": isa, "MALLOC_PERTURB_": "85"}
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == [isa, digest_of_native_results()]
