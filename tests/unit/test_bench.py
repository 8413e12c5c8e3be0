"""The benchmark: what it counts, that its providers compute the same, its rows, files and errors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import warnings

import pytest
import torch

from adapt_pruner import cli
from adapt_pruner.bench import kernels as bench
from adapt_pruner.bench import measure
from adapt_pruner.bench.cases import DTYPES, OPS, PROVIDERS, Buffers, Op
from adapt_pruner.bench.layers import MODELS
from adapt_pruner.bench.results import COLUMNS, Row, compare, read_csv, to_csv
from adapt_pruner.bench.selection import Selection
from adapt_pruner.config import BenchConfig
from adapt_pruner.kernels import BackendUnavailable, reference, roofline
from adapt_pruner.kernels.backends import extension_loaded

pytestmark = pytest.mark.skipif(not extension_loaded(), reason="extension not built")

CPU = torch.device("cpu")
BY_NAME = {op.name: op for op in OPS}
FAST = ["--rounds", "2", "--threads", "1", "--backends", "cpu"]


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `bench` in this process; returns exit status, stdout and stderr."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging.getLogger("adapt_pruner"), "handlers", [])  # one for each test's stderr

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main(["bench", *(str(a) for a in arguments)])
        except SystemExit as error:  # the parser's own way out
            status = error.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


# What is counted


@pytest.mark.parametrize(
    ("op", "shape", "elements"),
    [
        ("unit_importance_rows", (8, 12), 2 * 96),
        ("unit_importance_columns", (8, 12), 2 * 96),
        ("unit_importance_both", (8, 12), 2 * 96),  # one pass is enough for both
        ("gather_units_rows", (8, 12), 2 * 6 * 12),  # 6 of 8 rows read and written
        ("gather_units_columns", (8, 12), 96 + 8 * 9),  # all read, 9 of 12 columns written
        ("gather_units_runs", (4, 512), 2 * 4 * 3 * 128),  # 3 of 4 heads
        ("gather_units_runs", (4, 576), 2 * 4 * 6 * 64),  # 9 heads of 64 columns
        ("residual_similarity_cosine", (8, 12), 2 * 96),
        ("residual_similarity_euclidean", (8, 12), 2 * 96),
        ("residual_similarity_manhattan", (8, 12), 2 * 96),
        ("activation_stats", (8, 12), 96),
        ("linear_importance", (8, 12), 96 + 2048 * 8 + 2048 * 12),  # weight, dy, x; no gradient
    ],
)
def test_bytes_that_an_op_must_move(op, shape, elements):
    for size in (2, 4):
        assert BY_NAME[op].bytes_moved(shape, size) == elements * size


def test_every_op_has_its_bytes_checked():
    (parameters,) = (mark.args[1] for mark in test_bytes_that_an_op_must_move.pytestmark)
    assert {op for op, _, _ in parameters} == set(BY_NAME)


def test_bounds():
    on_cpu = {op.family: op.bound_on(CPU) for op in OPS}
    assert on_cpu == {
        "unit_importance": "read",
        "gather_units": "memcpy",
        "residual_similarity": "read",
        "activation_stats": "read_one",
        "linear_importance": "gemm",
    }
    on_gpu = {op.family: op.bound_on(torch.device("cuda")) for op in OPS}
    assert on_gpu == dict.fromkeys(on_cpu, "copy") | {"linear_importance": "gemm"}


def test_shapes_of_models():
    assert list(MODELS["Llama-3.1-8B"].shapes()) == [
        (4096, 14336),
        (14336, 4096),
        (4096, 4096),
        (1024, 4096),
    ]
    assert (896, 4864) in MODELS["Qwen2.5-0.5B"].shapes()
    assert (128, 896) in MODELS["Qwen2.5-0.5B"].shapes()
    of_all = Selection.of(BenchConfig("kernels", models="all", backends="cpu")).shapes
    assert set(of_all) == {shape for sizes in MODELS.values() for shape in sizes.shapes()}
    assert len(of_all) == len(set(of_all))


# All providers compute the same


def expected_results(op: Op, b: Buffers) -> list[torch.Tensor]:
    """In float64, by the reference."""
    weight, other = b.weight.double(), b.other.double()
    variant = op.name.removeprefix(op.family + "_")
    if op.family == "unit_importance":
        dims = {"rows": [0], "columns": [1], "both": [0, 1]}[variant]
        return [reference.unit_importance([weight], [other], [], [dim], [1], "first") for dim in dims]
    if op.family == "gather_units":
        dim, group = {"rows": (0, 1), "columns": (1, 1), "runs": (1, 128)}[variant]
        return reference.gather_units([weight], [dim], [group], b.keep(dim, group))
    if op.family == "residual_similarity":
        return [reference.residual_similarity(weight, other, variant)]
    if op.family == "activation_stats":
        return [weight.mean(0), (weight - weight.mean(0)).square().sum(0)]
    assert op.family == "linear_importance"
    return [reference.linear_importance(b.x.double(), b.dy.double(), weight, 0, 1)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_provider_computes_the_op(monkeypatch, op, provider, dtype):
    compiler = functools.partial(torch.compile, backend="aot_eager")  # inductor is in another test
    monkeypatch.setattr(torch, "compile", compiler)
    b = Buffers((24, 512), DTYPES[dtype], CPU, seed=3)
    for buffer in (b._kept, b.temporary, b.temporary_fp32, b.row_scores, b.column_scores):
        buffer.fill_(math.nan)
    with torch.no_grad():
        results = op.providers(b, provider, "cpu")()
    exact = op.family == "gather_units"
    tolerance = {"fp32": 1e-4, "bf16": 4e-2}[dtype]
    for result, expected in zip(results, expected_results(op, b), strict=True):
        if op.family == "activation_stats" and expected.abs().max() < 1:  # means about 0
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance / 10)
        else:
            torch.testing.assert_close(result.double(), expected, rtol=0 if exact else tolerance, atol=0)


def test_running_again_changes_no_result():
    b = Buffers((16, 256), torch.float32, CPU, seed=0)
    for op, provider in itertools.product(OPS, ("eager", "eager_preallocated", "ours")):
        run = op.providers(b, provider, "cpu")
        first = [result.clone() for result in run()]
        again = run()
        if op.family == "activation_stats":  # merges the same rows again
            first[1] = 2 * first[1]
        for a, c in zip(first, again, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-12)


# What bounds them


@pytest.mark.parametrize("numel", [1, 63, 64, 1000, 100_003])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_copy_roofline_copies_all_of_it(numel, streaming):
    source = torch.randint(-128, 127, (numel,), dtype=torch.int8)
    target = torch.zeros(numel, dtype=torch.int8)
    roofline.copy(target, source, streaming=streaming)
    assert torch.equal(target, source)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_read_roofline_reads_every_byte(ahead):
    pair = [torch.zeros(64 * 5 + 7, dtype=torch.uint8) for _ in range(2)]
    for tensor in pair:
        for i in range(tensor.numel()):
            tensor[i] = 1
            assert torch.ops.adapt_pruner.roofline_read(*pair, ahead) != 0, i
            tensor[i] = 0
    assert torch.ops.adapt_pruner.roofline_read(*pair, ahead) == 0
    large = [torch.randint(0, 255, (1 << 20,), dtype=torch.uint8) for _ in range(2)]  # on all threads
    words = (large[0] ^ large[1]).view(torch.int64).tolist()
    assert torch.ops.adapt_pruner.roofline_read(*large, ahead) == functools.reduce(int.__xor__, words)


def test_rooflines_refuse_other_sizes():
    for call in (
        lambda: roofline.copy(torch.zeros(4), torch.zeros(5)),
        lambda: roofline.read_pair(torch.zeros(4), torch.zeros(5)),
        lambda: roofline.copy(torch.zeros(4, 4).T, torch.zeros(4, 4)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


def test_extra_memory_is_what_a_call_holds_at_its_peak():
    timer = measure.CpuTimer("wall", 1)
    mebibytes = [(timer.extra_bytes(lambda n=n: torch.ones(n << 18)) or 0) / 2**20 for n in (0, 64, 8)]
    assert mebibytes[0] < 4
    assert 60 < mebibytes[1] < 72
    assert 7 < mebibytes[2] < 16


def test_the_cpu_clock_is_a_thread_s_share():
    def spin():
        for _ in range(200_000):
            pass

    alone, of_two = (measure.CpuTimer("cpu", threads).seconds(spin, 3) for threads in (1, 2))
    assert 0.2 < of_two / alone < 0.9


def test_all_take_turns():
    order = []
    functions = [functools.partial(order.append, name) for name in "ab"]

    class Timer:
        least_seconds = 3.0

        def seconds(self, function, calls):
            function()
            order.append(calls)
            return 1.0

    measured = measure.take_turns(functions, Timer(), rounds=2)
    assert order == ["a", 1, "a", 2, "a", 4, "b", 1, "b", 2, "b", 4, *["a", 4, "b", 4] * 2]
    assert measured == [[1.0, 1.0], [1.0, 1.0]]


# The command


def test_rows_files_and_json(command, tmp_path):
    threads = torch.get_num_threads()
    arguments = ("kernels", "--shapes", "12x128,16x256", "--providers", "eager,ours", "--dtypes", "fp32,bf16")
    status, out, err = command(*arguments, *FAST, "--output", tmp_path / "o", "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert shown["device"]
    assert shown["versions"]["torch"]
    assert shown["settings"]["rounds"] == 2
    assert set(shown["allocator"]) >= {"LD_PRELOAD", "GLIBC_TUNABLES"}
    assert shown["notes"] == []
    rows = shown["rows"]
    required = "op provider backend shape dtype threads ms_p20 ms_p50 ms_p80 gbps fraction_of_roofline device"
    assert all(set(row) == set(COLUMNS) >= set(required.split()) for row in rows)
    measured = {(r["op"], r["provider"], r["shape"], r["dtype"]) for r in rows if r["provider"] != "roofline"}
    wanted = itertools.product(
        BY_NAME, ("eager", "eager_preallocated", "ours"), ("12x128", "16x256"), ("fp32", "bf16")
    )
    assert measured == set(wanted)
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["threads"] == 1
    check_rates(rows)
    assert {file.name for file in (tmp_path / "o").iterdir()} == {
        "config.yaml",
        "environment.json",
        "kernels.csv",
        "rooflines.png",
    }
    assert [dataclasses.asdict(row) for row in read_csv(tmp_path / "o" / "kernels.csv")] == rows
    assert (tmp_path / "o" / "rooflines.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads


def check_rates(rows):
    """GB/s by time, and fractions by GB/s of the roofline beside it."""
    for row in rows:
        op = row["op"]
        (bound,) = (
            r
            for r in rows
            if r["op"] == f"roofline_{row['roofline']}"
            and (r["shape"], r["dtype"]) == (row["shape"], row["dtype"])
        )
        assert row["fraction_of_roofline"] == pytest.approx(row["gbps"] / bound["gbps"], rel=1e-4)
        if op in BY_NAME:
            shape = tuple(int(n) for n in row["shape"].split("x"))
            moved = BY_NAME[op].bytes_moved(shape, DTYPES[row["dtype"]].itemsize)
            assert row["gbps"] == pytest.approx(moved / row["ms_p50"] / 1e6, rel=1e-4)
    gemm = next(r for r in rows if r["op"] == "roofline_gemm")
    linear = next(r for r in rows if r["op"] == "linear_importance")
    assert linear["fraction_of_roofline"] == pytest.approx(gemm["ms_p50"] / linear["ms_p50"], rel=1e-4)


def test_the_table_for_people(command):
    arguments = ("kernels", "--shapes", "16x256", "--ops", "gather_units", "--providers", "ours")
    status, out, err = command(*arguments, *FAST, "--dtypes", "bf16", "--clock", "cpu")
    assert status == 0, err
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    for text in (
        "16x256 bf16",
        "roofline_memcpy",
        "roofline_copy_streaming",
        "gather_units_runs",
        "ours cpu",
    ):
        assert text in out
    assert "gemm" not in out  # bounds none of these


def test_torch_compile_is_measured(command):
    arguments = ("kernels", "--shapes", "16x256", "--ops", "unit_importance_both,gather_units_columns")
    status, out, err = command(*arguments, *FAST, "--providers", "compile", "--dtypes", "fp32", "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert shown["notes"] == []
    assert [r["op"] for r in shown["rows"] if r["provider"] == "compile"] == [
        "unit_importance_both",
        "gather_units_columns",
    ]


def test_where_torch_compile_fails_the_others_are_measured(command, monkeypatch):
    def broken(function, **options):
        def run(*arguments):
            raise RuntimeError("no C++ compiler\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    arguments = ("kernels", "--shapes", "16x256", "--ops", "activation_stats", "--dtypes", "fp32", *FAST)
    status, out, err = command(*arguments, "--providers", "compile,ours", "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert {row["provider"] for row in shown["rows"]} == {"roofline", "ours"}
    assert shown["notes"] == [
        "activation_stats by compile (cpu) left out: torch.compile failed: no C++ compiler"
    ]
    status, out, err = command(*arguments, "--providers", "compile", "--json")
    assert (status, out) == (1, "")
    assert "torch.compile failed: no C++ compiler" in err


def test_what_does_not_fit_is_left_out_before_anything_runs(command, monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10_000_000)
    arguments = ("kernels", "--ops", "activation_stats", "--dtypes", "fp32", "--providers", "ours", *FAST)
    status, out, err = command(*arguments, "--shapes", "16x256,4096x14336", "--json")
    assert status == 0
    shown = json.loads(out)
    assert {row["shape"] for row in shown["rows"]} == {"16x256"}
    (note,) = shown["notes"]
    assert "activation_stats 4096x14336 fp32 on cpu left out: about 0.7 GiB" in note
    assert note in err
    status, out, err = command(*arguments, "--shapes", "4096x14336")
    assert (status, out) == (1, "")
    assert "nothing can be measured" in err


def test_runs_need_heads_that_fit(command):
    arguments = ("kernels", "--shapes", "16x100", "--ops", "gather_units", "--dtypes", "fp32", *FAST)
    status, out, _ = command(*arguments, "--providers", "ours", "--json")
    shown = json.loads(out)
    assert status == 0
    assert shown["notes"] == ["gather_units_runs 16x100 left out: its columns are no heads of 64 or 128"]
    assert "gather_units_rows" in {row["op"] for row in shown["rows"]}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("kernels", "--ops", "unit_importance,sort"), 1, "ops: unknown name 'sort', expected some of"),
        (("kernels", "--shapes", "4096"), 1, "shapes: got '4096', expected ROWSxCOLUMNS such as 4096x14336"),
        (("kernels", "--shapes", "16x0"), 1, "shapes: got '16x0', expected ROWSxCOLUMNS"),
        (("kernels", "--shapes", "16x16,"), 1, "shapes: got '', expected ROWSxCOLUMNS"),
        (("kernels", "--dtypes", "fp32,int8"), 1, "dtypes: unknown name 'int8', expected some of fp32, bf16"),
        (("kernels", "--providers", "jax"), 1, "providers: unknown name 'jax', expected some of eager"),
        (("kernels", "--backends", "cpu,metal"), 1, "backends: unknown name 'metal', expected some of cpu"),
        (("kernels", "--models", "GPT-2"), 1, "models: unknown name 'GPT-2', expected some of SmolLM2-135M"),
        (("kernels", "--models", "all", "--shapes", "8x8"), 1, "models is 'all', expected not given"),
        (("kernels", "--rounds", "0"), 1, "rounds is 0, expected at least 1"),
        (("kernels", "--threads", "0"), 1, "threads is 0, expected at least 1"),
        (("kernels", "--threshold", "0"), 1, "threshold is 0.0, expected finite, above 0"),
        (("kernels", "--compare", "absent.csv"), 1, "absent.csv"),
        (("kernels", "--clock", "sun"), 2, "--clock"),
        (("attention",), 1, "suite is 'attention', expected one of ('kernels',)"),
        ((), 2, "missing argument: SUITE"),
    ],
)
def test_wrong_settings_are_one_error_before_anything_runs(command, monkeypatch, arguments, status, message):
    monkeypatch.setattr(bench, "_measure", None)
    got, out, err = command(*arguments)
    assert (got, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_is_named_has_to_work(command, backend):
    status, out, err = command("kernels", "--backends", f"cpu,{backend}", "--shapes", "8x8")
    assert (status, out) == (1, "")
    assert f"backend '{backend}' cannot be used: " in err


def test_an_output_that_is_not_empty_is_refused_first(command, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_measure", None)
    (tmp_path / "file").write_text("x")
    status, out, err = command("kernels", "--shapes", "8x8", "--output", tmp_path)
    assert (status, out) == (1, "")
    assert "is not an empty directory" in err


def test_a_provider_that_cannot_run_at_all_is_an_error(monkeypatch):
    def unavailable(*arguments):
        def run():
            raise BackendUnavailable("needs triton")

        return run

    ops = tuple(dataclasses.replace(op, providers=unavailable) for op in OPS[:1])
    monkeypatch.setattr(bench, "Selection", FixedSelection(ops))
    with pytest.raises(
        BackendUnavailable, match=r"unit_importance_rows by ours \(cpu\) left out: needs triton"
    ):
        bench.bench_kernels(BenchConfig("kernels", rounds=1))


class FixedSelection:
    def __init__(self, ops):
        self.ops = ops

    def of(self, config):
        return Selection(self.ops, ((8, 8),), ("fp32",), ("ours",), {CPU: ("cpu",)})


# Runs compared


def a_row(**changes) -> Row:
    values = {
        "op": "unit_importance_rows",
        "provider": "ours",
        "backend": "cpu",
        "shape": "16x256",
        "dtype": "bf16",
        "threads": 2,
        "ms_p20": 0.9,
        "ms_p50": 1.0,
        "ms_p80": 1.1,
        "gbps": 30.5,
        "fraction_of_roofline": 0.9,
        "roofline": "read",
        "extra_bytes": 4096,
        "extra_of_tensor": 0.25,
        "clock": "wall",
        "device": "a, processor",
    }
    return Row(**(values | changes))


def test_csv_round_trip(tmp_path):
    rows = [a_row(), a_row(op="activation_stats", extra_bytes=None, extra_of_tensor=None, ms_p50=1 / 3)]
    path = tmp_path / "kernels.csv"
    path.write_text(to_csv(rows))
    assert read_csv(path) == rows
    path.write_text(to_csv(rows).replace("ms_p50", "ms"))
    with pytest.raises(ValueError, match=r"kernels.csv is not the .* no column ms_p50"):
        read_csv(path)
    path.write_text(to_csv(rows).replace("30.5", "fast"))
    with pytest.raises(ValueError, match=r"line 2.*fast"):
        read_csv(path)


def test_only_what_is_slower_in_time_and_beside_the_roofline_is_a_regression():
    old = [a_row(shape=f"{i}x8") for i in range(6)]
    new = [
        a_row(shape="0x8", ms_p50=1.05, fraction_of_roofline=0.86),  # noise
        a_row(shape="1x8", ms_p50=1.3, fraction_of_roofline=0.9),  # the whole machine is slower
        a_row(shape="2x8", ms_p50=1.0, fraction_of_roofline=0.6),  # only the roofline was faster
        a_row(shape="3x8", ms_p50=0.5, fraction_of_roofline=1.8),  # better
        a_row(shape="4x8", ms_p50=1.2, fraction_of_roofline=0.75),  # slower
        a_row(shape="5x8", ms_p50=2.0, fraction_of_roofline=0.45),  # much slower
    ]
    found = compare(old, new, 0.1)
    assert (found.matched, found.unmatched, found.old_devices) == (6, 0, ())
    assert [r.after.shape for r in found.regressions] == ["5x8", "4x8"]
    assert [r.after.shape for r in compare(old, new, 0.5).regressions] == ["5x8"]


@pytest.mark.parametrize(
    "change",
    [
        {"op": "activation_stats"},
        {"provider": "eager"},
        {"backend": "triton"},
        {"shape": "8x8"},
        {"dtype": "fp32"},
        {"threads": 1},
        {"clock": "cpu"},
        {"device": "other"},
    ],
)
def test_only_like_is_compared_with_like(change):
    slower = a_row(ms_p50=2.0, fraction_of_roofline=0.45)
    found = compare([dataclasses.replace(a_row(), **change)], [slower], 0.1)
    assert (found.matched, found.unmatched, found.regressions) == (0, 1, ())
    assert found.old_devices == (("other",) if "device" in change else ())


def test_regressions_fail_the_command(command, tmp_path):
    arguments = ("kernels", "--shapes", "16x256", "--ops", "activation_stats", "--dtypes", "fp32", *FAST)
    arguments += ("--providers", "ours", "--json")
    status, out, err = command(*arguments, "--output", tmp_path / "old")
    assert status == 0, err
    rows = read_csv(tmp_path / "old" / "kernels.csv")
    old = tmp_path / "old.csv"

    def planted(**change):
        old.write_text(to_csv([dataclasses.replace(row, **change) for row in rows]))

    planted(ms_p50=1e-6, fraction_of_roofline=1e6)
    status, out, _ = command(*arguments, "--compare", old, "--output", tmp_path / "new")
    assert status == 1
    found = json.loads(out)["comparison"]
    regression = next(r for r in found["regressions"] if r["op"] == "activation_stats")
    assert regression["ms_p50_before"] == 1e-6
    assert regression["slowdown"] > 1
    assert json.loads((tmp_path / "new" / "comparison.json").read_text()) == found

    planted(ms_p50=1e6, fraction_of_roofline=1e-6)
    assert command(*arguments, "--compare", old)[0] == 0

    planted(device="another processor")  # nothing to compare with: it must not pass unseen
    status, out, _ = command(*arguments[:-1], "--compare", old)
    assert status == 1
    assert "another processor" in out
    assert "0 rows compared" in out
