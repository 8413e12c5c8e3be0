"""`compare` on tiny models: its rows and their numbers, resuming, rows that fail, what is refused early."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import random
import shlex
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from tiny import WORDS, make_model

from adapt_pruner import CompareConfig, EvaluateConfig, PruneConfig, cli, compare, evaluate, pruner
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.comparison import estimate, page, paths, row_process, run, variants
from adapt_pruner.comparison.page import write_page
from adapt_pruner.comparison.rows import Row
from adapt_pruner.comparison.table import table, tasks_of
from adapt_pruner.evaluation import multiple_choice
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
    """results.md once every time and peak in the JSON files is the same, and without the output's name."""
    for path in (output / "rows").iterdir():
        row = json.loads(path.read_text())
        for result in row["results"].values():
            for name in ("seconds", "wall_seconds", *TIMES[1:]):
                if name in result:
                    result[name] = 1.0
        path.write_text(json.dumps(row))
    write_page(output)
    return (output / "results.md").read_text().replace(f"--output {output.name} ", "")


def read_rows(output):
    return page.read_comparison(output)[0]


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
    minutes = sum(r["wall_seconds"] for row in read_rows(output) for r in row.results.values()) / 60
    assert (
        f"pruned by 2 methods to 0.7 of the non-embedding parameters: 3 rows, whose steps took {minutes:.1f}"
        in (text)
    )
    assert [row["calibration_tokens"] for row in result.rows] == [None, result.rows[1]["rounds"] * 64, 64]
    assert not (output / "results-calibration.png").exists()  # no method has two points
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


# Variants


def test_variants(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_comparison", plots.plot_comparison)
    config = settings(
        methods="adapt-pruner:sequence-length=8,"
        "adapt-pruner+: carry-over = 0.5:compensation=none:iterations=2,"
        "adapt-pruner+:iterations=2:compensation=none:carry_over=.5,wanda-sp:protected_layers=0/-1",
        targets="0.7", tasks="piqa", iterations=3,
    )  # fmt: skip
    names = [
        "adapt-pruner:sequence_length=8",
        "adapt-pruner+:iterations=2:compensation=none:carry_over=0.5",
        "wanda-sp:protected_layers=0/-1",
    ]
    lines = compare(config).rows
    assert [line["method"] for line in lines] == ["dense", *names]
    assert [line["failure"] for line in lines] == [None] * 4
    by = {}
    for name, line in zip(names, lines[1:], strict=True):
        (run_,) = (tmp_path / "out" / "runs").glob(f"*-{name.replace(':', '_').replace('/', '_')}-0.7")
        by[name] = json.loads((run_ / "plan.json").read_text())["settings"]
        length = 8 if "sequence" in name else 16
        assert line["calibration_tokens"] == line["rounds"] * 4 * length
    first, second, third = by.values()
    assert [s["sequence_length"] for s in by.values()] == [8, 16, 16]
    assert [s["iterations"] for s in by.values()] == [3, 2, 1]  # a variant's own, of all, of one shot
    assert (second["method"], second["compensation"], second["carry_over"]) == ("adapt-pruner+", "none", 0.5)
    assert (first["carry_over"], third["protected_layers"]) == (1.0, "0,-1")
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"| {names[1]} | 0.7 |" in text
    assert f"minus {names[0]}" in text
    # Others are added like methods, and one of them can be what the others are compared with.
    added = dataclasses.replace(config, methods="wanda-sp:pack=true", resume=True)
    added = dataclasses.replace(added, baseline="wanda-sp:pack=true")
    done = []
    real = run._run
    monkeypatch.setattr(run, "_run", lambda row, path: (done.append(row.method), real(row, path)))
    lines = compare(added).rows
    assert done == ["wanda-sp:pack=true"]
    assert [line["method"] for line in lines] == ["dense", *names, "wanda-sp:pack=true"]
    assert lines[1]["mean_difference"] == pytest.approx(lines[1]["mean"] - lines[4]["mean"])


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "adapt-pruner:seed=1",
            r"method 'adapt-pruner:seed=1': a setting is 'seed', expected one of \['estima",
        ),
        ("prune-it:pack=true", "method is 'prune-it', expected one of"),
        ("dense:pack=true", "method is 'dense', expected one of"),
        ("flap:", "a setting is '', expected one of"),
        ("flap:pack", "pack has no value, expected pack=VALUE"),
        ("flap:pack=yes", "pack is 'yes', expected true or false"),
        ("flap:pack=true:pack=true", "pack is given twice"),
        ("adapt-pruner:iterations=2.5", "iterations is '2.5', expected a whole number"),
        ("adapt-pruner:iterations=0", "iterations is 0, expected at least 1"),
        ("adapt-pruner:amplitude=much", "amplitude is 'much', expected a number"),
        ("adapt-pruner:amplitude=nan", "amplitude is nan, expected finite"),
        (
            "adapt-pruner:compensation=all",
            r"compensation is 'all', expected one of \('none', 'bias', 'least_",
        ),
        (
            "adapt-pruner:estimator=guess",
            "adapt-pruner:estimator=guess' on .*: estimator is 'guess', expected",
        ),
        (
            "adapt-pruner:protected-layers=0-99",
            r"protected_layers is '0-99', expected none, or layers of 0-\d",
        ),
        ("adapt-pruner:mlp-granularity=expert", "have no experts: expected 'channel'"),
        ("adapt-pruner:num_sequences=100000000", "tokens"),
        ("flap:iterations=3", "iterations is '3', expected none: flap prunes in one round"),
        ("slicegpt:estimator=wanda", "slicegpt removes dimensions of hidden states, not units"),
    ],
)
def test_wrong_variants(settings, tmp_path, monkeypatch, methods, message):
    monkeypatch.delattr(run, "_run")
    with pytest.raises(ValueError, match=message):
        compare(settings(methods=f"adapt-pruner,{methods}"))
    assert not (tmp_path / "out").exists()


def test_every_setting_of_prune_is_shared_or_can_vary():
    """A value of each kind comes back from the name of the variant."""
    kinds = variants._KINDS
    assert {*kinds, *variants._SHARED} == {field.name for field in dataclasses.fields(PruneConfig)}
    text = (
        "adapt-pruner:allocation=global:protected_layers=0-1/-1:attention_rate=0.30000000000000004:pack=true:"
        "prefix_bos=false:round_to=2"
    )
    variant = variants.Variant.parse(text)
    assert variant.changes == {
        "allocation": "global", "protected_layers": "0-1,-1", "attention_rate": 0.1 + 0.2, "pack": True,
        "prefix_bos": False, "round_to": 2,
    }  # fmt: skip
    assert variants.Variant.parse(variant.name) == variant
    assert not {",", " "} & set(variant.name)


def test_variants_on_the_command_line_and_in_yaml(tmp_path):
    methods = "adapt-pruner+,adapt-pruner+:compensation=none:protected-layers=0/-1"
    (tmp_path / "settings.yaml").write_text(f"models: m\nmethods: {methods}\nbaseline: flap:pack=true\n")
    for arguments in (
        ["m", "--methods", methods, "--baseline", "flap:pack=true"],
        ["--config", str(tmp_path / "settings.yaml")],
    ):
        parsed = cli.build_parser().parse_args(["compare", *arguments])
        assert (parsed.compare.methods, parsed.compare.baseline) == (methods, "flap:pack=true")
    assert shlex.split(methods) == [methods]


def test_figure_over_calibration_tokens(tmp_path):
    def line(method, target, tokens, perplexity):
        return {
            "model": "m", "method": method, "target": target, "calibration_tokens": tokens,
            "perplexity": perplexity,
        }  # fmt: skip

    path = tmp_path / "figure.png"
    path.write_text("of before")
    lines = [
        line("dense", None, None, 10.0), line("x:num_sequences=8", 0.8, 80, 12.0), line("y", 0.8, 10, 14.0),
        line("x:num_sequences=8", 0.5, 200, 40.0), line("x:num_sequences=16:carry_over=1.0", 0.8, 160, 11.0),
    ]  # fmt: skip
    assert not plots.plot_calibration(
        lines, path, curve=variants.curve_name
    )  # a curve at one target has 1 point
    assert not path.exists()
    lines.append(line("x", 0.8, 640, 11.5))
    assert plots.plot_calibration(lines, path, curve=variants.curve_name)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert variants.curve_name("x:iterations=3:num_sequences=16:carry_over=1.0") == "x:carry_over=1.0"


# A page elsewhere


def test_page(settings, tiny_models, calibration_file, tmp_path, monkeypatch):
    """It says where nothing lies on this machine, and which file it was."""
    monkeypatch.setattr(page, "plot_comparison", plots.plot_comparison)
    here = tmp_path / "here"
    (here / "texts").mkdir(parents=True)
    inside = here / "texts" / "held-out.txt"
    inside.write_bytes(calibration_file.read_bytes())
    monkeypatch.chdir(here)
    config = settings(
        page=str(here / "docs" / "results-compare.md"), data=str(inside), output=str(tmp_path / "out"),
        methods="wanda-sp,shortgpt,wanda-sp:num_sequences=8", targets="0.7", baseline="dense", tasks="",
    )  # fmt: skip
    lines = compare(config).rows
    text = (here / "docs" / "results-compare.md").read_text()
    data = (here / "docs" / "results-compare.csv").read_text()
    assert data == (tmp_path / "out" / "results.csv").read_text()
    for file in (text, data):
        assert "/" not in file.replace("texts/held-out.txt", "").replace(
            "docs/results-compare.md", ""
        ).replace("tokens/s", "")
    digest = hashlib.sha256(calibration_file.read_bytes()).hexdigest()
    assert f"| `calibration` | {calibration_file.name} (sha256 {digest}) |" in text
    assert "| `data` | texts/held-out.txt |" in text
    assert f"adapt-pruner compare {tiny_models['llama'].name} --output out" in text
    assert "--page docs/results-compare.md" in text
    for name in ("results-compare.png", "results-compare-calibration.png"):
        assert f"]({name})" in text
        assert (here / "docs" / name).read_bytes()[:4] == b"\x89PNG"
    assert text.replace("(results-compare", "(results") == (tmp_path / "out" / "results.md").read_text()
    # ShortGPT can only remove whole layers.
    kept = lines[2]["non_embedding_kept"]
    assert abs(kept / 0.7 - 1) > 0.005
    assert f"- shortgpt at 0.7 keeps {kept:.2%}, {1 - kept / 0.7:.1%} below its target" in text
    assert "- wanda-sp at 0.7 keeps" not in text


def test_page_is_checked_first(settings, tmp_path, monkeypatch):
    monkeypatch.delattr(run, "_run")
    with pytest.raises(ValueError, match=r"page is 'docs/results', expected a file that ends in \.md"):
        settings(page="docs/results")
    (tmp_path / "results.md").mkdir()
    with pytest.raises(ValueError, match=r"results\.md', a directory: expected a file"):
        compare(settings(page=str(tmp_path / "results.md")))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        compare(settings(page=str(tmp_path / "file" / "results.md")))
    assert not (tmp_path / "out").exists()


def test_names_of_models_and_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [str(tmp_path / "models" / "a"), "/one/x", "/two/x", "/one/two/x", "org/x", "smollm2-135m"]
    names = paths.shown_models(models[1:], paths.shown_models(models[:1], {}))
    assert list(names) == models
    assert list(names.values()) == ["models/a", "x", "two/x", "one/two/x", "org/x", "smollm2-135m"]
    message = (
        "[Errno 2] No such file: '/one/x/config.json': see https://a.b/c, 3 tokens/s of /one/two and a/b"
    )
    assert paths.without_paths(message) == (
        "[Errno 2] No such file: 'config.json': see https://a.b/c, 3 tokens/s of two and a/b"
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
    compare(dataclasses.replace(config, resume=True, page=str(tmp_path / "page.md")))
    assert (tmp_path / "page.md").read_text().count("adapt-pruner compare") == 1  # the call with the page


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
    [
        ("adapt-pruner", "llama", 0.8),
        ("adapt-pruner", "mistral", 0.5),
        ("adapt-pruner+", "llama", 0.6),
        ("adapt-pruner+:allocation=uniform:iterations=12", "llama", 0.6),
        ("adapt-pruner:granularity=layer:iterations=3", "llama", 0.6),
    ],
)
def test_rounds_of_a_dry_run(settings, tiny_models, method, family, target):
    """As many as there are, when layers lose about the same."""
    config = settings(
        methods=method, models=str(tiny_models[family]), targets=target, tasks="", iterations=20
    )
    row = list(run.requested_rows(config).values())[1]
    expected = compare(config).rows[1]["rounds"]
    assert abs(estimate._rounds(row) - expected) <= 1


def test_a_dry_run_of_variants(settings):
    """Rates are made up, so that minutes can be told: a token takes one, or two with gradients."""
    changed = "num_sequences=8:sequence_length=4:iterations=5"
    methods = [f"adapt-pruner:{changed}", "wanda-sp:num_sequences=8:sequence_length=4"]
    methods.append(f"adapt-pruner:allocation=search:{changed}")
    config = settings(methods=",".join(methods), targets="0.6", tasks="")
    rows = list(run.requested_rows(config).values())
    scoring = {rows[1].method: (60.0, 120.0), rows[2].method: (0.0, 60.0), rows[3].method: (0.0, 120.0)}
    rates = estimate._Rates(0.0, 1 / 60, 1 / 60, scoring)
    work = estimate.Workload(0, {})
    minutes = [estimate._estimate(row, work, rates).pruning for row in rows[1:]]
    rounds = estimate._rounds(rows[1])
    assert rounds > 1
    assert minutes == pytest.approx([rounds * (32 * 2 + 1), 32, rounds * (32 * 2 + 100 * 32)])


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
    once = len(set().union(*questions))
    assert once <= work.tasks["piqa"] <= sum(map(len, questions)) < sum(map(len, ids))  # beginnings once
