"""Ahead-of-time compilation of the Triton kernels, without a GPU, and their tracing by torch.compile."""

import csv
import importlib
import os

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from adapt_pruner.kernels import (
    activation_stats,
    backends,
    gather_units,
    linear_importance,
    residual_similarity,
    unit_importance,
)

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

resources = importlib.import_module("resources")
SAMPLES = (
    "bf16_bf16_aligned",
    "fp32_fp32_fp32_aligned",
    "cosine_bf16_aligned",
    "8bit_group1_aligned",
    "dim0_bf16_bf16_odd",
    "dim1_bf16_bf16_large",
    "dim0_bf16_fp32_large",
    "dim1_fp32_fp32_large",
    "stats_bf16_aligned",
)
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def launches(target: str) -> list:
    """A sample of every kernel; for sm_90 also of every mode and metric.

    All of them for all targets are in the table, see below: compiling those takes minutes.
    """
    kernels: dict[tuple[str, str], object] = {}
    for launch in resources.all_launches():
        name, variant = launch.kernel.__name__, launch.variant
        if variant.endswith(SAMPLES):
            kernels[name, variant] = launch
        elif target == "sm_90" and "aligned" in variant:
            kernels.setdefault((name, variant.split("_")[0]), launch)
        elif name not in {kernel for kernel, _ in kernels}:
            kernels[name, variant] = launch
    return list(kernels.values())


@pytest.mark.parametrize("target", resources.TARGETS)
def test_compiles_without_spills(target: str) -> None:
    measured = [resources.resources_of(launch, target) for launch in launches(target)]
    assert {m.kernel for m in measured} == {
        "row_scores",
        "column_partial_sums",
        "column_scores",
        "unit_scores",
        "tile_sums",
        "sum_tiles",
        "sum_indices",
        "gather_rows",
        "gather_runs",
        "gather_columns",
        "token_values",
        "mean_of_tokens",
        "block_stats",
        "merge_blocks",
    }
    assert [m for m in measured if m.stack > 0] == []
    assert [m for m in measured if m.shared > SHARED_LIMITS[target]] == []
    streaming = ("row_scores", "column_partial_sums", "token_values", "tile_sums", "block_stats")
    vectors = [m for m in measured if m.kernel in streaming and not m.variant.endswith("odd")]
    if target != "gfx942":  # 64 lanes leave less than 16 bytes of half precision to each
        assert [m for m in vectors if m.load_bits < 128] == []


def test_a_kernel_that_spills_is_noticed() -> None:
    launch = next(x for x in resources.all_launches() if x.variant == "dim0_bf16_bf16_large")
    options = {**launch.options, "num_warps": 4}
    starved = resources.Launch(launch.kernel, launch.variant, launch.arguments, options)
    assert resources.resources_of(starved, "sm_90").stack > 0


def test_table_of_resources_is_complete_and_without_spills() -> None:
    stale = "compiled from other sources: run benchmarks/resources.py"
    assert resources.DIGEST.read_text().strip() == resources.sources_digest(), stale
    with resources.RESULTS.open(newline="") as file:
        all_rows = list(csv.DictReader(file))
    cuda = [row for row in all_rows if row["source"] == "cuda"]
    assert {row["target"] for row in cuda} == {target for target in resources.TARGETS if target[:2] == "sm"}
    assert [row for row in cuda if row["stack"] != "0"] == []
    rows = [row for row in all_rows if row["source"] == "triton"]
    expected = {
        (launch.kernel.__name__, launch.variant, target)
        for launch in resources.all_launches()
        for target in resources.TARGETS
    }
    assert {(row["kernel"], row["variant"], row["target"]) for row in rows} == expected
    assert [row for row in rows if row["stack"] != "0"] == []
    assert [row for row in rows if int(row["shared"]) > SHARED_LIMITS[row["target"]]] == []


def test_compiles_into_one_graph_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public functions down to the kernels' launches, which only a GPU could run."""

    class Captured(Exception):
        pass

    graphs = []

    def capture(module: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        graphs.append(module.graph)
        raise Captured

    def every_op(weight: Tensor, grad: Tensor, keep: Tensor, buffer: Tensor, stats: list[Tensor]) -> list:
        scores = unit_importance([weight], [grad], [1], [2], backend="triton") * 2
        fused = linear_importance(weight, weight[:, :4], weight[:4], 1, 2, backend="triton")
        (kept,) = gather_units([weight], [1], [2], keep, backend="triton")
        gather_units([weight], [1], [2], keep, out=[buffer], backend="triton")
        activation_stats(weight, *stats, backend="triton")
        return [scores, fused, kept + buffer, residual_similarity(weight, grad, backend="triton")]

    monkeypatch.setattr(backends, "_triton_is_interpreted", lambda: True)  # lets CPU tensors through
    stats = [*torch.zeros(2, 12, dtype=torch.float64).unbind(), torch.zeros((), dtype=torch.int64)]
    tensors = (torch.randn(5, 12), torch.randn(5, 12), torch.tensor([1, 2, 5]), torch.zeros(5, 6))
    compiler = aot_autograd(fw_compiler=capture, inference_compiler=capture)
    with pytest.raises((BackendCompilerFailed, Captured), match=r"Captured|capture"):
        torch.compile(every_op, backend=compiler, fullgraph=True)(*tensors, stats)
    (graph,) = graphs
    launched = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    # tiles, their sums, units; columns, twice; blocks of rows, their merge; tokens, their mean
    assert len(launched) == 3 + 2 + 2 + 2
    # its kernels take addresses, which cannot be traced
    opaque = [str(node.target) for node in graph.nodes if "adapt_pruner" in str(node.target)]
    assert opaque == ["adapt_pruner.triton_unit_importance.default"]
