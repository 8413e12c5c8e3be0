"""Ahead-of-time compilation of the Triton kernels, without a GPU, and their tracing by torch.compile."""

import csv
import importlib
import os

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

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
    options = {**launch.options, "ROWS": 64, "num_warps": 1}
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


def test_traces_into_the_kernels() -> None:
    def score_and_gather(weight: Tensor, grad: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ops = torch.ops.adapt_pruner
        scores = ops.triton_unit_importance([weight], [grad], [], [1], [2], "first")
        (kept,) = ops.triton_gather_units([weight], [1], [2], keep)
        return scores, kept, ops.triton_residual_similarity(weight, grad, "cosine")

    arguments = (torch.randn(5, 12), torch.randn(5, 12), torch.tensor([1, 2, 5]))
    functional = torch.func.functionalize(score_and_gather)
    graph = make_fx(functional, tracing_mode="symbolic")(*arguments).graph
    assert "triton_" in str(graph)
