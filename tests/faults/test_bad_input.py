"""Bad input to `prune`: a clear message before any work is lost, and nothing on disk damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

from adapt_pruner import PruneConfig, prune
from adapt_pruner.cli import main
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.kernels import NonFiniteError

SETTINGS = {"iterations": 4, "num_sequences": 4, "sequence_length": 16, "device": "cpu"}


@pytest.fixture
def model(tiny_models, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_models["llama"], tmp_path / "model")


@pytest.fixture
def config(model, calibration_file, tmp_path):
    def make(**changes):
        settings = {
            "model": str(model), "target": 0.7, "output": str(tmp_path / "run"),
            "calibration": str(calibration_file), **SETTINGS, **changes,
        }  # fmt: skip
        return PruneConfig(**settings)

    return make


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def snapshot(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def expect(config, match, error=ValueError):
    """The error says what is wrong, no output directory is left behind, and the model is as it was."""
    before = snapshot(config.model)
    with pytest.raises(error, match=match):
        prune(config)
    assert snapshot(config.model) == before
    assert not Path(config.output).exists()


def test_unknown_architecture(config, model):
    edit_config(model, model_type="gpt_neo")
    expect(config(), r"unknown architecture: model_type is 'gpt_neo', expected one of \[.*'llama'.*'qwen2'")


def test_quantised_checkpoint(config, model):
    edit_config(model, quantization_config={"quant_method": "awq", "bits": 4})
    expect(config(), r"quantised \(awq\); pruning needs fp32, fp16 or bf16")


def test_missing_shard(config, model):
    shutil.rmtree(model)
    make_model("llama").save_pretrained(model, max_shard_size="50KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    expect(config(), f"shards in model.safetensors.index.json are missing: .*{shard.name}")


def test_truncated_shard(config, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    expect(config(), f"{weights.name}: truncated or damaged: {weights.stat().st_size} bytes, its header says")


def test_pickled_weights_are_not_loaded(config, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    expect(config(), r"pickled weights \['pytorch_model.bin'\], which are never loaded")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(config, model, value):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expect(config(), "1 of 4224 values of model.layers.2.mlp.up_proj.weight are NaN or inf")


def test_activations_that_are_not_finite_leave_no_plan(config, monkeypatch):
    def load_and_plant(*args, **options):
        loaded = load_model(*args, **options)
        loaded.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * float("inf"))
        return loaded

    monkeypatch.setattr("adapt_pruner.engines.in_memory.load_model", load_and_plant)
    with pytest.raises(NonFiniteError, match=r"^layer 1: the cosine between its input and output is nan"):
        prune(config())
    left = {path.name for path in Path(config().output).iterdir()}
    assert left == {".lock", "config.yaml", "environment.json", "log.jsonl", "state"}


def test_tensors_that_do_not_fit_the_config(config, model):
    edit_config(model, intermediate_size=96)
    expect(config(), r"gate_proj.weight has shape \(88, 48\), the config asks for 96 in dimension 0")
    edit_config(model, intermediate_size=88, num_hidden_layers=5)
    expect(config(), r"tensor model.layers.4.self_attn.q_proj.weight is missing")


@pytest.mark.parametrize("target", ["500M", "0.0001", "1000"])
def test_target_out_of_reach(config, target):
    relation = "above the current size" if target == "500M" else "below what one unit per layer leaves"
    expect(
        config(target=target),
        f"target {target} of all is [0-9,]+ parameters, {relation}: expected [0-9,]+ to",
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target": "lots"}, "target is 'lots', expected a fraction in"),
        ({"target": -0.5}, "target is -0.5, expected"),
        ({"iterations": 0}, "iterations is 0, expected at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1, expected at least 2"),
        ({"amplitude": float("nan")}, "amplitude is nan"),
        ({"dtype": "int4"}, "dtype is 'int4', expected one of"),
    ],
)
def test_settings_are_checked_when_made(config, changes, match):
    with pytest.raises(ValueError, match=match):
        config(**changes)


def test_output_directory_that_is_not_empty(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="run is not empty"):
        prune(config())
    assert snapshot(tmp_path / "run") == {"thesis.txt": b"precious"}
    with pytest.raises(ValueError, match="is not a run directory"):
        prune(config(resume=True))
    assert snapshot(tmp_path / "run") == {"thesis.txt": b"precious"}


def test_resuming_with_other_settings(config):
    prune(config())
    with pytest.raises(ValueError, match=r"target is 0.6, the run was started with 0.7"):
        prune(config(target=0.6, resume=True))


def test_resuming_with_another_model(config, model):
    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(config(), on_iteration=interrupt)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot resume .*model has changed since the run was started"):
        prune(config(resume=True))


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_no_calibration_text(config, tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    expect(config(calibration=str(tmp_path / "empty.txt")), "empty.txt")


def test_too_little_calibration_text(config, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    expect(config(calibration=str(tmp_path / "short.txt")), "64")


def test_wrong_column(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "words"}) + "\n")
    expect(config(calibration=str(tmp_path / "rows.jsonl")), "body")


def test_vocabulary_mismatch(config, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit_config(model, vocab_size=100)
    expect(config(), "tokenizer produces ids up to 259, but the model's vocabulary has 100")


def test_device_that_is_not_there(config):
    missing = "cuda:7" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device is '{missing}', which is not usable here"):
        prune(config(device=missing))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs more rights than this user has")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_disk_too_small_is_noticed_first(config, small_disk):
    with pytest.raises(OSError, match=r"not enough disk space for the pruned model: [0-9,]+ bytes needed"):
        prune(config(output=str(small_disk / "run")))


def test_disk_that_fills_up_meanwhile(config, small_disk, monkeypatch):
    monkeypatch.setattr("adapt_pruner.pruner.require_free_space", lambda *_: None)
    (small_disk / "ballast").write_bytes(b"0" * 700_000)
    output = small_disk / "run"
    with pytest.raises(OSError, match=r"could not write .*No space left on device"):
        prune(config(output=str(output)))
    assert not (output / "model").exists()
    (small_disk / "ballast").unlink()
    result = prune(config(output=str(output), resume=True))
    assert (result.model_directory / "model.safetensors").exists()


def test_the_command_line_reports_in_one_line(config, model, capsys):
    edit_config(model, model_type="gpt_neo")
    settings = config()
    assert main(["prune", settings.model, "--target", "0.8", "--output", settings.output]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "adapt-pruner: error: unknown architecture" in captured.err
    assert "Traceback" not in captured.err
