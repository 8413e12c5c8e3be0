"""`apply` of a plan against `cp` of the same file and against transformers: load, slice, save.

    python benchmarks/shard_io.py --gigabytes 4 --folder /somewhere/with/room --output shard_io.csv

Makes a Llama of 8B's layers in one safetensors file and a plan with random kept units. Every measurement is
a process of its own, all of them take turns, and each comes first in some round; warm ones find the file in
the page cache, cold ones do not (`posix_fadvise(DONTNEED)`). `cp` alone leaves its copy in the page cache,
`cp+fsync` brings it to the disk, as `apply` does before it gives the output its name. Seconds are those of
the whole process, and in brackets those within it without the imports. The ratios say how many times as fast
as `cp` and `cp+fsync` of the whole file a command is. Peaks of memory are `VmHWM` of the process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from adapt_pruner.apply import apply_plan
from adapt_pruner.checkpoint import WEIGHTS_NAME, config_hash, open_checkpoint, weights_layout
from adapt_pruner.families import LLAMA, layer_widths, unit_counts
from adapt_pruner.plan import PruningPlan

HIDDEN, CHANNELS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 8, 128, 32000
COLUMNS = (
    "state",
    "what",
    "seconds",
    "inner_seconds",
    "cp_over_it",
    "cp_fsync_over_it",
    "peak_mb",
    "rounds",
)


def make_model(directory: Path, gigabytes: float, seed: int) -> None:
    """A checkpoint of about this size with random bytes as weights."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    layer = {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (CHANNELS, HIDDEN),
        "mlp.up_proj.weight": (CHANNELS, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, CHANNELS),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    bytes_of = lambda shapes: 2 * sum(int(np.prod(shape)) for shape in shapes.values())  # noqa: E731
    layers = max(1, round((gigabytes * 1e9 - bytes_of(shapes)) / bytes_of(layer)))
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    text, _ = weights_layout({name: ("BF16", shape) for name, shape in shapes.items()})
    end = bytes_of(shapes)
    draw = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    with (directory / WEIGHTS_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, 2**24):
            # exponents of small numbers: transformers may look at them
            bits = draw.integers(0x3C00, 0x3D00, min(2**23, (end - start) // 2), dtype=np.uint16)
            file.write(bits.tobytes())
        file.flush()
        os.fsync(file.fileno())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": CHANNELS, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def make_plan(directory: Path, density: float, seed: int) -> PruningPlan:
    """Random kept units: of the layers between 0.8 and 1.2 times the density."""
    checkpoint, draw = open_checkpoint(directory), np.random.default_rng(seed)
    widths = layer_widths(checkpoint.config)
    keep = []
    for units in unit_counts(LLAMA, widths):
        share = min(1.0, density * draw.uniform(0.8, 1.2))
        kept = {kind: max(1, round(count * share)) for kind, count in units.items()}
        keep.append({k: np.sort(draw.choice(units[k], n, replace=False)) for k, n in kept.items()})
    return PruningPlan(
        str(directory), config_hash(checkpoint.config), checkpoint.fingerprint(), "llama", {},
        unit_counts(LLAMA, widths), tuple(keep),
    )  # fmt: skip


def load_slice_save(plan: PruningPlan, model: Path, output: Path) -> None:
    """What `apply` replaces: the model in memory, the same surgery on it, `save_pretrained`."""
    from transformers import AutoModelForCausalLM

    from adapt_pruner.modeling.conversion import convert_pruned_model
    from adapt_pruner.surgery import prune_layer

    widths = list(layer_widths(open_checkpoint(model).config))
    live = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    for layer, keep in enumerate(plan.keep_indices):
        widths[layer] = prune_layer(live, LLAMA, layer, widths[layer], keep)
    convert_pruned_model(live, widths).save_pretrained(output)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds of a process, and those and the peak RSS in MB that it reports itself, if it does."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    inner, peak = map(float, done.stdout.split()[-2:] or (seconds, 0))
    return seconds, inner, peak


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def drop_from_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_into_cache(file: Path) -> None:
    with file.open("rb") as source:
        while source.read(2**24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for files that are made and deleted")
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--density", type=float, default=0.65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.add_argument("--run", choices=["apply", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, plan_file, output = (options.folder / name for name in ("model", "plan.json", "output"))
    if options.run:
        run = apply_plan if options.run == "apply" else load_slice_save
        plan = PruningPlan.load(plan_file)
        began = time.perf_counter()
        run(plan, model, output)
        print(time.perf_counter() - began, peak_mb())
        return
    if present := [path for path in (model, plan_file, output) if path.exists() or path.is_symlink()]:
        parser.error(f"{present[0]} is there already; expected a folder without it")
    try:
        make_model(model, options.gigabytes, options.seed)
        make_plan(model, options.density, options.seed).save(plan_file)
        rows = measure(options, model, output)
    finally:
        for path in (model, output):
            shutil.rmtree(path, ignore_errors=True)
        plan_file.unlink(missing_ok=True)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def measure(options: argparse.Namespace, model: Path, output: Path) -> list[dict[str, object]]:
    weights, copied = model / WEIGHTS_NAME, output / WEIGHTS_NAME
    this = [sys.executable, __file__, "--folder", str(options.folder), "--run"]
    commands = {
        "cp": ["cp", str(weights), str(copied)],
        "cp+fsync": ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(weights), str(copied)],
        "apply": [*this, "apply"],
        "transformers": [*this, "transformers"],
    }
    if options.without_transformers:
        del commands["transformers"]
    seen: dict[tuple[str, str], list[tuple[float, float, float]]] = {
        (state, what): [] for state in ("warm", "cold") for what in commands
    }
    for number in range(options.rounds + 1):
        first = number % len(commands)
        order = [*commands][first:] + [*commands][:first]
        for state in ("warm", "cold"):
            for what in order:
                shutil.rmtree(output, ignore_errors=True)
                if what.startswith("cp"):
                    output.mkdir()
                os.sync()
                (read_into_cache if state == "warm" else drop_from_cache)(weights)
                measurement = measured(commands[what])
                if number:  # the first round reads the programs themselves from the disk
                    seen[state, what].append(measurement)
    rows: list[dict[str, object]] = []
    print(f"{weights.stat().st_size / 1e9:.2f} GB; medians of {options.rounds} rounds")
    for (state, what), values in seen.items():
        seconds, inner, of_cp, of_both = (
            statistics.median(value[place] for value in of)
            for place, of in ((0, values), (1, values), (0, seen[state, "cp"]), (0, seen[state, "cp+fsync"]))
        )
        peak = max(value[2] for value in values)
        numbers = [f"{number:.3f}" for number in (seconds, inner, of_cp / seconds, of_both / seconds)]
        rows.append(dict(zip(COLUMNS, (state, what, *numbers, f"{peak:.0f}", len(values)), strict=True)))
        seconds_text, inner_text, ratio, fair_ratio = numbers
        print(
            f"{state} {what:13} {seconds_text:>8} s ({inner_text:>8}); cp / it {ratio:>6}; "
            f"cp+fsync / it {fair_ratio:>6}; peak {peak or float('nan'):.0f} MB"
        )
    return rows


if __name__ == "__main__":
    main()
