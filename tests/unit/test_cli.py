"""The command line: what goes to stdout and stderr, exit statuses, settings from a file."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from adapt_pruner import cli
from adapt_pruner.checkpoint import config_hash, open_checkpoint
from adapt_pruner.config import (
    ApplyConfig,
    BenchConfig,
    CompareConfig,
    EvaluateConfig,
    InspectConfig,
    PruneConfig,
    VerifyConfig,
)
from adapt_pruner.methods import resolve
from adapt_pruner.plan import PruningPlan

SMALL = ["--iterations", "4", "--num-sequences", "4", "--sequence-length", "16", "--micro-batch-size", "2"]


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch):
    """The command line changes how this process shows warnings."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def command(capsys):
    """Runs a command in this process; returns exit status, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as error:  # the parser's own way out
            status = error.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def plan_file(tiny_models, tmp_path) -> Path:
    """A plan by hand for the tiny Llama: another number of units in every layer."""
    checkpoint = open_checkpoint(tiny_models["llama"])
    path = tmp_path / "plan.json"
    PruningPlan(
        "by hand",
        config_hash(checkpoint.config),
        checkpoint.fingerprint(),
        "llama",
        {},
        ({"kv_group": 4, "channel": 88},) * 4,
        tuple({"kv_group": np.arange(4 - i), "channel": np.arange(10 * i, 88)} for i in range(4)),
    ).save(path)
    return path


# JSON alone on stdout


def test_inspect(command, tiny_models):
    status, out, err = command("inspect", tiny_models["qwen2"], "--context", "32", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)["model"]
    assert shown["parameters"] == open_checkpoint(tiny_models["qwen2"]).num_parameters
    assert shown["context"] == 32
    assert [layer["widths"]["intermediate_size"] for layer in shown["layers"]] == [88] * 4


def test_inspect_for_people(command, tiny_models):
    status, out, _ = command("inspect", tiny_models["qwen2"])
    assert status == 0
    assert f"{open_checkpoint(tiny_models['qwen2']).num_parameters:,}" in out
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(out)


def test_families(command):
    status, out, err = command("families", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert shown["gemma3"]["model_types"] == ["gemma3_text", "adapt_gemma3_text"]
    status, out, _ = command("families")
    assert status == 0
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(shown)  # one line each
    for line in lines:
        family = shown[line.partition(":")[0]]
        assert family["model_types"][0] in line
        assert "arXiv" in family["source"]
        assert family["source"] in line


def test_doctor(command):
    from adapt_pruner import kernels

    status, out, err = command("doctor", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert set(shown["backends"]) == {"reference", "cpu", "cuda", "triton"}
    assert shown["backends"] == kernels.backend_status()
    assert shown["versions"]["torch"]
    status, out, _ = command("doctor")
    assert status == 0
    assert "backend reference" in out


def test_apply_and_inspect_against_the_base(command, plan_file, tiny_models, tmp_path):
    base, output = tiny_models["llama"], tmp_path / "pruned"
    status, out, err = command("apply", plan_file, base, "--output", output, "--json")
    assert (status, err) == (0, "")
    pruned = open_checkpoint(output)
    assert json.loads(out) == {"model_directory": str(output), "parameters": pruned.num_parameters}
    assert pruned.tensors["model.layers.3.mlp.down_proj.weight"].shape == (48, 58)
    assert pruned.tensors["model.layers.3.self_attn.q_proj.weight"].shape == (20, 48)

    status, out, _ = command("inspect", output, "--base", base, "--json")
    assert status == 0
    shown = json.loads(out)
    assert shown["before"]["parameters"] == open_checkpoint(base).num_parameters
    assert shown["ratios"]["kv_cache_bytes_per_token"] == 10 / 16
    status, out, _ = command("inspect", output, "--base", base)
    assert status == 0
    assert re.search(r"4 → 1\b", out)


def test_evaluate(command, tiny_models, calibration_file):
    arguments = ("evaluate", tiny_models["llama"], "--data", calibration_file, "--context", "32")
    status, out, err = command(*arguments, "--max-tokens", "200", "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert shown["perplexity"]["perplexity"] > 1
    assert shown["perplexity"]["context"] == 32
    assert shown["parameters"] == open_checkpoint(tiny_models["llama"]).num_parameters
    assert shown["multiple_choice"] is None


@pytest.fixture(scope="module")
def pruned_run(tiny_models, calibration_file, tmp_path_factory):
    """The run directory of one `prune` on the command line."""
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["prune", tiny_models["llama"], "--target", "0.8", "--output", path]
    arguments += ["--calibration", calibration_file, *SMALL, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        assert cli.main([str(a) for a in arguments]) == 0
    return path


def test_prune(command, tiny_models, calibration_file, tmp_path):
    arguments = ("prune", tiny_models["mistral"], "--target", "0.7", "--output", tmp_path / "run")
    status, out, err = command(*arguments, "--calibration", calibration_file, *SMALL, "--json")
    assert status == 0, err
    shown = json.loads(out)
    before = open_checkpoint(tiny_models["mistral"]).num_parameters
    after = open_checkpoint(tmp_path / "run" / "model").num_parameters
    assert shown["run_directory"] == str(tmp_path / "run")
    assert shown["parameters_before"] == before
    assert shown["parameters_after"] == after <= shown["parameters_target"] == int(0.7 * before)
    assert shown["plan_hash"] == PruningPlan.load(tmp_path / "run" / "plan.json").hash
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["iterations"], saved["num_sequences"], saved["sequence_length"]) == (4, 4, 16)


def test_a_run_directory_can_be_inspected_and_evaluated(command, pruned_run, calibration_file):
    status, out, err = command("inspect", pruned_run, "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert shown["ratios"]["parameters"] == pytest.approx(0.8, abs=0.01)
    arguments = ("--data", calibration_file, "--context", "32", "--max-tokens", "100", "--json")
    status, out, err = command("evaluate", pruned_run, *arguments)
    assert status == 0, err
    assert json.loads(out)["parameters"] == shown["model"]["parameters"]


def test_applying_the_plan_of_a_run_gives_its_model(command, pruned_run, tiny_models, tmp_path):
    status, _, err = command(
        "apply", pruned_run / "plan.json", tiny_models["llama"], "--output", tmp_path / "again"
    )
    assert status == 0, err
    again, pruned = open_checkpoint(tmp_path / "again"), open_checkpoint(pruned_run / "model")
    assert again.fingerprint() == pruned.fingerprint()


def test_a_finished_run_is_shown_again_and_refused_without_resume(
    command, pruned_run, tiny_models, calibration_file
):
    arguments = ["prune", tiny_models["llama"], "--target", "0.8", "--output", pruned_run]
    arguments += ["--calibration", calibration_file, *SMALL, "--json"]
    status, out, err = command(*arguments, "--resume")
    assert status == 0, err
    assert json.loads(out)["parameters_after"] == open_checkpoint(pruned_run / "model").num_parameters
    status, out, err = command(*arguments)
    assert (status, out) == (1, "")
    assert "--resume goes on with the run in it" in err
    status, out, err = command(*arguments, "--resume", "--seed", "3")
    assert (status, out) == (1, "")
    assert "seed is 3, the run was started with 0" in err


# Settings from a file


def test_settings_come_from_a_file_and_the_command_line_wins(
    command, tiny_models, calibration_file, tmp_path
):
    settings = {
        "model": str(tiny_models["llama"]),
        "target": 0.9,
        "output": str(tmp_path / "from-file"),
        "calibration": str(calibration_file),
        "iterations": 4,
        "num_sequences": 4,
        "sequence_length": 16,
        "seed": 5,
        "pack": True,
    }
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    status, out, err = command(
        "prune", "--config", path, "--output", tmp_path / "run", "--seed", "6", "--json"
    )
    assert status == 0, err
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    # prefix_bos: by what the tokenizer does
    given = PruneConfig(**(settings | {"output": str(tmp_path / "run"), "seed": 6, "prefix_bos": False}))
    assert saved == dataclasses.asdict(resolve(given, num_layers=4)[0])  # with what the method decides
    assert json.loads(out)["parameters_target"] == int(0.9 * json.loads(out)["parameters_before"])
    assert not (tmp_path / "from-file").exists()


def test_the_command_line_wins_wherever_the_settings_file_stands(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model: from-file\nseed: 5\ntarget: 0.5\n")
    for place in ([], ["--config", str(path)]), (["--config", str(path)], []), ([], [f"--config={path}"]):
        line = ["prune", *place[0], "given", "--output", "x", "--seed", "6", *place[1]]
        parsed = cli.build_parser().parse_args(cli._config_first(line)).prune
        assert (parsed.model, parsed.seed, parsed.target) == ("given", 6, 0.5)


def test_the_saved_config_of_a_run_is_such_a_file(command, pruned_run, tmp_path):
    status, _, err = command("prune", "--config", pruned_run / "config.yaml", "--output", tmp_path / "run")
    assert status == 0, err
    first, second = (PruningPlan.load(run / "plan.json") for run in (pruned_run, tmp_path / "run"))
    assert first.hash == second.hash


@pytest.mark.parametrize(
    ("line", "named"), [("iteration: 4", "iteration"), ("iterations: many", "iterations"), ("- 1", "")]
)
def test_what_is_wrong_in_a_settings_file_is_named(command, tiny_models, tmp_path, line, named):
    path = tmp_path / "settings.yaml"
    path.write_text(f"{line}\n")
    status, out, err = command(
        "prune", "--config", path, tiny_models["llama"], "--target", "0.8", "--output", tmp_path / "run"
    )
    assert (status, out) == (2, "")
    assert named in err
    assert not (tmp_path / "run").exists()


# Errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("evaluate",),
        ("prune", "--target", "0.8", "--output", "never"),
        ("apply", "--output", "never"),
        ("apply", "plan.json", "--output", "never"),
    ],
)
def test_a_missing_model_is_wrong_usage(command, arguments):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert re.search(r"missing argument: (PLAN )?MODEL", err)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trim",),
        ("prune", "m", "--output", "never"),  # no target
        ("prune", "m", "--target", "0.8"),  # no output
        ("prune", "m", "--target", "0.8", "--output", "never", "--iterations", "4.5"),
        ("prune", "m", "--target", "0.8", "--output", "never", "--normalize", "softmax"),
        ("inspect", "m", "--verbose"),
    ],
)
def test_wrong_usage(command, arguments):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err
    assert "Traceback" not in err
    assert not Path("never").exists()


def test_an_error_is_one_line_and_status_1(command, tmp_path, tiny_models):
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    status, out, err = command("inspect", tmp_path / "model", "--json")
    assert (status, out) == (1, "")
    assert err.startswith("adapt-pruner: error: ")
    assert "not a safetensors file or truncated" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--target", "2.5B"), "above the current size: expected"),
        (("--target", "1e-9"), "below what one unit per layer leaves: expected"),
        (("--target", "lots"), "target is 'lots', expected a fraction in (0, 1] or a count"),
        (("--target", "0.8", "--iterations", "0"), "iterations is 0, expected at least 1"),
        (("--target", "0.8", "--amplitude", "-1"), "amplitude is -1.0, expected finite, at least 0"),
    ],
)
def test_values_that_make_no_sense(command, tiny_models, tmp_path, settings, message):
    status, out, err = command("prune", tiny_models["llama"], "--output", tmp_path / "run", *settings)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"without config\.json"):
        cli.main(["inspect", str(tmp_path), "--debug"])


def test_a_plan_of_another_model_is_refused(command, plan_file, tiny_models, tmp_path):
    status, out, err = command("apply", plan_file, tiny_models["mistral"], "--output", tmp_path / "pruned")
    assert (status, out) == (1, "")
    assert "the plan was made for by hand, whose config" in err
    assert not (tmp_path / "pruned").exists()


def test_interrupting_says_how_to_go_on(command, monkeypatch, tiny_models):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUN, "inspect", interrupt)
    status, out, err = command("inspect", tiny_models["llama"])
    assert (status, out) == (130, "")
    assert "--resume" in err


def test_warnings_are_one_line_on_stderr(command, monkeypatch, tiny_models):
    def warn(arguments):
        warnings.warn("too little text", stacklevel=1)
        return {"a": 1}, lambda console: None

    monkeypatch.setitem(cli._RUN, "inspect", warn)
    status, out, err = command("inspect", tiny_models["llama"], "--json")
    assert (status, json.loads(out)) == (0, {"a": 1})
    assert err == "adapt-pruner: warning: too little text\n"


# Help


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("prune", PruneConfig),
        ("apply", ApplyConfig),
        ("verify", VerifyConfig),
        ("evaluate", EvaluateConfig),
        ("compare", CompareConfig),
        ("inspect", InspectConfig),
        ("bench", BenchConfig),
        ("methods", None),
        ("families", None),
        ("doctor", None),
        ("demo", None),
    ],
)
def test_help_mentions_every_setting(command, name, config):
    status, out, _ = command(name, "--help")
    assert status == 0
    for field in dataclasses.fields(config) if config else ():
        positional = field.name in (("models",) if name == "compare" else ("model", "plan", "suite"))
        wanted = field.name if positional else "--" + field.name.replace("_", "-")
        assert re.search(rf"(?<![\w-]){wanted}(?![\w-])", out), wanted
    assert "--json" in out
    assert "--debug" in out


def test_help_describes_commands_and_settings(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in cli._COMMANDS:
        assert re.search(rf"^\s+{name}\s+\w+", out, re.MULTILINE), name
    text = " ".join(command("prune", "--help")[1].split())
    assert "prune a model to a parameter budget" in text
    assert "calibration sequences drawn anew for each iteration" in text
    assert "default: 0.02" in text


def test_version(command):
    from adapt_pruner import __version__

    status, out, _ = command("--version")
    assert status == 0
    assert __version__ in out
