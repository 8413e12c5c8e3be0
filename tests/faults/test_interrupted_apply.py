"""`apply` that is killed, or whose files are damaged: the same bytes in the end, and the input as it was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model

from adapt_pruner import apply_plan, shard_io
from adapt_pruner.apply import _key
from adapt_pruner.checkpoint import CheckpointError, config_hash, open_checkpoint, read_header
from adapt_pruner.cli import main
from adapt_pruner.families import find_family, layer_widths, unit_counts
from adapt_pruner.plan import PruningPlan

SHARD_BYTES = 4_000_000
# Kills itself at the Nth file operation of Python, or so many seconds after it has begun the third file.
CHILD = f"""
import os, signal, sys, threading
from adapt_pruner import PruningPlan, apply_plan, shard_io

kill_at, plan, model, output = sys.argv[1:]
plan = PruningPlan.load(plan)
shard_io.BUFFER_BYTES = 4096

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

count = 0

def audit(event, arguments):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        count += 1
        if count == int(kill_at):
            kill()

write, calls = shard_io._write_shard, []

def kill_soon(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        threading.Timer(float(kill_at), kill).start()
    return write(*arguments)

if "." in kill_at:
    shard_io._write_shard = kill_soon
else:
    sys.addaudithook(audit)
apply_plan(plan, model, output, max_shard_bytes={SHARD_BYTES})
print("operations", count)
"""


def random_plan(directory, seed=0):
    checkpoint, draw = open_checkpoint(directory), np.random.default_rng(seed)
    family = find_family("llama")
    units = unit_counts(family, layer_widths(checkpoint.config))
    keep = tuple(
        {kind: np.sort(draw.choice(n, n * 2 // 3, replace=False)) for kind, n in layer.items()}
        for layer in units
    )
    return PruningPlan(
        "base", config_hash(checkpoint.config), checkpoint.fingerprint(), "llama", {}, units, keep
    )


def contents(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir()}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model of 36 MB, a plan, and what comes out when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("interrupted")
    make_model("llama", hidden_size=384, intermediate_size=1536, tied=False).save_pretrained(
        folder / "model", max_shard_size="9MB"
    )
    (folder / "model" / "tokenizer.json").write_text("{}" + " " * 100_000)
    plan = random_plan(folder / "model")
    plan.save(folder / "plan.json")
    apply_plan(plan, folder / "model", folder / "expected", max_shard_bytes=SHARD_BYTES)
    expected = contents(folder / "expected")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 4
    return folder / "model", folder / "plan.json", expected


def run(kill_at, case, output):
    model, plan, _ = case
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(kill_at), str(plan), str(model), str(output)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def finish(case, output):
    """The same call again, here: it ends with the same bytes and leaves nothing else."""
    model, plan, expected = case
    apply_plan(PruningPlan.load(plan), model, output, max_shard_bytes=SHARD_BYTES)
    assert contents(output) == expected
    assert list(output.parent.iterdir()) == [output]


def test_killed_at_any_file_operation(case, tmp_path):
    before = contents(case[0])
    whole = run(0, case, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    operations = int(whole.stdout.split()[-1])
    assert operations > 40
    shutil.rmtree(tmp_path / "whole")
    draw = random.Random(0)
    # One after the other in the same place: each goes on with what the one before it has left.
    killed = 0
    for kill_at in [*sorted(draw.sample(range(1, operations), 6)), operations]:
        done = run(kill_at, case, tmp_path / "output")
        if done.returncode == 0:  # so much was done before that this operation was never reached
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "output").exists()
        killed += 1
    assert killed >= 4
    if (tmp_path / "output").exists():
        assert contents(tmp_path / "output") == case[2]
    else:
        finish(case, tmp_path / "output")
    assert contents(case[0]) == before


def test_killed_at_any_time(case, tmp_path):
    """Most of these are in the middle of a copy, which is in steps of 4 KiB here."""
    before = contents(case[0])
    draw, unfinished = random.Random(1), 0
    for number in range(5):
        output = tmp_path / f"{number}" / "output"
        done = run(f"{draw.uniform(0, 0.02):.4f}", case, output)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if output.exists():  # it was done before
            assert contents(output) == case[2]
            continue
        unfinished += 1
        (partial,) = output.parent.iterdir()
        assert sum(p.suffix == ".safetensors" for p in partial.iterdir()) >= 2
        finish(case, output)
    assert unfinished >= 1
    assert contents(case[0]) == before


@pytest.fixture
def halfway(case, tmp_path, monkeypatch):
    """What is left of a call that was interrupted in its fourth file."""
    model, plan, _ = case
    copy, calls = shard_io._copy, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard_io, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply_plan(PruningPlan.load(plan), model, tmp_path / "output", max_shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "output").exists()
    (partial,) = tmp_path.glob(".output.resumable-*")
    return partial


def written_again(case, output, monkeypatch):
    """Which files `finish` writes."""
    write, names = shard_io._write_shard, []

    def noted(path, tensors):
        names.append(path.name)
        return write(path, tensors)

    monkeypatch.setattr(shard_io, "_write_shard", noted)
    finish(case, output)
    return names


def test_finished_files_are_kept(case, halfway, monkeypatch):
    shards = sorted(name for name in case[2] if name.endswith(".safetensors"))
    assert written_again(case, halfway.parent / "output", monkeypatch) == shards[3:]


@pytest.mark.parametrize("damage", ["byte", "header", "torn", "gone"])
def test_damaged_files_are_named_and_written_again(case, halfway, monkeypatch, damage):
    shards = sorted(name for name in case[2] if name.endswith(".safetensors"))
    broken = halfway / shards[1]
    data = bytearray(broken.read_bytes())
    if damage == "byte":
        data[len(data) // 2] ^= 1
    elif damage == "header":
        data[data.index(b"pt")] ^= 1
    broken.write_bytes(data[:-1] if damage == "torn" else data)
    if damage == "gone":
        broken.unlink()
    names = {
        "byte": r"1 of \d+ tensors differ from their checksums: \['model.layers",
        "header": "the header differs from its checksum",
        "torn": r"\d+ bytes, checksums.json has it with \d+",
        "gone": "the file is missing",
    }
    with pytest.warns(UserWarning, match=f"{shards[1]}: {names[damage]}.* it is written again"):
        again = written_again(case, halfway.parent / "output", monkeypatch)
    assert again == [shards[1], *shards[3:]]


def test_a_change_of_the_input_or_the_plan_starts_anew(case, halfway, tmp_path, monkeypatch):
    """Nothing of the interrupted call is used, and it is gone."""
    model = shutil.copytree(case[0], tmp_path.parent / f"{tmp_path.name}-changed")
    shard = sorted(model.glob("*.safetensors"))[0]
    os.utime(shard, ns=(0, 0))
    shards = sorted(name for name in case[2] if name.endswith(".safetensors"))
    assert written_again((model, *case[1:]), halfway.parent / "output", monkeypatch) == shards


def test_what_was_left_counts_as_free_space(case, halfway, monkeypatch):
    model, plan, _ = case
    target = halfway.parent / "output"
    needed = sum(t.end - t.start for f in case[2] if f.endswith(".safetensors")
                 for t in read_header(model.parent / "expected" / f).values())  # fmt: skip
    left = sum(path.stat().st_blocks * 512 for path in halfway.iterdir())
    assert left > needed / 4
    free, asked = needed - left - 1, []

    def usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(10**12, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(OSError, match=f"{needed - left:,} bytes needed, {free:,} free"):
        apply_plan(PruningPlan.load(plan), model, target, max_shard_bytes=SHARD_BYTES)
    assert sorted(halfway.parent.iterdir()) == [halfway]
    free += 1
    finish(case, target)
    assert asked == [target.parent] * 2


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_is_not_written_through(case, halfway, tmp_path_factory, link):
    precious = tmp_path_factory.mktemp("elsewhere") / "thesis.txt"
    precious.write_text("precious")
    torn = max(halfway.glob("*.safetensors"))
    torn.unlink()
    link(precious, torn)
    finish(case, halfway.parent / "output")
    assert precious.read_text() == "precious"


def replace_keeping_its_time(shard):
    other = shutil.copy2(shard, shard.with_name("other"))
    other.replace(shard)


def write_keeping_its_time(shard):
    times = shard.stat()
    with shard.open("r+b") as file:
        file.write(file.read(1))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [replace_keeping_its_time, write_keeping_its_time, Path.unlink])
def test_an_input_that_changes_meanwhile_is_named(case, tmp_path, monkeypatch, change):
    model = shutil.copytree(case[0], tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    write = shard_io._write_shard

    def write_and_change(path, tensors):
        checksums = write(path, tensors)
        if path.name.startswith("model-00005"):
            change(shard)
        return checksums

    monkeypatch.setattr(shard_io, "_write_shard", write_and_change)
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed while it was in use"):
        apply_plan(PruningPlan.load(case[1]), model, tmp_path / "output", max_shard_bytes=SHARD_BYTES)
    assert list(tmp_path.iterdir()) == [model]


def test_the_key_depends_on_the_files_and_not_on_where_they_are_mounted(case):
    plan, checkpoint = PruningPlan.load(case[1]), open_checkpoint(case[0])

    def key(**changes):
        states = {path: replace(state, **changes) for path, state in checkpoint.states.items()}
        return _key(plan, replace(checkpoint, states=states), SHARD_BYTES)

    assert key(device=1, inode=2) == key()
    assert len({key(), key(size=1), key(modified_ns=1), key(changed_ns=1)}) == 4


def test_an_error_leaves_nothing(case, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_io, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        apply_plan(PruningPlan.load(case[1]), case[0], tmp_path / "output")
    assert not list(tmp_path.iterdir())


def test_only_one_process_writes(case, tmp_path, monkeypatch):
    copy, plan = shard_io._copy, PruningPlan.load(case[1])

    def copy_while_another_tries(*arguments):
        with pytest.raises(BlockingIOError, match=r"another process is writing.*\.output\.resumable-"):
            apply_plan(plan, case[0], tmp_path / "output")
        return copy(*arguments)

    monkeypatch.setattr(shard_io, "_copy", copy_while_another_tries)
    apply_plan(plan, case[0], tmp_path / "output")
    assert list(tmp_path.iterdir()) == [tmp_path / "output"]


def test_an_input_that_differs_from_its_checksums_is_named(case, tmp_path, capsys):
    model = tmp_path / "model"
    apply_plan(PruningPlan.load(case[1]), case[0], model, max_shard_bytes=SHARD_BYTES)
    plan = random_plan(model)
    assert main(["verify", str(model)]) == 0
    where = open_checkpoint(model).tensors["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(where.shard.read_bytes())
    data[(where.start + where.end) // 2] ^= 0x40
    where.shard.write_bytes(data)
    broken = where.shard
    told = rf"{broken.name}: 1 of \d+ tensors differ from their checksums: \['model.layers.1.mlp.up_proj"
    with pytest.raises(CheckpointError, match=told):
        apply_plan(plan, model, tmp_path / "output")
    assert list(tmp_path.iterdir()) == [model]
    capsys.readouterr()
    assert main(["verify", str(model)]) == 1
    assert f"{broken.name}: 1 of" in capsys.readouterr().err
    checksums = json.loads((model / "checksums.json").read_text())
    del checksums["files"][broken.name]
    (model / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(CheckpointError, match=rf"checksums.json has no checksums of \['{broken.name}'\]"):
        apply_plan(plan, model, tmp_path / "output")
    entry = {"bytes": 1, "header": "", "tensors": []}
    for files in ({"../x": {}}, [], {"x": 1}, {"x": {}}, {"x": entry}):
        (model / "checksums.json").write_text(json.dumps({"format_version": 1, "files": files}))
        with pytest.raises(CheckpointError, match=r"checksums.json (is damaged|has no checksums of)"):
            apply_plan(plan, model, tmp_path / "output")
    assert list(tmp_path.iterdir()) == [model]
    (model / "checksums.json").unlink()
    assert main(["verify", str(model), "--json"]) == 0
    assert '"tensors_checked": 0' in capsys.readouterr().out


def test_an_interrupt_stops_the_extension_at_once(tmp_path):
    copy = pytest.importorskip("adapt_pruner._io").copy
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(2**36)
    runs = np.array([[0, 2**36]])
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            copy([str(tmp_path / "holes")], [(0, [(0, 0, 1, 0, runs)])], "", 2, 2**20)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert time.monotonic() - began < 5
