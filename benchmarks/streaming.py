"""Memory and time of the streaming engine, on random models in the shape of Llama.

Several that differ in their number of layers alone, or one of the size of Llama 3.1 8B:

    python benchmarks/streaming.py --layers 12,24,48 --rounds 3 --page docs/results-streaming.md
    python benchmarks/streaming.py --shape llama-3.1-8b --page docs/results-streaming.md

The page of the latter also has what larger models of benchmarks/configs would take at the same rate.

Each is generated layer by layer with random weights, pruned in one iteration by a process of its own and,
with --shape, its plan is applied to the checkpoint by another. Memory is the peak of what is resident above
that of the process once it has pruned a model of two small layers, which imports and starts everything. It
stands beside the bound: twice the largest layer's weights, its gradients in fp32, a chunk of the head, what a
layer's backward pass keeps of a micro-batch's activations, and the budget for what goes into the layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from iteration import peak_memory
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "streaming.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a Llama with a head of its own."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str

    @property
    def layer_parameters(self) -> int:
        width = self.hidden // self.heads
        attention = 2 * self.hidden * width * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def num_bytes(self) -> int:
        numel = self.layers * self.layer_parameters + (2 * self.vocabulary + 1) * self.hidden
        return numel * DTYPES[self.dtype].itemsize


CONFIGS = Path(__file__).parent / "configs"
LARGER = ("llama-3.1-70b", "llama-3.1-405b")
SHAPES = {"llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256, "bf16")}


def generate(shape: Shape, directory: Path) -> None:
    """Writes a checkpoint of random weights, a file for each layer, and a tokenizer of bytes."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=DTYPES[shape.dtype],
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    torch.manual_seed(0)
    weight_map = {}
    for number, tensors in enumerate(_tensors(shape)):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(shape: Shape) -> Iterator[dict[str, torch.Tensor]]:
    dtype, width = DTYPES[shape.dtype], shape.hidden // shape.heads

    def draw(rows: int, columns: int) -> torch.Tensor:
        tensor = torch.empty(rows, columns, dtype=dtype)
        for part in tensor.split(4096):
            part.copy_(torch.randn(part.shape) / math.sqrt(columns))
        return tensor

    yield {"model.embed_tokens.weight": draw(shape.vocabulary, shape.hidden)}
    yield {
        "lm_head.weight": draw(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
    }
    rows = {
        "self_attn.q_proj": (shape.heads * width, shape.hidden),
        "self_attn.k_proj": (shape.kv_heads * width, shape.hidden),
        "self_attn.v_proj": (shape.kv_heads * width, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.heads * width),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": draw(*size) for name, size in rows.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
        yield tensors


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def write_text(path: Path, options: argparse.Namespace) -> None:
    """Documents of random letters, each a little longer than a calibration sequence."""
    draw = random.Random(0)
    count, length = 2 * options.sequences, 2 * options.length
    path.write_text("\n\n".join("".join(draw.choices("abcdefgh ", k=length)) for _ in range(count)))


def prune_one(options: argparse.Namespace) -> dict[str, Any]:
    """One iteration in this process: its memory and what the engine has measured."""
    from adapt_pruner import PruneConfig, prune

    def run(model: Path, output: Path) -> Path:
        config = PruneConfig(
            str(model),
            options.target,
            str(output),
            target_of="non-embedding",
            iterations=1,
            engine="streaming",
            memory=options.memory,
            calibration=str(options.directory / "text.txt"),
            num_sequences=options.sequences,
            sequence_length=options.length,
            micro_batch_size=options.micro_batch_size,
            device="cpu",
        )
        return prune(config).run_directory

    run(options.directory / "small", options.directory / "small-pruned")
    before = peak_memory(reset=True)
    started = time.perf_counter()
    output = run(options.directory / "model", options.directory / "pruned")
    seconds = time.perf_counter() - started
    record = json.loads((output / "iterations" / "001.json").read_text())
    return {
        "peak_bytes": peak_memory() - before,
        "seconds": round(seconds, 2),
        "iteration_seconds": record["seconds"],
        "loss": record["loss"],
        **record["engine"],
    }


APPLY = """
import pathlib, sys
from adapt_pruner.apply import apply_plan
from adapt_pruner.plan import PruningPlan
apply_plan(PruningPlan.load(sys.argv[1]), sys.argv[2], sys.argv[3])
assert "torch" not in sys.modules
print(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def apply_one(options: argparse.Namespace) -> dict[str, Any]:
    """Applies the plan of the run in a process of its own: its seconds and peak."""
    places = [options.directory / name for name in ("pruned/plan.json", "model", "applied")]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", APPLY, *map(str, places)], check=True, capture_output=True, text=True
    )
    return {
        "process_peak_bytes": int(done.stdout) * 1024,
        "seconds": round(time.perf_counter() - started, 2),
        "bytes_written": sum(file.stat().st_size for file in places[-1].glob("*.safetensors")),
    }


def bound(shape: Shape, options: argparse.Namespace) -> dict[str, int]:
    """The parts of the bound, in bytes."""
    from adapt_pruner.config import parse_bytes
    from adapt_pruner.engines.choice import activation_bytes
    from adapt_pruner.families import LayerWidths
    from adapt_pruner.scoring.layerwise import CHUNK_BYTES

    size = DTYPES[shape.dtype].itemsize
    micro = min(options.micro_batch_size, options.sequences)
    tokens = micro * options.length
    widths = LayerWidths(shape.heads, shape.kv_heads, shape.intermediate, shape.hidden // shape.heads)
    chunk = min(CHUNK_BYTES, 4 * tokens * shape.vocabulary)
    of_gradients = 4 if options.sequences > options.micro_batch_size else size
    return {
        "two_layers": 2 * shape.layer_parameters * size,
        "gradients": shape.layer_parameters * of_gradients,
        "head_chunk": chunk * 3 + chunk * size // 4,
        "activations": tokens * activation_bytes(widths, shape.hidden, size),
        "budget": parse_bytes("memory", options.memory),
    }


def measure(shape: Shape, options: argparse.Namespace, *, apply: bool) -> dict[str, Any]:
    """Generates a model, prunes it in a process of its own, and applies the plan in another."""
    options.directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.directory).free
    needed = int(shape.num_bytes * (1 + (1 + apply) * options.target) * 1.05)
    if free < needed:
        raise SystemExit(
            f"{needed / 1e9:.0f} GB of disk space needed in {options.directory}, {free / 1e9:.0f} free"
        )
    small = Shape(2, 64, 128, 4, 2, 512, shape.dtype)
    for name, each in (("small", small), ("model", shape)):
        (options.directory / name).mkdir()
        generate(each, options.directory / name)
    write_text(options.directory / "text.txt", options)
    parts = bound(shape, options)
    row: dict[str, Any] = {
        **dataclasses.asdict(shape),
        "bytes_on_disk": shape.num_bytes,
        "tokens": options.sequences * options.length,
        "length": options.length,
        "micro_batch_tokens": min(options.micro_batch_size, options.sequences) * options.length,
        "memory": options.memory,
        "threads": torch.get_num_threads(),
        **_in_process(options),
        "bound_bytes": sum(parts.values()),
        "bound": parts,
    }
    row["ratio"] = round(row["peak_bytes"] / row["bound_bytes"], 3)
    row["seconds_per_layer"] = round(row["iteration_seconds"]["score"] / shape.layers, 4)
    if apply:
        row["apply"] = apply_one(options)
    for name in ("model", "small", "pruned", "small-pruned", "applied"):
        shutil.rmtree(options.directory / name, ignore_errors=True)
    return row


def median_of(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The round of median time, with the largest peak of all."""
    rows = sorted(rounds, key=lambda row: row["iteration_seconds"]["score"])
    largest = max(rows, key=lambda row: row["peak_bytes"])
    peaks = {name: largest[name] for name in ("peak_bytes", "ratio")}
    return {**rows[len(rows) // 2], **peaks, "rounds": len(rows)}


def _in_process(options: argparse.Namespace) -> dict[str, Any]:
    """What `prune_one` gives, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--prune", "--directory", str(options.directory)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_page(path: Path, results: dict[str, Any]) -> None:
    """The page of what has been measured so far."""
    lines = [
        "# The streaming engine: memory and time",
        "",
        "Written by `benchmarks/streaming.py`: models with random weights in the shape of Llama, pruned by",
        "one iteration of Adapt-Pruner with one decoder layer in memory at a time. The peak is resident",
        "memory above what the process has after imports. The bound is twice the largest layer's weights,",
        "its gradients (in fp32 where there are micro-batches), a chunk of the head, one micro-batch's",
        "activations in a layer, and the budget (`--memory`).",
        "",
    ]
    columns = ("layers", "on disk", "peak MB", "bound MB", "ratio", "seconds", "ms per layer", "read GB")
    for name, rows in results.items():
        first = rows[0]
        lines += [
            f"## {name}",
            "",
            f"Hidden size {first['hidden']}, {first['intermediate']} channels, {first['heads']} heads, "
            f"{first['kv_heads']} KV heads, vocabulary {first['vocabulary']:,}, {first['dtype']}; "
            f"{first['tokens']:,} calibration tokens in micro-batches of {first['micro_batch_tokens']:,}, "
            f"`--memory {first['memory']}`, {first['threads']} threads"
            + (f"; medians of {first['rounds']} rounds, and the largest peak." if "rounds" in first else "."),
            "",
            "| " + " | ".join(columns) + " |",
            "|" + " --- |" * len(columns),
        ]
        for row in rows:
            cells = (
                row["layers"], f"{row['bytes_on_disk'] / 1e9:.2f} GB", f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['bound_bytes'] / 1e6:.0f}", row["ratio"], f"{row['iteration_seconds']['score']:.1f}",
                f"{1000 * row['seconds_per_layer']:.0f}", f"{row['weight_bytes_read'] / 1e9:.2f}",
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        for row in rows:
            total = row["iteration_seconds"]["score"]
            shares = ", ".join(f"{what} {s / total:.0%}" for what, s in row["sweep_seconds"].items())
            lines += [
                "",
                f"{row['layers']} layers: {shares} of the time of scoring; {row['boundaries_on_disk']} of "
                f"{row['layers'] + 1} boundaries on disk, {row['boundary_bytes_moved'] / 1e9:.2f} GB moved; "
                f"the whole run with saving took {row['seconds']:.0f} s.",
            ]
            if "apply" in row:
                applied = row["apply"]
                lines += [
                    "",
                    f"`apply` wrote {applied['bytes_written'] / 1e9:.1f} GB in {applied['seconds']:.0f} s; "
                    f"its process took {applied['process_peak_bytes'] / 1e9:.2f} GB at most.",
                ]
        lines.append("")
        if name in SHAPES:
            lines += [*predictions(name, rows[0]), ""]
    path.write_text("\n".join(lines))


def predictions(name: str, row: dict[str, Any]) -> list[str]:
    """What `plan-memory` says of this model and larger ones, at the rate of arithmetic measured with it."""
    from adapt_pruner.config import PlanMemoryConfig
    from adapt_pruner.memory_plan import MachineRates, plan_memory

    plans = {}
    for config in (name, *LARGER):
        settings = PlanMemoryConfig(
            str(CONFIGS / f"{config}.json"),
            iterations=1,
            num_sequences=row["tokens"] // row["length"],
            sequence_length=row["length"],
            micro_batch_size=row["micro_batch_tokens"] // row["length"],
            memory=row["memory"],
            dtype=row["dtype"],
            device="cpu",
        )
        plan = plan_memory(settings, rates=MachineRates(1.0, 1.0, 0))
        plans[config] = plan, next(each for each in plan.engines if each.engine == "streaming")
    measured, seconds = plans[name][1], row["iteration_seconds"]["score"]
    rate = measured.flops_per_iteration / seconds
    columns = (
        "model", "on disk", "PFLOP", "read and moved GB", "memory GB", "hours of scoring", "disk MB/s needed",
        "minutes of `apply`",
    )  # fmt: skip
    lines = [
        f"Scoring reached {rate / 1e9:.0f} GFLOP/s. What `plan-memory` predicts for an iteration of this "
        "model and larger ones with the same settings, and how long it takes at that rate:",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for config, (plan, engine) in plans.items():
        hours = engine.flops_per_iteration / rate / 3600
        apply_minutes = row["apply"]["seconds"] * plan.weight_bytes / row["bytes_on_disk"] / 60
        cells = (
            config, f"{plan.weight_bytes / 1e9:.0f} GB", f"{engine.flops_per_iteration / 1e15:.2f}",
            f"{engine.bytes_per_iteration / 1e9:.0f}", f"{engine.memory_bytes / 1e9:.1f}", f"{hours:.2f}",
            f"{engine.bytes_per_iteration / hours / 3600 / 1e6:.0f}", f"{apply_minutes:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    moved = row["weight_bytes_read"] + row["boundary_bytes_moved"]
    return [
        *lines,
        "",
        f"Measured for {name}: {moved / 1e9:.0f} GB read and moved, {row['peak_bytes'] / 1e9:.1f} GB of "
        f"memory above imports, {seconds / 3600:.2f} hours.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="a well-known size, and apply as well")
    parser.add_argument("--layers", default="12,24,48", help="models that differ in this alone")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--memory", default="16MB")
    parser.add_argument("--rounds", type=int, default=1, help="of models that differ in their layers alone")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--directory", type=Path, help="where the models go; a temporary one if not given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--prune", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        print(json.dumps(prune_one(options)))
        return
    names = ("hidden", "intermediate", "heads", "kv_heads", "vocabulary", "dtype")
    own = {name: getattr(options, name) for name in names}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        options.directory = Path(directory)
        if options.shape:
            rows = [measure(SHAPES[options.shape], options, apply=True)]
        else:
            shapes = [Shape(int(layers), **own) for layers in options.layers.split(",")]
            rounds = [
                [measure(shape, options, apply=False) for shape in shapes] for _ in range(options.rounds)
            ]
            rows = [median_of(each) for each in zip(*rounds, strict=True)]
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    results[options.shape or "Models that differ in their layers alone"] = rows
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.page:
        write_page(options.page, results)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
