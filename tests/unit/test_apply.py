"""`apply_plan`: file to file, with the bytes of the live surgery, and without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SPARSE_FAMILIES, make_model
from transformers import AutoConfig

from adapt_pruner import PruningPlan, apply_plan, shard_io
from adapt_pruner.checkpoint import config_hash, open_checkpoint
from adapt_pruner.cli import main
from adapt_pruner.config import ApplyConfig
from adapt_pruner.families import by_expert, find_family, layer_widths, unit_counts
from adapt_pruner.modeling.conversion import keep_config_layers, pruned_config
from adapt_pruner.plan import pruned_members
from adapt_pruner.surgery import gather_members

ALL = (*FAMILIES, *SPARSE_FAMILIES)


def make_plan(
    directory, *, seed=0, granularity="kv_group", mlp="channel", removed=(), uniform=False, share=0.6
):
    """A plan with random kept units: as many per lane as the unit kind wants."""
    checkpoint = open_checkpoint(directory)
    family = find_family(checkpoint.config["model_type"]).with_granularity(granularity, mlp)
    base, draw = layer_widths(checkpoint.config), np.random.default_rng(seed)
    keep = []
    for widths in base:
        layer = {}
        for kind in family.kinds_in(widths):
            lanes = kind.lanes(widths)
            units = kind.count(widths) // lanes
            kept = max(1, int(units * (share if uniform else draw.uniform(0.3, 1))))
            layer[kind.name] = np.concatenate(
                [lane * units + np.sort(draw.choice(units, kept, replace=False)) for lane in range(lanes)]
            )
        keep.append(layer)
    return PruningPlan(
        "base", config_hash(checkpoint.config), checkpoint.fingerprint(), family.name, {},
        unit_counts(family, base), tuple(keep), tuple(removed),
    )  # fmt: skip


def live_surgery(plan, directory):
    """The tensors that the modules' surgery leaves, under the names and numbers of the pruned model."""
    checkpoint = open_checkpoint(directory)
    family = find_family(checkpoint.config["model_type"])
    family = family.with_granularity(plan.granularity, plan.mlp_granularity)
    base = layer_widths(checkpoint.config)
    tensors = {}
    for shard in {info.shard for info in checkpoint.tensors.values()}:
        tensors |= load_file(shard)
    tensors = {name: tensors[name] for name in checkpoint.tensors}
    for name, (members, keep) in pruned_members(plan.keep_indices, family, base, tensors).items():
        tensors[name] = gather_members(tensors, members, keep)[name]
    for layer, widths in enumerate(base):
        for kind in family.kinds_in(widths):
            if kind.name == "expert":
                parts = by_expert(family.unit_tensors(kind, layer, widths, tensors))
                parts.pop(None, None)
                old = {e: [tensors.pop(t.name) for t in part] for e, part in parts.items()}
                for number, expert in enumerate(plan.keep_indices[layer]["expert"].tolist() if parts else ()):
                    tensors |= {t.name: value for t, value in zip(parts[number], old[expert], strict=True)}
    result = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            if int(layer) in plan.removed_layers:
                continue
            name = f"model.layers.{plan.kept_layers.index(int(layer))}.{rest}"
        result[name] = tensor
    return result


def check(plan, directory, output, *, config_bytes=True, **options):
    """The weights are the bytes that safetensors writes, the config is what transformers makes of it."""
    expected = live_surgery(plan, directory)
    apply_plan(plan, directory, output, **options)
    files = sorted(output.glob("*.safetensors"))
    assert sum(len(load_file(file)) for file in files) == len(expected)
    for file in files:
        part = {name: expected[name].contiguous() for name in load_file(file)}
        save_file(part, output.parent / "expected.safetensors", metadata={"format": "pt"})
        assert file.read_bytes() == (output.parent / "expected.safetensors").read_bytes()
    config = AutoConfig.from_pretrained(directory)
    checkpoint = open_checkpoint(directory)
    family = find_family(config.model_type).with_granularity(plan.granularity, plan.mlp_granularity)
    keep_config_layers(config, plan.kept_layers)
    config = pruned_config(config, plan.widths(family, layer_widths(checkpoint.config)))
    seen = AutoConfig.from_pretrained(output)
    assert type(seen) is type(config)
    assert seen.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    if config_bytes:
        saved = output.parent / f"{output.name}-config"
        config.save_pretrained(saved)
        for file in saved.iterdir():
            assert (output / file.name).read_text() == file.read_text()
    assert shard_io.verify_checksums(open_checkpoint(output)) == len(expected)
    return files


@pytest.fixture(params=["native", "numpy"])
def engine(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(shard_io, "_engine", lambda: shard_io._copy_by_numpy)
    else:
        pytest.importorskip("adapt_pruner._io")


@pytest.mark.parametrize("family", ALL)
@pytest.mark.usefixtures("engine")
def test_every_family_has_the_bytes_of_the_live_surgery(family, tiny_models, tmp_path):
    model = tiny_models[family]
    check(make_plan(model), model, tmp_path / "a")
    check(make_plan(model, granularity="query_head", removed=(1,), seed=1), model, tmp_path / "b")
    check(make_plan(model, uniform=True, share=0.5, removed=(0, 3), seed=2), model, tmp_path / "c")
    if family in SPARSE_FAMILIES:
        check(make_plan(model, mlp="expert", seed=3), model, tmp_path / "d")


def test_shards_are_split_and_merged(tiny_models, tmp_path):
    """The input in many files of one size, the output in files of another: no byte changes."""
    many = tmp_path / "many"
    make_model("llama", tied=False).save_pretrained(many, max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 4
    plan = make_plan(many)
    assert len(check(plan, many, tmp_path / "merged")) == 1
    files = check(plan, many, tmp_path / "split", max_shard_bytes=100_000)
    assert 2 < len(files) < 9
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= 100_000
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    (whole,) = tmp_path.glob("merged/*.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in load_file(whole).values())


def test_dtypes_may_differ_and_files_are_as_safetensors_orders_them(tmp_path):
    model = make_model("qwen2", dtype=torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    model.model.layers[1].mlp.down_proj.weight.data = model.model.layers[1].mlp.down_proj.weight.data.half()
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert len({t.dtype for t in tensors.values()}) == 3
    check(make_plan(tmp_path / "model"), tmp_path / "model", tmp_path / "pruned")


@pytest.mark.usefixtures("engine")
def test_experts_that_a_checkpoint_has_as_one_tensor(tiny_models, tmp_path):
    """Each expert keeps channels of its own, or some experts stay whole, in tensors of three dimensions."""
    model = tmp_path / "model"
    model.mkdir()
    live = make_model("mixtral")
    save_file(dict(live.state_dict()) | {"lm_head.weight": torch.zeros(1)}, model / "model.safetensors")
    (model / "config.json").write_text((tiny_models["mixtral"] / "config.json").read_text())
    for number, plan in enumerate([make_plan(model), make_plan(model, mlp="expert", seed=1)]):
        check(plan, model, tmp_path / f"{number}", config_bytes=False)


@pytest.mark.parametrize("stock", ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3_moe", "phi3"])
def test_configs_that_older_tools_wrote(stock, tiny_models, tmp_path):
    """Without what newer ones spell out: which layers have a window, rotary settings; names of old."""
    for file in tiny_models[stock].iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters") or {}
    config["rope_theta"] = 5e5
    if "full_attention" in rope:
        config |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    for key in ("layer_types", "_sliding_window_pattern"):
        config.pop(key, None)
    config["torch_dtype"] = config.pop("dtype")
    if stock.startswith("qwen"):
        config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    if stock == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    model, options = tmp_path / "model", {"config_bytes": False}
    check(make_plan(model), model, tmp_path / "a", **options)
    if stock == "gemma3_text":  # an unused attribute says 3 or 6
        apply_plan(make_plan(model, removed=(1,)), model, tmp_path / "b")
        kinds = AutoConfig.from_pretrained(model).layer_types
        assert AutoConfig.from_pretrained(tmp_path / "b").layer_types == [kinds[i] for i in (0, 2, 3)]
    else:
        check(make_plan(model, removed=(1,)), model, tmp_path / "b", **options)
    check(make_plan(model, uniform=True, share=0.5), model, tmp_path / "c", **options)


@pytest.mark.usefixtures("engine")
def test_paths_that_are_no_text(tiny_models, tmp_path):
    folder = tmp_path / os.fsdecode(b"mod\xe8le")
    shutil.copytree(tiny_models["llama"], folder / "model")
    plan = make_plan(folder / "model")
    apply_plan(plan, folder / "model", folder / "pruned")
    assert shard_io.verify_checksums(open_checkpoint(folder / "pruned"))
    (folder / "short").write_bytes(b"1")
    for name, error in (("short", OSError), ("absent", FileNotFoundError)):
        piece = shard_io.Piece(folder / name, 0, 1, 0, np.array([[0, 2]]))
        with pytest.raises(error) as caught:
            shard_io._copy([(0, [piece])], None)
        assert caught.value.filename == str(folder / name)


@pytest.mark.parametrize("linked", [False, True])
def test_an_output_in_the_model_is_refused(tiny_models, tmp_path, linked):
    model = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    if linked:
        (tmp_path / "link").symlink_to(model)
    before = sorted(model.iterdir())
    output = tmp_path / ("link" if linked else "model") / "deep" / "pruned"
    with pytest.raises(
        ValueError, match=r"pruned is in the directory of the model, .*model, which is only read"
    ):
        apply_plan(make_plan(model), model, output)
    assert sorted(model.iterdir()) == before


def test_an_output_without_a_name(tiny_models, tmp_path, monkeypatch, capsys):
    make_plan(tiny_models["llama"]).save(tmp_path / "plan.json")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["apply", str(tmp_path / "plan.json"), str(tiny_models["llama"]), "--output", "."]) == 1
    assert "'.' ends in no name; expected the path of a directory to create" in capsys.readouterr().err


NEITHER = """
import sys
from adapt_pruner.cli import main
status = main(sys.argv[1:])
assert status == 0, status
assert not {"torch", "transformers", "safetensors.torch"} & set(sys.modules), sorted(sys.modules)
"""


def test_the_command_imports_neither_torch_nor_transformers(tiny_models, tmp_path):
    model, plan = tiny_models["mistral"], tmp_path / "plan.json"
    make_plan(model).save(plan)
    output = tmp_path / "out"
    for arguments in (
        ["apply", str(plan), str(model), "--output", str(output), "--max-shard-size", "50kB"],
        ["verify", str(output)],
    ):
        done = subprocess.run(
            [sys.executable, "-c", NEITHER, *arguments], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "agree with checksums.json" in done.stdout
    assert len(list(output.glob("*.safetensors"))) > 2


def test_without_the_extension_one_warning_says_so(tiny_models, tmp_path, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "adapt_pruner._io", None)
    shard_io._engine.cache_clear()
    plan = make_plan(tiny_models["llama"])
    try:
        for name in ("a", "b"):
            apply_plan(plan, tiny_models["llama"], tmp_path / name)
    finally:
        shard_io._engine.cache_clear()
    (message,) = [str(w.message) for w in recwarn if "shard I/O" in str(w.message)]
    assert message.startswith("native shard I/O cannot be used (extension not built: ")
    assert message.endswith("): numpy copies, slower")


@pytest.mark.parametrize("size", ["4", "0.5", "-1GB", "4 parsecs", "1.2.3MB", "0.1B"])
def test_a_shard_size_that_is_none(size):
    with pytest.raises(ValueError, match=f"max_shard_size is '{size}', expected a size such as 500MB or"):
        ApplyConfig("plan", "model", "output", max_shard_size=size)


# The copying itself, against plain Python.


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("buffer_bytes", [64, 1000, 2**20])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_and_checksums(buffer_bytes, seed, tmp_path):
    """Any runs, rows wider and narrower than the buffer, gaps longer than what is read through."""
    draw = np.random.default_rng(seed)
    contents = [draw.bytes(300_000), draw.bytes(200_000)]
    sources = []
    for number, content in enumerate(contents):
        sources.append(tmp_path / f"source{number}")
        sources[-1].write_bytes(content)
    tensors, expected, end = [], bytearray(b"head"), 4
    for _ in range(12):
        pieces, start = [], end
        for _ in range(draw.integers(0, 4)):
            source = int(draw.integers(2))
            rows = int(draw.choice([1, 1, 7, 40]))
            stride = int(draw.choice([8, 36, 60, 2000])) if rows > 1 else 150_000
            scale = int(draw.choice([1, 2, 4]))
            edges = np.unique(draw.integers(0, stride // scale + 1, 2 * draw.integers(1, 30))) * scale
            edges = edges[: len(edges) // 2 * 2].reshape(-1, 2)
            if not len(edges):
                continue
            runs = np.stack([edges[:, 0], edges[:, 1] - edges[:, 0]], 1)
            offset = int(draw.integers(0, len(contents[source]) - rows * stride))
            pieces.append(shard_io.Piece(sources[source], offset, rows, stride, runs))
            for row in range(rows):
                for first, length in runs:
                    begin = offset + row * stride + first
                    expected += contents[source][begin : begin + length]
        end = len(expected)
        tensors.append((start, pieces))
    target = tmp_path / "target"
    target.write_bytes(b"head".ljust(len(expected), b"\0"))
    names = sorted({p.source for _, pieces in tensors for p in pieces})
    plain = [
        (start, [(names.index(p.source), p.offset, p.rows, p.stride, p.runs) for p in pieces])
        for start, pieces in tensors
    ]
    values = shard_io._engine()([str(n) for n in names], plain, str(target), 2, buffer_bytes)
    assert target.read_bytes() == expected
    ends = [start for start, _ in tensors[1:]] + [len(expected)]
    assert values == [
        zlib.crc32(expected[start:stop]) for (start, _), stop in zip(tensors, ends, strict=True)
    ]
    target.unlink()
    assert (
        shard_io._engine()([str(n) for n in names], plain, "", 2, buffer_bytes) == values
    )  # nothing written
    assert not target.exists()


@pytest.mark.usefixtures("engine")
def test_files_that_cannot_be_read_or_written(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(100))
    runs = np.array([[0, 101]])
    with pytest.raises(OSError, match=r"file ends before the data that was expected in it.*source"):
        shard_io._engine()([str(source)], [(0, [(0, 0, 1, 0, runs)])], "", 1, 64)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        shard_io._engine()([str(tmp_path / "nowhere")], [(0, [(0, 0, 1, 0, runs)])], "", 1, 64)
    with pytest.raises(FileNotFoundError, match="target"):
        shard_io._engine()([str(source)], [(0, [(0, 0, 1, 0, runs)])], str(tmp_path / "target"), 1, 64)


SCARCE = """
import resource, sys, zlib
import numpy as np
from adapt_pruner._io import copy

source, threads, buffer_bytes, spare = sys.argv[1], *map(int, sys.argv[2:])
if spare:
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare,) * 2)
print(copy([source], [(0, [(0, 0, 1, 0, np.array([[0, 100_000]]))])], "", threads, buffer_bytes))
"""


@pytest.mark.parametrize(
    ("threads", "buffer_bytes", "spare", "status"), [(2, 2**62, 0, 1), (500, 64, 100 * 2**20, 0)]
)
def test_too_little_memory_for_buffers_or_threads(tmp_path, threads, buffer_bytes, spare, status):
    """Buffers that cannot be had are an error; threads that cannot be had are done without."""
    pytest.importorskip("adapt_pruner._io")
    source = tmp_path / "source"
    source.write_bytes(bytes(range(250)) * 400)
    done = subprocess.run(
        [sys.executable, "-c", SCARCE, str(source), *map(str, (threads, buffer_bytes, spare))],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.splitlines()[-1].startswith("MemoryError")
    else:
        assert done.stdout == f"[{zlib.crc32(source.read_bytes())}]\n"


def test_the_extension_refuses_what_is_no_piece():
    copy = pytest.importorskip("adapt_pruner._io").copy

    def refused(match, source=0, offset=0, rows=1, stride=0, runs=((0, 4),)):
        with pytest.raises(ValueError, match=match):
            copy(["/dev/null"], [(0, [(source, offset, rows, stride, np.array(runs))])], "", 1, 64)

    refused("one of the sources", source=1)
    refused("0 or more", offset=-1)
    refused("do not overlap", runs=((0, 4), (3, 4)))
    refused("1 or more bytes", runs=((0, 0),))
    refused("within a row", rows=2, stride=3)
    refused(r"\[runs, 2\]", runs=(0, 4))
