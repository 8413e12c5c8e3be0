"""Ahead-of-time compilation of the Triton kernels, without a GPU, and their tracing by torch.compile."""

import csv
import importlib
import os

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from adapt_pruner.kernels import backends, gather_units, residual_similarity, unit_importance

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

resources = importlib.import_module("resources")
OTHERS = ("bf16_bf16_aligned", "fp32_fp32_fp32_aligned", "cosine_bf16_aligned", "8bit_group1_aligned")


def launches(target: str) -> list:
    """Every kernel, mode and metric for sm_90 (of one dtype); a selection for the others.

    All of them for all targets are in the table, see below: compiling those takes minutes.
    """
    kernels: dict[tuple[str, str], object] = {}
    for launch in resources.all_launches():
        name, variant = launch.kernel.__name__, launch.variant
        kind = variant.split("_")[0] if target == "sm_90" else ""
        if (
            name not in {kernel for kernel, _ in kernels}
            or (target == "sm_90" and "aligned" in variant)
            or variant.endswith(OTHERS)
        ):
            kernels.setdefault((name, kind if target == "sm_90" else variant), launch)
    return list(kernels.values())


@pytest.mark.parametrize("target", resources.TARGETS)
def test_compiles_without_spills(target: str) -> None:
    measured = [resources.resources_of(launch, target) for launch in launches(target)]
    assert {m.kernel for m in measured} == {
        "row_scores",
        "column_partial_sums",
        "column_scores",
        "add_unit_scores",
        "gather_rows",
        "gather_runs",
        "gather_columns",
        "token_values",
        "mean_of_tokens",
    }
    assert [m for m in measured if m.stack > 0] == []
    vectors = [m for m in measured if m.kernel in ("row_scores", "column_partial_sums", "token_values")]
    if target != "gfx942":  # 64 lanes leave less than 16 bytes of half precision to each
        assert [m for m in vectors if m.variant.endswith("aligned") and m.load_bits < 128] == []


def test_a_kernel_that_spills_is_noticed() -> None:
    launch = next(x for x in resources.all_launches() if x.variant == "mixed_fp32_fp32_fp32_aligned")
    options = {**launch.options, "num_warps": 1}
    starved = resources.Launch(launch.kernel, launch.variant, launch.arguments, options)
    assert resources.resources_of(starved, "sm_90").stack > 0


def test_table_of_resources_is_complete_and_without_spills() -> None:
    with resources.RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "triton"]
    expected = {
        (launch.kernel.__name__, launch.variant, target)
        for launch in resources.all_launches()
        for target in resources.TARGETS
    }
    assert {(row["kernel"], row["variant"], row["target"]) for row in rows} == expected
    assert [row for row in rows if row["stack"] != "0"] == []


def test_compiles_into_one_graph_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public functions down to the kernels' launches, which only a GPU could run."""

    class Captured(Exception):
        pass

    graphs = []

    def capture(module: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        graphs.append(module.graph)
        raise Captured

    def score_and_gather(weight: Tensor, grad: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = unit_importance([weight], [grad], [1], [2], backend="triton") * 2
        (kept,) = gather_units([weight], [1], [2], keep, backend="triton")
        return scores, kept + 1, residual_similarity(weight, grad, backend="triton")

    monkeypatch.setattr(backends, "_triton_is_interpreted", lambda: True)  # lets CPU tensors through
    arguments = (torch.randn(5, 12), torch.randn(5, 12), torch.tensor([1, 2, 5]))
    compiler = aot_autograd(fw_compiler=capture, inference_compiler=capture)
    with pytest.raises((BackendCompilerFailed, Captured), match=r"Captured|capture"):
        torch.compile(score_and_gather, backend=compiler, fullgraph=True)(*arguments)
    (graph,) = graphs
    launched = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launched) == 3 + 1 + 2  # column sums, column scores, unit scores; columns; tokens, their mean
    assert not [node for node in graph.nodes if "adapt_pruner" in str(node.target)]
