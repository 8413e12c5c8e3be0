"""`compare` on tiny models: its rows and their numbers, resuming, rows that fail, what is refused early."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from tiny import WORDS, make_model

from adapt_pruner import CompareConfig, EvaluateConfig, cli, compare, evaluate, pruner
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.comparison import estimate, page, row_process, run
from adapt_pruner.comparison.page import write_page
from adapt_pruner.comparison.rows import Row
from adapt_pruner.comparison.table import table, tasks_of
from adapt_pruner.evaluation import multiple_choice
from adapt_pruner.methods import find_method
from adapt_pruner.report import plots

TIMES = (
    "prune_seconds", "peak_memory_bytes", "tokens_per_second_before", "tokens_per_second"
)  # fmt: skip


def _questions(task):
    """Sixteen rows of a benchmark, of random words."""
    draw = random.Random(task)

    def words():
        return " ".join(draw.choices(WORDS, k=3))

    if task == "piqa":
        return [{"goal": words(), "sol1": words(), "sol2": words(), "label": i % 2} for i in range(16)]
    assert task == "winogrande"
    sentences = [f"{words()} _ {words()}" for _ in range(16)]
    return [
        {"sentence": s, "option1": "sun", "option2": "moon", "answer": draw.choice("12")} for s in sentences
    ]


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path, monkeypatch):
    """Makes the settings of a comparison whose rows are worked on in this process."""
    monkeypatch.setattr(multiple_choice, "load_benchmark", _questions)
    # Two thirds of the time are these figures: of a run, which its own tests look at, and of every page.
    monkeypatch.setattr(pruner, "plot_run", lambda *_, **__: None)
    monkeypatch.setattr(page, "plot_comparison", lambda *_, **__: True)

    def work_here(row, path):
        path.parent.mkdir(exist_ok=True)
        row.save(path)
        row_process.work(path)

    monkeypatch.setattr(run, "_run", work_here)

    def make(**changes):
        options = {
            "models": str(tiny_models["llama"]), "output": str(tmp_path / "out"), "targets": "0.8,0.6",
            "methods": "adapt-pruner,wanda-sp", "iterations": 4, "calibration": str(calibration_file),
            "num_sequences": 4, "sequence_length": 16, "data": str(calibration_file), "context": 32,
            "max_tokens": 300, "tasks": "piqa,winogrande", "latency_tokens": 8, "device": "cpu", **changes,
        }  # fmt: skip
        return CompareConfig(**options)

    return make


def untimed(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def page_without_times(output):
    """results.md once every time and peak in the JSON files is the same, and without the output's path."""
    for path in (output / "rows").iterdir():
        row = json.loads(path.read_text())
        for result in row["results"].values():
            for name in ("seconds", "peak_memory_bytes", "tokens_per_second", "tokens_per_second_before"):
                if name in result:
                    result[name] = 1.0
        path.write_text(json.dumps(row))
    write_page(output)
    return (output / "results.md").read_text().replace(str(output), "OUT")


# The table


def test_rows(settings, tiny_models, tmp_path):
    config = settings(keep_models=True)
    lines = compare(config).rows
    names = [("dense", None), *((m, t) for t in (0.8, 0.6) for m in ("adapt-pruner", "wanda-sp"))]
    assert [(line["method"], line["target"]) for line in lines] == names
    dense, *pruned = lines
    assert dense["parameters"] == open_checkpoint(tiny_models["llama"]).num_parameters
    assert (dense["non_embedding_kept"], dense["prune_seconds"]) == (1.0, None)
    for line in pruned:
        assert line["target"] - 0.005 < line["non_embedding_kept"] <= line["target"]
        assert line["rounds"] == {"wanda-sp": 1}.get(line["method"], line["rounds"])
        assert all(line[name] > 0 for name in TIMES)
        assert line["failure"] is None
    # Every number of the evaluation is that of `evaluate` on the saved model.
    (saved,) = (tmp_path / "out" / "runs").glob("*-wanda-sp-0.6/model")
    for model, line in ((tiny_models["llama"], dense), (saved, pruned[-1])):
        seen = evaluate(
            EvaluateConfig(
                str(model), config.data, context=32, max_tokens=300, tasks="piqa,winogrande", device="cpu"
            )
        )
        assert line["perplexity"] == pytest.approx(seen.perplexity.perplexity, rel=1e-5)
        piqa, winogrande = seen.multiple_choice.tasks
        assert (line["piqa"], line["winogrande"]) == (piqa.accuracy_norm, winogrande.accuracy)
        assert line["mean"] == pytest.approx(seen.multiple_choice.mean_accuracy_norm)
        assert line["mean_stderr"] == pytest.approx(seen.multiple_choice.mean_accuracy_norm_stderr)


def test_files(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_comparison", plots.plot_comparison)
    result = compare(settings(targets=0.7))
    output = tmp_path / "out"
    with (output / "results.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [line["method"] for line in written] == ["dense", "adapt-pruner", "wanda-sp"]
    for line, row in zip(written, result.rows, strict=True):
        assert float(line["perplexity"]) == pytest.approx(row["perplexity"], rel=1e-5)
        assert line["target"] == ("" if row["target"] is None else "0.7")
    text = (output / "results.md").read_text()
    assert f"| wanda-sp | 0.7 | {result.rows[2]['parameters']:,} |" in text
    assert (
        f"{result.rows[2]['mean_difference']:+.4f} ± {result.rows[2]['mean_difference_stderr']:.4f}" in text
    )
    assert "--targets 0.7" in text
    assert "torch" in text
    assert (output / "results.png").read_bytes()[:4] == b"\x89PNG"
    # The pruned models are gone, what shows how they came about is not.
    for name in ("adapt-pruner", "wanda-sp"):
        (pruned,) = (output / "runs").glob(f"*-{name}-0.7")
        assert {file.name for file in pruned.iterdir()} >= {"config.yaml", "metrics.json", "plan.json"}
        assert not (pruned / "model").exists()


def test_paired_difference_of_means():
    draw = np.random.default_rng(0)
    answers = {m: {t: draw.integers(0, 2, 40).astype(bool) for t in "ab"} for m in ("x", "y")}

    def row(method):
        def result(values, norm):
            accuracy, error = float(values.mean()), float(values.std(ddof=1)) / 40**0.5
            ends = {"accuracy": accuracy, "accuracy_stderr": error, "correct": values.tolist()}
            other = {"accuracy": 0.0, "accuracy_stderr": 0.0, "correct": [False] * 40}
            normed = {f"{'correct' if k == 'correct' else k.replace('accuracy', 'accuracy_norm')}": v
                      for k, v in ends.items()}  # fmt: skip
            normed["correct_norm"] = normed.pop("correct")
            none = {"accuracy_norm": None, "accuracy_norm_stderr": None, "correct_norm": None}
            return {"chance": 0.5, **(other | normed if norm else ends | none)}

        results = {t: result(answers[method][t], norm=t == "b") for t in "ab"}
        return Row("m", method, 0.8, {}, {"data": "none"}, ("a", "b"), (1, 8), results=results)

    first, second = table([row("x"), row("y")], {"baseline": "x"})
    paired = [answers["y"][t].astype(float) - answers["x"][t] for t in "ab"]
    assert second["mean_difference"] == pytest.approx(np.mean([p.mean() for p in paired]))
    error = np.sqrt(sum(p.var(ddof=1) / 40 for p in paired)) / 2
    assert second["mean_difference_stderr"] == pytest.approx(error)
    assert second["mean"] == pytest.approx(np.mean([answers["y"][t].mean() for t in "ab"]))
    assert first["mean_difference"] is None
    assert tasks_of([first, second]) == ["a", "b"]


def test_mean_of_tasks_above_chance():
    def result(accuracy):
        norm = {"accuracy_norm": None, "accuracy_norm_stderr": None, "correct_norm": None}
        correct = [i < accuracy * 10 for i in range(10)]
        return {"chance": 0.5, "accuracy": accuracy, "accuracy_stderr": 0.1, "correct": correct, **norm}

    def row(method, target, **accuracies):
        results = {name: result(value) for name, value in accuracies.items()}
        return Row("m", method, target, None, {"data": "none"}, ("a", "b"), (1, 8), results=results)

    rows = [row("dense", None, a=0.8, b=0.6), row("x", 0.8, a=0.4, b=0.9)]  # b is within 0.2 of guessing
    dense, pruned = table(rows, {"baseline": "dense"})
    assert (dense["mean_above_chance"], pruned["mean_above_chance"]) == (0.8, 0.4)
    assert pruned["mean_above_chance_difference"] == pytest.approx(-0.4)
    assert pruned["mean_difference"] == pytest.approx(-0.05)


def test_a_model_with_one_kv_head_loses_query_heads(settings, tokenizer, tmp_path):
    make_model("llama", num_key_value_heads=1).save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    config = settings(
        models=str(tmp_path / "one"), methods="wanda-sp,slicegpt", targets="0.6", tasks="", num_sequences=8
    )
    _, wanda, sliced = compare(config).rows
    assert (wanda["failure"], sliced["failure"]) == (None, None)
    assert (wanda["note"], sliced["note"]) == ("one KV head: attention shrinks by query heads", None)
    assert "- wanda-sp at 0.6: one KV head" in (tmp_path / "out" / "results.md").read_text()
    (path,) = (tmp_path / "out" / "rows").glob("*-wanda-sp-0.6.json")
    assert json.loads((row_process.run_of(path) / "plan.json").read_text())["settings"]["granularity"] == (
        "query_head"
    )


# Resuming


@pytest.mark.parametrize("steps_done", [1, 8])
def test_a_killed_comparison_goes_on_and_ends_with_the_same_page(settings, tmp_path, monkeypatch, steps_done):
    config = settings(targets="0.7")
    whole = compare(dataclasses.replace(config, output=str(tmp_path / "whole")))
    real, done = row_process._Bench.do, []

    def do(bench, step):
        if len(done) == steps_done:
            raise KeyboardInterrupt
        done.append((bench._row.method, step))
        return real(bench, step)

    with monkeypatch.context() as patch:
        patch.setattr(row_process._Bench, "do", do)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    before = list(done)
    monkeypatch.setattr(
        row_process._Bench, "do", lambda b, s: (done.append((b._row.method, s)), real(b, s))[1]
    )
    resumed = compare(dataclasses.replace(config, resume=True))
    assert untimed(resumed.rows) == untimed(whole.rows)
    assert len(done) == len(set(done)) == 5 + 2 * 6
    assert before == done[:steps_done]
    assert page_without_times(tmp_path / "out") == page_without_times(tmp_path / "whole")


def test_a_finished_comparison_only_rewrites_the_page(settings, tmp_path, monkeypatch):
    config = settings(targets="0.7")
    compare(config)
    files = [tmp_path / "out" / name for name in ("results.md", "results.csv")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    monkeypatch.delattr(run, "_run")
    monkeypatch.delattr(run, "_check_inputs")
    compare(dataclasses.replace(config, resume=True))
    assert [file.read_bytes() for file in files] == before


def test_methods_and_tasks_can_be_added(settings, tmp_path):
    first = settings(targets="0.7", methods="wanda-sp", tasks="piqa")
    compare(first)
    with pytest.raises(ValueError, match="seed is 1, the run was started with 0"):
        compare(dataclasses.replace(first, resume=True, seed=1))
    added = settings(targets="0.7", methods="magnitude,wanda-sp", tasks="winogrande", resume=True)
    lines = compare(added).rows
    assert [line["method"] for line in lines] == ["dense", "wanda-sp", "magnitude"]
    whole = compare(
        settings(output=str(tmp_path / "whole"), targets="0.7", methods="wanda-sp", tasks="piqa,winogrande")
    ).rows
    assert lines[1]["mean"] == whole[1]["mean"]
    assert lines[2]["piqa"] is None is lines[2]["mean"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.count("adapt-pruner compare") == 2  # both commands


# Rows that fail


def test_a_method_that_the_model_does_not_allow_leaves_a_row(settings, tiny_models, tmp_path, monkeypatch):
    config = settings(
        models=f"{tiny_models['gemma3_text']},{tiny_models['llama']}",
        methods="slicegpt,wanda-sp", targets="0.8", tasks="", num_sequences=8,
    )  # fmt: skip
    lines = compare(config).rows
    failed = [line for line in lines if line["failure"]]
    assert [(line["model"], line["method"]) for line in failed] == [
        (str(tiny_models["gemma3_text"]), "slicegpt")
    ]
    assert failed[0]["failure"].startswith(
        "pruning: model_type is 'gemma3_text', which slicegpt cannot slice"
    )
    assert failed[0]["perplexity"] is None
    text = (tmp_path / "out" / "results.md").read_text()
    assert "- slicegpt at 0.8 failed, pruning: model_type is 'gemma3_text'" in text
    # It would fail again, and is not tried again.
    monkeypatch.delattr(run, "_run")
    assert compare(dataclasses.replace(config, resume=True)).rows == lines


def test_a_row_that_broke_is_tried_again(settings, monkeypatch, capsys):
    config = settings(targets="0.8", methods="wanda-sp", tasks="")
    real = row_process._Bench.do

    def do(bench, step):
        if step == "perplexity":
            raise MemoryError("no more of it")
        return real(bench, step)

    with monkeypatch.context() as patch:
        patch.setattr(row_process._Bench, "do", do)
        lines = compare(config).rows
    assert [line["failure"] for line in lines] == ["perplexity: MemoryError: no more of it"] * 2
    assert lines[1]["parameters"] is not None
    assert "Traceback" in capsys.readouterr().err
    lines = compare(dataclasses.replace(config, resume=True)).rows
    assert [line["failure"] for line in lines] == [None] * 2
    assert all(line["perplexity"] > 1 for line in lines)


# Processes


def test_on_the_command_line_in_processes_of_its_own(
    tiny_models, calibration_file, tmp_path, monkeypatch, capfd
):
    """One process is killed by the system: its row says so, and a resumed comparison ends whole."""
    arguments = [
        "compare", tiny_models["llama"], "--methods", "wanda-sp", "--targets", "0.8", "--tasks", "",
        "--calibration", calibration_file, "--num-sequences", "4", "--sequence-length", "16",
        "--data", calibration_file, "--context", "32", "--max-tokens", "200", "--latency-tokens", "8",
        "--device", "cpu", "--output", tmp_path / "out",
    ]  # fmt: skip
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command line changes
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(killed))
        assert cli.main([str(a) for a in arguments]) == 1
    rows, _ = page.read_comparison(tmp_path / "out")
    assert [row.failure.reason for row in rows] == ["its process was killed by SIGKILL"] * 2
    capfd.readouterr()
    ballast = b"1" * 2**30  # of this process, and no part of what theirs take
    assert cli.main([*map(str, arguments), "--resume", "--json"]) == 0
    output = capfd.readouterr()
    dense, pruned = json.loads(output.out)["rows"]
    assert 0.795 < pruned["non_embedding_kept"] <= 0.8
    assert dense["perplexity"] > 1 < pruned["perplexity"]
    assert 2**27 < pruned["peak_memory_bytes"] < len(ballast)
    assert "wanda-sp at 0.8: speed" in output.err


def test_a_row_ends_with_the_comparison(settings, tmp_path):
    """Nobody holds the other end of stdin any more: the process gives up before its work is done."""
    path = tmp_path / "rows" / "row.json"
    path.parent.mkdir()
    config = settings(methods="adapt-pruner", targets="0.5", tasks="", iterations=2000)
    row = next(row for row in run.requested_rows(config).values() if row.target)
    row.save(path)
    process = subprocess.Popen(
        [sys.executable, "-c", "from adapt_pruner.comparison.row_process import main; main()", str(path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while not (row_process.run_of(path) / "iterations").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(timeout=20) == 1
    assert Row.load(path).missing == row.missing


# Checked before the first row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "adapt-pruner,prune-it"}, "method is 'prune-it', expected one of"),
        ({"methods": " , "}, "methods is ' , ', expected at least one name"),
        ({"targets": "0.8,1.5"}, "target is '1.5', expected a fraction"),
        ({"targets": "0.8,108M"}, "targets is '0.8,108M', expected fractions between 0 and 1"),
        ({"targets": "1.0"}, "targets is '1.0', expected fractions between 0 and 1"),
        ({"targets": ""}, "targets is '', expected fractions between 0 and 1"),
        ({"models": "no/such/model"}, "model directory no/such/model does not exist"),
        ({"baseline": "flap"}, "baseline is 'flap', expected one of"),
        ({"tasks": "piqa,chess"}, r"unknown tasks \['chess'\]"),
        ({"tasks": "", "data": "none"}, "nothing to compare"),
        ({"calibration": "missing.txt"}, "text file 'missing.txt' does not exist"),
        ({"data": "missing.txt"}, "text file 'missing.txt' does not exist"),
        ({"context": 512}, "context is 512, but .* has only 256 positions"),
        ({"context": 1}, "context is 1, expected at least 2"),
        ({"iterations": 0}, "iterations is 0, expected at least 1"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"sequence_length": 100_000}, "tokens"),
        ({"latency_tokens": 0}, "latency_tokens is 0"),
        ({"latency_tokens": 300}, "latency_tokens is 300, but .* has only 256 positions"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"questions": "prime"}, "questions is 'prime', expected one of"),
    ],
)
def test_wrong_settings(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.delattr(run, "_run")
    with pytest.raises(ValueError, match=message):
        compare(settings(**changes))
    assert not (tmp_path / "out").exists()


def test_output_is_needed_and_must_be_empty(settings, tmp_path, monkeypatch):
    monkeypatch.delattr(run, "_run")
    with pytest.raises(ValueError, match="output is missing"):
        settings(output="")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        compare(settings())


def test_dry_run(settings, tmp_path, monkeypatch):
    monkeypatch.delattr(run, "_run")
    result = compare(settings(dry_run=True))
    assert not (tmp_path / "out").exists()
    dense, *pruned = result.estimates
    assert (dense.method, dense.target, dense.pruning) == ("dense", None, 0.0)
    assert [(e.method, e.target) for e in pruned] == [
        ("adapt-pruner", 0.8), ("adapt-pruner", 0.6), ("wanda-sp", 0.8), ("wanda-sp", 0.6)
    ]  # fmt: skip
    assert all(e.pruning > 0 and e.evaluation > 0 and e.loading > 0 for e in pruned)
    assert pruned[2].pruning == pruned[3].pruning  # in one shot
    shown = result.to_dict()
    assert shown["minutes"] == pytest.approx(sum(row["minutes"] for row in shown["rows"]))


@pytest.mark.parametrize(
    ("method", "family", "target"),
    [("adapt-pruner", "llama", 0.8), ("adapt-pruner", "mistral", 0.5), ("adapt-pruner+", "llama", 0.6)],
)
def test_rounds_of_a_dry_run(settings, tiny_models, method, family, target):
    """As many as there are, when layers lose about the same."""
    config = settings(
        methods=method, models=str(tiny_models[family]), targets=target, tasks="", iterations=20
    )
    row = list(run.requested_rows(config).values())[1]
    expected = compare(config).rows[1]["rounds"]
    assert abs(estimate._rounds(row, find_method(method)) - expected) <= 1


def test_what_a_dry_run_counts(settings, tokenizer):
    rows = run.requested_rows(config := settings(limit=3, questions="odd"))
    (work,) = run._check_inputs(config, rows).values()
    assert work.text == 300
    odd = _questions("piqa")[1::2][:3]
    texts = [f"Question: {q['goal']}\nAnswer: {q[s]}" for q in odd for s in ("sol1", "sol2")]
    ids = [tokenizer(text).input_ids[:-1] for text in texts]
    questions = [
        {tuple(x[: i + 1]) for x in pair for i in range(len(x))}
        for pair in zip(ids[::2], ids[1::2], strict=True)
    ]
    assert work.tasks["piqa"] <= sum(map(len, questions)) < sum(map(len, ids))  # beginnings once
