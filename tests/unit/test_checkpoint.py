"""Checkpoints on disk: what is refused and why, and writes that happen completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, make_model

from adapt_pruner import checkpoint, output
from adapt_pruner.checkpoint import (
    CheckpointError,
    config_hash,
    copy_side_files,
    open_checkpoint,
    read_header,
    write_json,
    write_text,
)
from adapt_pruner.output import atomic_directory, require_free_space, resumable_directory

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path, tiny_models) -> Path:
    """A model directory that a test may damage."""
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def write_safetensors(path: Path, header, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Reading


def test_headers_are_those_of_the_model(tiny_models):
    opened = open_checkpoint(tiny_models["llama"])
    reference = make_model("llama")
    expected = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    assert {name: info.shape for name, info in opened.tensors.items()} == expected
    assert opened.num_parameters == sum(p.numel() for p in reference.parameters())
    assert opened.num_bytes == 4 * opened.num_parameters
    assert {info.dtype for info in opened.tensors.values()} == {"F32"}
    assert opened.config["model_type"] == "llama"


def test_byte_ranges_hold_the_tensors(tiny_models):
    opened = open_checkpoint(str(tiny_models["qwen2"]))
    for name, value in load_file(tiny_models["qwen2"] / WEIGHTS).items():
        info = opened.tensors[name]
        data = info.shard.read_bytes()[info.start : info.end]
        assert data == value.numpy().tobytes(), name


def test_shards_hold_the_same_model_as_one_file(sharded, tiny_models):
    one, many = open_checkpoint(tiny_models["llama"]), open_checkpoint(sharded)
    assert {n: (i.dtype, i.shape) for n, i in many.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in one.tensors.items()
    }
    assert many.fingerprint() == one.fingerprint()


def test_dtype_of_the_checkpoint(tmp_path):
    make_model("mistral", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    opened = open_checkpoint(tmp_path / "model")
    assert {info.dtype for info in opened.tensors.values()} == {"BF16"}
    assert opened.num_bytes == 2 * opened.num_parameters


def test_a_tied_head_that_is_stored_twice_counts_once(model):
    before = open_checkpoint(model)
    fingerprint = before.fingerprint()
    assert before.config["tie_word_embeddings"]
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    after = open_checkpoint(model)
    assert after.num_parameters == before.num_parameters
    assert after.fingerprint() == fingerprint


def test_an_untied_head_counts(tmp_path):
    make_model("llama", tied=False).save_pretrained(tmp_path / "model")
    opened = open_checkpoint(tmp_path / "model")
    assert opened.tensors["lm_head.weight"].shape == (VOCABULARY, 48)
    assert opened.num_parameters == sum(p.numel() for p in make_model("llama", tied=False).parameters())


# Refusals


def test_a_directory_without_config(model):
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist; expected a Hugging Face model"):
        open_checkpoint(model)
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not exist"):
        open_checkpoint(model / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json is not valid JSON"),
        (b"", r"config\.json is not valid JSON"),
        (b"\xff\xfe\x00", r"config\.json is not valid JSON"),
        (b"[1]", r"config\.json: expected a JSON object, found list"),
    ],
)
def test_a_config_that_is_not_a_json_object(model, content, message):
    (model / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


def test_a_quantised_model(model):
    edit_json(
        model / "config.json",
        lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    with pytest.raises(CheckpointError, match=r"is quantised \(gptq\); pruning needs fp32, fp16 or bf16"):
        open_checkpoint(model)


@pytest.mark.parametrize("value", ["gptq", ["gptq"], 4])
def test_a_quantisation_that_is_no_object(model, value):
    edit_json(model / "config.json", lambda c: c.update(quantization_config=value))
    with pytest.raises(CheckpointError, match=f"is quantised \\({re.escape(repr(value))}\\)"):
        open_checkpoint(model)


def test_no_weights(model):
    (model / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"expected {WEIGHTS} or {INDEX}, found neither$"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_only_pickled_weights_which_are_not_loaded(model, name):
    (model / WEIGHTS).unlink()
    (model / name).write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=f"found only pickled weights .*{name}.*never loaded"):
        open_checkpoint(model)


def test_missing_shards_are_named_and_counted(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    for shard in shards[:2]:
        shard.unlink()
    with pytest.raises(CheckpointError, match=f"2 of {len(shards)} shards in .* are missing") as caught:
        open_checkpoint(sharded)
    assert shards[0].name in str(caught.value)
    assert shards[2].name not in str(caught.value)


def test_an_index_that_names_an_absent_tensor(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"model.layers.9.weight": shard}))
    with pytest.raises(
        CheckpointError, match=r"names tensors that no shard has: \['model\.layers\.9\.weight'"
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_leads_out_of_the_directory(sharded, name):
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="names files outside the directory"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="tensors are in more than one shard"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}])
def test_an_index_without_tensors(sharded, index):
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX} names no tensor"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [[WEIGHTS], WEIGHTS, {"lm_head.weight": 3}, None])
def test_an_index_that_is_none(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"{INDEX}: weight_map is .*, expected files of tensors"):
        open_checkpoint(sharded)


def test_json_that_is_nested_too_deep(model):
    (model / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON: maximum recursion depth"):
        open_checkpoint(model)


@pytest.mark.parametrize("cut", [1, 1000, 40_000])
def test_a_truncated_shard_names_both_sizes(sharded, cut):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-cut])
    with pytest.raises(
        CheckpointError,
        match=f"{shard.name}: truncated or damaged: {len(data) - cut} bytes, its header says {len(data)}",
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_shard_cut_in_its_header(model, size):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=rf"{WEIGHTS}: not a safetensors file or truncated: .* in {size}$"
    ):
        open_checkpoint(model)


def test_a_file_longer_than_its_header_says(model):
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(model)


def test_a_web_page_in_place_of_the_weights(model):
    (model / WEIGHTS).write_text("<!DOCTYPE html><title>404 Not Found</title>")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json, but long enough", "the safetensors header is not JSON"),
        (b"\xff\xfe\xfd\xfc\xfb", "the safetensors header is not JSON"),
        ([1, 2], "the safetensors header is damaged"),
        ({"a": 1}, "the safetensors header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "the safetensors header is damaged: KeyError"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, "the safetensors header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, "the safetensors header is damaged"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            r"tensor a of F32 \(2,\) has 4 bytes of data",
        ),
        (
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
            r"the safetensors header is damaged: .* tensor 'a' has .*\[-4, 0\]",
        ),
        (
            {"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}},
            "the safetensors header is damaged: .* 3",
        ),
        ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, r"the safetensors header is damaged"),
        ({"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}, r"the safetensors header is damaged"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, r".* damaged: .*\[-1, -1\]"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, r".* damaged: .*\[True\]"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, r".* damaged: .*\[0.0, 4.0\]"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [4, 0]}}, r"tensor a of F4 \(1,\) has -4 bytes"),
        ({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, r".* damaged: .*'\\ud800'"),
        (b"[" * 200_000, "the safetensors header is not JSON: maximum recursion depth"),
        (b'{"a": 1, "b": 2, "a": 3}', "the safetensors header is not JSON: 'a' is there twice"),
        ('{"a": 1}'.encode("utf-16"), "the safetensors header is not JSON: 'utf-8' codec"),
    ],
)
def test_a_damaged_header(tmp_path, header, message):
    path = tmp_path / WEIGHTS
    write_safetensors(path, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: {message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (
            [(0, 8), (4, 12)],
            "tensor b begins at byte 4 of the data, expected 8, where the one before it ends",
        ),
        ([(0, 8), (0, 8)], "tensor b begins at byte 0 of the data, expected 8"),
        ([(0, 4), (8, 12)], "tensor b begins at byte 8 of the data, expected 4"),
        ([(4, 8), (8, 12)], "tensor a begins at byte 4 of the data, expected 0"),
    ],
)
def test_tensors_that_overlap_or_leave_holes(tmp_path, ranges, message):
    path = tmp_path / WEIGHTS
    header = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in zip("ab", ranges, strict=True)
    }
    write_safetensors(path, header, b"\0" * max(end for _, end in ranges))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: {message}"):
        read_header(path)


def test_empty_tensors_leave_no_holes(tmp_path):
    save_file({n: torch.zeros(s) for n, s in {"a": (2,), "b": (0, 4), "c": (3,)}.items()}, tmp_path / WEIGHTS)
    assert {name: info.shape for name, info in read_header(tmp_path / WEIGHTS).items()}["b"] == (0, 4)


def test_a_header_that_safetensors_would_not_read(tmp_path):
    path = tmp_path / WEIGHTS
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**32))
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match="header of 4294967296 bytes, expected at most 100000000"):
        read_header(path)


def test_a_file_without_tensors_has_none(tmp_path):
    write_safetensors(tmp_path / WEIGHTS, {"__metadata__": {"format": "pt"}})
    assert read_header(tmp_path / WEIGHTS) == {}


@pytest.mark.parametrize(("dtype", "size"), [("I8", 1), ("U8", 1), ("I64", 8), ("F8_E4M3", 1), ("F4", 1)])
def test_weights_that_are_not_plain_floats(model, dtype, size):
    header = {"model.odd.weight": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}
    write_safetensors(model / WEIGHTS, header, b"\0" * (3 * size))
    with pytest.raises(
        CheckpointError, match=rf"tensor model\.odd\.weight has dtype {dtype}, expected one of"
    ):
        open_checkpoint(model)


def test_errors_are_value_errors():
    assert issubclass(CheckpointError, ValueError)


# Fingerprint and config hash


def test_a_copy_has_the_same_fingerprint(model, tiny_models):
    assert open_checkpoint(model).fingerprint() == open_checkpoint(tiny_models["llama"]).fingerprint()


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_a_changed_weight_changes_the_fingerprint(model, name, position):
    before = open_checkpoint(model)
    info = before.tensors[name]
    data = bytearray((model / WEIGHTS).read_bytes())
    data[info.start if position == "start" else info.end - 1] ^= 1
    fingerprint = before.fingerprint()
    (model / WEIGHTS).write_bytes(data)
    assert open_checkpoint(model).fingerprint() != fingerprint


def test_name_shape_and_dtype_are_part_of_the_fingerprint(tmp_path):
    seen = set()
    for i, header in enumerate(
        (
            {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
            {"b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
            {"a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}},
            {"a": {"dtype": "F16", "shape": [2, 6], "data_offsets": [0, 24]}},
        )
    ):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        write_safetensors(directory / WEIGHTS, header, b"\0" * 24)
        seen.add(open_checkpoint(directory).fingerprint())
    assert len(seen) == 4


def test_the_config_hash_ignores_what_differs_between_copies():
    config = {"model_type": "llama", "hidden_size": 48}
    volatile = {
        "transformers_version": "5",
        "_name_or_path": "x",
        "dtype": "float32",
        "torch_dtype": "float16",
    }
    assert config_hash(config) == config_hash(config | volatile)
    assert config_hash(config) == config_hash(dict(reversed(config.items())))
    assert config_hash(config) != config_hash(config | {"hidden_size": 49})


# Writing


def test_a_directory_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as partial:
        (partial / "a.txt").write_text("a")
        (partial / "folder").mkdir()
        (partial / "folder" / "b.txt").write_text("b")
        assert not target.exists()
        assert partial.parent == target.parent  # the same file system, or the rename would be a copy
    assert (target / "a.txt").read_text() == "a"
    assert (target / "folder" / "b.txt").read_text() == "b"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_directory_that_failed(tmp_path, error):
    def fail() -> None:
        with atomic_directory(tmp_path / "model") as partial:
            (partial / "a.txt").write_text("a")
            raise error("on the way")

    with pytest.raises(error, match="on the way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_target_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "a.txt").write_text("a")
    assert (tmp_path / "model" / "a.txt").read_text() == "a"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_target_in_use_is_refused_and_untouched(tmp_path, kind):
    target = tmp_path / "model"
    precious = target
    if kind == "directory":
        target.mkdir()
        precious = target / "thesis.txt"
    precious.write_text("precious")

    def write() -> None:
        with atomic_directory(target):
            pytest.fail("the block ran")

    with pytest.raises(FileExistsError, match="exists and is not an empty directory; nothing was written"):
        write()
    assert precious.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture(params=["atomic", "resumable"])
def written_directory(request):
    return atomic_directory if request.param == "atomic" else lambda path: resumable_directory(path, "key")


@pytest.mark.parametrize("kind", ["link", "dangling link", "mount point", "."])
def test_a_target_that_no_directory_can_replace(tmp_path, monkeypatch, kind, written_directory):
    target = Path() if kind == "." else tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    if kind.endswith("link"):
        target.symlink_to(tmp_path / "elsewhere")
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
    elif kind == "mount point":
        target.mkdir()
        monkeypatch.setattr(output, "_mount_of", str)
    before = sorted(tmp_path.iterdir())

    def write() -> None:
        with written_directory(target):
            pytest.fail("the block ran")

    expected = "'.' ends in no name" if kind == "." else f"{target} is a .*{kind.split()[-1]}.*; nothing was"
    with pytest.raises(ValueError if kind == "." else FileExistsError, match=expected):
        write()
    assert sorted(tmp_path.iterdir()) == before


def test_a_bind_mount_is_a_mount_point(tmp_path):
    """It has the device of its parent, and no rename can replace it."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    check = "import sys, pathlib, adapt_pruner.output as o; o.require_empty(pathlib.Path(sys.argv[1]))"
    inside = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2"'
    command = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces of mounts")
    paths = [tmp_path / "source", tmp_path / "target", sys.executable, check]
    done = subprocess.run([*command, inside, "sh", *map(str, paths)], capture_output=True, text=True)
    assert f"FileExistsError: {tmp_path / 'target'} is a mount point" in done.stderr


def test_a_directory_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch, written_directory):
    done = []
    rename = Path.rename

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("partial" if path.name.startswith(".model.") else path.name)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(output.os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    with written_directory(tmp_path / "model") as partial:
        (partial / "folder").mkdir()
        (partial / "folder" / "a.txt").write_text("a")
    assert sorted(done[:2]) == ["a.txt", "folder"]
    assert done[2:] == ["partial", "rename", tmp_path.name]


def test_what_another_process_publishes_meanwhile(tmp_path, monkeypatch):
    """Between the listing and the lock: it is left alone. Before our own lock: nothing is written into it."""
    listed = output._resumable_directories

    def published(target: Path) -> list[Path]:
        return [*listed(target), tmp_path / ".model.resumable-gone"]

    with monkeypatch.context() as patch:
        patch.setattr(output, "_resumable_directories", published)
        with resumable_directory(tmp_path / "model", "key") as partial:
            assert partial.is_dir()
    shutil.rmtree(tmp_path / "model")

    lock = output.fcntl.flock

    def locked(descriptor: int, operation: int) -> None:
        (tmp_path / ".model.resumable-key").rename(tmp_path / "published")
        lock(descriptor, operation)

    def write() -> None:
        with resumable_directory(tmp_path / "model", "key"):
            pytest.fail("the block ran")

    monkeypatch.setattr(output.fcntl, "flock", locked)
    with pytest.raises(BlockingIOError, match="another process is writing"):
        write()
    assert list(tmp_path.iterdir()) == [tmp_path / "published"]


def test_a_link_in_place_of_what_was_left(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".model.resumable-key").symlink_to("precious")

    def write() -> None:
        with resumable_directory(tmp_path / "model", "key"):
            pytest.fail("the block ran")

    with pytest.raises(NotADirectoryError, match="resumable-key"):
        write()
    assert (tmp_path / "precious").is_dir()


def test_a_target_that_fills_up_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "model"

    def write() -> None:
        with atomic_directory(target) as partial:
            (partial / "a.txt").write_text("a")
            target.mkdir()
            (target / "thesis.txt").write_text("precious")

    with pytest.raises(OSError, match="not empty"):
        write()
    assert [file.name for file in target.iterdir()] == ["thesis.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("first, and longer", "second", "naïve ↦ ü"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_text_until_the_new_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    seen = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: seen.append(path.read_text()))
    write_text(path, "new")
    assert seen == ["old"]


def test_json_ends_with_a_newline_and_comes_back(tmp_path):
    value = {"a": [1, 0.1 + 0.2, None], "b": "ü"}
    write_json(tmp_path / "value.json", value)
    assert (tmp_path / "value.json").read_text().endswith("}\n")
    assert json.loads((tmp_path / "value.json").read_text()) == value


def test_too_little_space_names_what_is_needed_and_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    needed = 2 * free + 10**12
    with pytest.raises(OSError, match="not enough disk space") as caught:
        require_free_space(tmp_path / "not" / "yet" / "there", needed)
    assert caught.value.errno == errno.ENOSPC
    assert f"{needed:,} bytes needed" in str(caught.value)
    assert " free" in str(caught.value)


def test_the_free_space_is_that_of_the_target(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return shutil._ntuple_diskusage(100, 40, 60)

    monkeypatch.setattr(output.shutil, "disk_usage", usage)
    require_free_space(tmp_path / "new" / "model", 60)
    with pytest.raises(OSError, match="61 bytes needed, 60 free"):
        require_free_space(tmp_path / "new" / "model", 61)
    assert asked == [tmp_path, tmp_path]


def test_side_files_are_copied_but_never_overwritten(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    copied = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "merges.txt",
        "vocab.json",
    ]
    copied += ["spiece.model", "chat_template.jinja", "generation_config.json"]
    for name in [*copied, "config.json", "README.md", WEIGHTS, "pytorch_model.bin", "training_args.bin"]:
        (source / name).write_text(f"source {name}")
    (target / "generation_config.json").write_text("own")
    copy_side_files(source, target)
    assert {file.name for file in target.iterdir()} == set(copied)
    assert (target / "generation_config.json").read_text() == "own"
    assert (target / "merges.txt").read_text() == "source merges.txt"
