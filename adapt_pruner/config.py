"""The configuration of every command: frozen, checked when made, saved beside every run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

AllocationName = Literal["adaptive", "uniform", "global", "threshold", "search", "reference"]
RIDGE = 0.3  # on top of the diagonal of second moments of inputs, as a fraction of it

_COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9}
_FLOPS = {**_COUNTS, "g": 10**9, "t": 10**12}
_BYTES = {"b": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _BYTES |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}
_PICOSECONDS = {"s": 10**12, "ms": 10**9, "us": 10**6}


class MissingSetting(ValueError):
    """A setting that has no default, or one of several of which at least one must be given."""


@dataclass(frozen=True)
class PruneConfig:
    """Settings of `prune`.

    Args:
        model: directory of a Hugging Face model, name of a built-in model, or name on the hub.
        target: what to keep: a fraction of the parameters (0.8) or a count of parameters (108M). Of this and
            the other targets at least one is needed, and all that are given are met.
        output: run directory to create.
        target_flops: FLOPs of the forward pass of one token at the end of target_context tokens, as a
            fraction of those before or a count (1.2G).
        target_kv_cache: bytes of the KV cache of target_context tokens, as a fraction or a size (64MB); only
            whole KV groups make it smaller.
        target_latency: time of a forward pass of latency_batch sequences of latency_tokens tokens, measured
            on the device, as a fraction or a time (50ms). Such a run is not repeated bit by bit.
        target_context: tokens that target_flops and target_kv_cache are about.
        latency_batch: sequences of the measured pass.
        latency_tokens: tokens of each.
        target_of: what the target refers to: all parameters, or those outside embedding and head.
        method: preset of the settings below that are the method's if not given; `adapt-pruner methods` lists
            them.
        estimator: how important a unit is: taylor_first, taylor_vectorize, taylor_second, taylor_mixed,
            taylor_reference, magnitude_l1, magnitude_l2, wanda, fluctuation, obs, obs_fisher or random.
        allocation: how much each layer loses: by layer importance (adaptive), the same share (uniform), what
            units ranked together over all layers by importance per parameter (global) or by importance
            (threshold) leave it, what raises the calibration loss least (search), or as the published
            implementation has it, without landing (reference).
        gqa_credit: the KV group that a query head counts for: its own (owner), or as in the published
            implementation number Q modulo the groups (modulo).
        protected_layers: layers that lose nothing, such as 0-3,30,-1 (the last), or none.
        granularity: what attention is pruned by: whole KV groups (kv_group), or as many query heads of each
            remaining KV group of a layer (query_head; where every KV head has one, they are KV groups); or
            "layer": the least important decoder layers go as a whole, and the others stay as they are.
        mlp_granularity: what layers with a mixture of experts are pruned by: as many channels of each expert
            of a layer (channel), or whole experts (expert). Other layers lose channels.
        attention_rate: the multiple of a layer's sparsity that its attention units lose, 0 for none. The
            allocations global and threshold divide the price of a unit by it.
        mlp_rate: the same for channels and experts.
        round_to: every layer keeps a multiple of so many channels, or all that it had.
        iterations: pruning rounds that would remove everything; each removes 1/iterations on average. 50 if
            not given; one-shot methods ignore it.
        amplitude: how far a layer's share of a round may differ from the average.
        search_evaluations: of the allocation search: losses that each round measures, on up to 64 calibration
            sequences, beyond those of the start points.
        layer_metric: how far a layer's output is from its input.
        normalize: how layer importance is brought to [-1, 1].
        calibration: calibration text: "default", a .txt, .jsonl, .json, .csv or .parquet file, or the name
            of a data set.
        calibration_column: text column of the file or data set; "text" if not given.
        num_sequences: calibration sequences drawn anew for each iteration; each method's own if not given.
        sequence_length: tokens of each sequence, a BOS included.
        prefix_bos: put the tokenizer's BOS in front of every calibration sequence; Gemma needs it. If not
            given, where the tokenizer itself puts it in front of text; the method reference never does.
        micro_batch_size: sequences per forward and backward pass.
        compensation: "bias" adds what the removed columns of every down_proj and o_proj gave on average over
            the calibration sequences to a bias, which counts as parameters; "least_squares" changes the kept
            columns in each round so that the outputs on these sequences come closest to those before it.
        carry_over: how much what earlier iterations measured at the units that are left counts in each later
            one: 0 forgets it, 1 counts all iterations alike.
        ridge: of obs, obs_fisher and least_squares: what the second moments of inputs get on top of their
            diagonal, as a fraction of it. The fewer the calibration tokens, the more is right.
        gradients: "materialised" keeps the gradients of all prunable weights until the batch is through;
            "fused" scores each weight within the backward pass, so that its gradient never exists, and needs
            all num_sequences in one micro-batch; "auto" is fused where that holds and the device is CUDA with
            Triton, and materialised on the CPU, where fused saves memory but takes longer. Both give the same
            scores up to rounding.
        pack: join calibration documents instead of drawing from long enough ones.
        seed: of the calibration draws.
        engine: where the weights are: all of them in-memory, one decoder layer's at a time (streaming: from
            the files of the checkpoint, for models larger than memory), or shared by the processes that
            torchrun has started (sharded); auto is in-memory where that fits.
        memory: of the engine streaming: memory for what goes into each layer, such as 8GB; the rest goes to
            a file beside the run directory. Half of what is available if not given.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: dtype to score and save in; "auto" keeps that of the checkpoint.
        backend: kernels to use.
        resume: go on with the unfinished run in the output directory.
    """

    model: str
    target: float | str | None = None
    output: str = ""
    target_of: Literal["all", "non-embedding"] = "all"
    target_flops: float | str | None = None
    target_kv_cache: float | str | None = None
    target_latency: float | str | None = None
    target_context: int = 1024
    latency_batch: int = 1
    latency_tokens: int = 128
    method: str = "adapt-pruner"
    estimator: str | None = None
    allocation: AllocationName | None = None
    gqa_credit: Literal["owner", "modulo"] | None = None
    protected_layers: str | None = None
    granularity: Literal["kv_group", "query_head", "layer"] | None = None
    mlp_granularity: Literal["channel", "expert"] = "channel"
    attention_rate: float | None = None
    mlp_rate: float | None = None
    round_to: int = 1
    iterations: int | None = None
    amplitude: float = 0.02
    search_evaluations: int = 100
    layer_metric: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    normalize: Literal["max", "rank", "zscore_clip"] = "max"
    calibration: str = "default"
    calibration_column: str | None = None
    num_sequences: int | None = None
    sequence_length: int = 64
    prefix_bos: bool | None = None
    micro_batch_size: int = 16
    compensation: Literal["none", "bias", "least_squares"] | None = None
    carry_over: float | None = None
    ridge: float = RIDGE
    gradients: Literal["auto", "fused", "materialised"] = "auto"
    pack: bool = False
    seed: int = 0
    engine: Literal["auto", "in-memory", "streaming", "sharded"] = "auto"
    memory: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise MissingSetting("output is missing: expected the run directory to create")
        if not self.targets():
            raise MissingSetting(f"target is missing: expected at least one of {', '.join(_TARGETS)}")
        if self.target is None:
            require("target_of", self.target_of, "'all' without target", self.target_of == "all")
        for name in ("target_context", "latency_batch", "latency_tokens"):
            require(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        for name in ("round_to", "iterations", "search_evaluations", "num_sequences", "micro_batch_size"):
            value = getattr(self, name)
            require(name, value, "at least 1", value is None or value >= 1)
        carry = self.carry_over
        require("carry_over", carry, "within 0 and 1", carry is None or 0 <= carry <= 1)
        require("sequence_length", self.sequence_length, "at least 2", self.sequence_length >= 2)
        require("seed", self.seed, "at least 0", self.seed >= 0)
        require("amplitude", self.amplitude, "finite, at least 0", 0 <= self.amplitude < math.inf)
        for name in ("attention_rate", "mlp_rate"):
            rate = getattr(self, name)
            require(name, rate, "finite, at least 0, or not given", rate is None or 0 <= rate < math.inf)
        require(
            "mlp_rate",
            self.mlp_rate,
            "above 0 beside attention_rate 0",
            self.attention_rate != 0 or self.mlp_rate != 0,
        )
        require("ridge", self.ridge, "finite, above 0", 0 < self.ridge < math.inf)
        require_choices(self)
        if self.memory is not None:
            parse_bytes("memory", self.memory)
        if self.gradients == "fused" and self.num_sequences is not None:
            size = self.micro_batch_size
            expected = f"at least {self.num_sequences} (num_sequences), or gradients other than 'fused'"
            require("micro_batch_size", size, expected, size >= self.num_sequences)

    def targets(self) -> dict[str, float | int]:
        """The targets that are given, by name, as `parse_amount` reads them."""
        given = {name: getattr(self, name) for name in _TARGETS}
        return {name: parse_amount(name, value) for name, value in given.items() if value is not None}


def parse_target(target: float | str) -> float | int:
    """A fraction in (0, 1] as a float, or a count of parameters as an int ("108M", "1.2B", 500000).

    Raises:
        ValueError: neither.
    """
    return parse_amount("target", target)


_TARGETS: dict[str, tuple[Mapping[str, int], str]] = {
    "target": (_COUNTS, "a count of parameters such as 108M or 1.2B"),
    "target_flops": (_FLOPS, "a count of FLOPs such as 500M or 1.2G"),
    "target_kv_cache": (_BYTES, "a size such as 64MB or 64MiB"),
    "target_latency": (_PICOSECONDS, "a time such as 50ms or 0.05s"),
}


def parse_amount(name: str, value: float | str) -> float | int:
    """What a target setting asks for: a fraction in (0, 1] as a float, or an amount as an int.

    Amounts are counts, bytes and for `target_latency` picoseconds, which need their unit.

    Raises:
        ValueError: neither.
    """
    units, example = _TARGETS[name]
    text = str(value).strip().replace("_", "").replace(",", "")
    match = re.fullmatch(r"(.*?)\s*([a-z]*)", text, re.IGNORECASE)
    unit = match[2].lower() if match else ""
    try:
        number = float(text if unit not in units else text[: -len(unit)])
    except ValueError:
        number = math.nan
    if unit not in units and 0 < number <= 1:
        return number
    amount = number * units.get(unit, 1)
    whole = unit in units or (number.is_integer() and units is not _PICOSECONDS)
    if amount > 1 and math.isfinite(amount) and whole:
        return round(amount)
    raise ValueError(f"{name} is {value!r}, expected a fraction in (0, 1] or {example}")


def parse_bytes(name: str, value: int | str) -> int:
    """A size such as 8GB, 512MiB or a number of bytes.

    Raises:
        ValueError: it is none, or below one byte.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", str(value).strip().replace("_", ""), re.IGNORECASE)
    unit = match[2].lower() if match else ""
    try:
        amount = float(match[1]) * _BYTES[unit or "b"] if match else math.nan
    except (ValueError, KeyError):
        amount = math.nan
    require(name, value, "a size such as 8GB or 512MiB", amount >= 1)
    return round(amount)


def parse_count(name: str, value: int | str) -> int:
    """A count such as 100k, 1.5M or 20000.

    Raises:
        ValueError: it is none, or below one.
    """
    text = str(value).strip().replace("_", "").replace(",", "")
    unit = text[-1:].lower()
    try:
        amount = float(text[:-1]) * _COUNTS[unit] if unit in _COUNTS else float(text)
    except ValueError:
        amount = math.nan
    fits = amount >= 1 and math.isfinite(amount) and (unit in _COUNTS or amount.is_integer())
    require(name, value, "a count such as 100k, 1.5M or 20000", fits)
    return round(amount)


def require(name: str, value: Any, expected: str, holds: bool) -> None:
    """Raises ValueError with the setting, the value seen and what was expected, unless it `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def require_choices(config: Any) -> None:
    """Every field with a Literal type has one of its values, or is None where it may be."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        for choices in (kind, *get_args(kind)):
            if get_origin(choices) is Literal and not (value is None and choices is not kind):
                require(name, value, f"one of {get_args(choices)}", value in get_args(choices))


@dataclass(frozen=True)
class ApplyConfig:
    """Settings of `apply`.

    Args:
        plan: run directory, or its plan.json.
        model: the model the plan was made for: directory, built-in name or name on the hub.
        output: model directory to create.
        uncompensated: replay a plan that was made with compensation all the same: the kept units with the
            weights of the original model.
        max_shard_size: size of the files that the weights are spread over, such as 4GiB or 500MB.
    """

    plan: str
    model: str
    output: str
    uncompensated: bool = False
    max_shard_size: str = "4GiB"

    def __post_init__(self) -> None:
        self.max_shard_bytes()

    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number.

        Raises:
            ValueError: it is no size.
        """
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]+)\s*", self.max_shard_size, re.IGNORECASE)
        unit = _BYTES.get(match[2].lower(), 0) if match else 0
        fits = match is not None and match[1].count(".") < 2 and float(match[1]) * unit >= 1
        require("max_shard_size", self.max_shard_size, "a size such as 500MB or 4GiB", fits)
        assert match is not None
        return int(float(match[1]) * unit)


@dataclass(frozen=True)
class VerifyConfig:
    """Settings of `verify`.

    Args:
        model: model or run directory, built-in name or name on the hub.
    """

    model: str


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `evaluate`.

    Args:
        model: model or run directory, built-in name or name on the hub.
        data: text for perplexity: "default" (its held-out part), a .txt, .jsonl, .json, .csv or .parquet
            file, or the name of a data set; "none" leaves perplexity out.
        column: text column of the file or data set; "text" if not given.
        split: split of the data set.
        context: tokens per window.
        stride: tokens from one window to the next; smaller than the context slides the window. Windows do not
            overlap if it is not given.
        max_tokens: use only the first tokens of the text.
        prefix_bos: put the tokenizer's BOS in front of every window of text, where it takes one token of the
            context; Gemma needs it. If not given, where the tokenizer itself puts it in front of text.
        tasks: benchmarks, separated by commas; "commonsense" stands for the seven commonsense tasks. Names
            that are not built in, and YAML files of tasks, go to lm-eval, which the extra "lm-eval" installs.
        num_fewshot: solved examples in front of each question; built in for mmlu, up to 5, else lm-eval's. As
            many as the task says, 0 for built-in ones, if not given.
        limit: items per task, of mmlu per subject, from its start.
        questions: "even" or "odd": every other item of each task alone, so that one half can choose settings
            and the other half report.
        batch_size: windows of text, or as often 256 tokens of tasks, per forward pass.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: dtype to evaluate in; "auto" keeps that of the checkpoint.
        output: JSON file to write the result to.
    """

    model: str
    data: str = "default"
    column: str | None = None
    split: str = "train"
    context: int = 1024
    stride: int | None = None
    max_tokens: int | None = None
    prefix_bos: bool | None = None
    tasks: str = ""
    num_fewshot: int | None = None
    limit: int | None = None
    questions: Literal["all", "even", "odd"] = "all"
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        require("batch_size", self.batch_size, "at least 1", self.batch_size >= 1)
        require("context", self.context, "at least 2", self.context >= 2)
        for name, least in (("stride", 1), ("max_tokens", 2), ("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, name)
            require(name, value, f"at least {least}, or not given", value is None or value >= least)
        require("stride", self.stride, "at most the context", (self.stride or 1) <= self.context)
        require_choices(self)


@dataclass(frozen=True)
class CompareConfig:
    """Settings of `compare`.

    Args:
        models: directories of models, built-in names or names on the hub, separated by commas.
        output: directory to create: a JSON file per row, results.csv, results.md and results.png.
        methods: methods of `prune`, separated by commas; the model before pruning is always the first row.
            With NAME:KEY=VALUE:KEY=VALUE a method has settings of `prune` for its own rows, such as
            adapt-pruner+:compensation=none:num-sequences=16; a list has slashes for commas.
        targets: fractions of the parameters to keep, separated by commas.
        target_of: what they refer to: all parameters, or those outside embedding and head.
        baseline: method that the mean accuracy of the others is compared with, question by question; that
            of the calls before, adapt-pruner where it is compared, else the first one, if not given.
        page: .md file to write the page to as well, once the last row is done, its .csv and .png beside it.
        iterations: pruning rounds that would remove everything; each method's own if not given.
        calibration: calibration text of all methods, as for `prune`.
        calibration_column: text column of the file or data set; "text" if not given.
        num_sequences: calibration sequences drawn anew for each iteration; each method's own if not given.
        sequence_length: tokens of each sequence, a BOS included.
        micro_batch_size: sequences per forward and backward pass while pruning.
        pack: join calibration documents instead of drawing from long enough ones.
        seed: of the calibration draws.
        data: text for perplexity, as for `evaluate`; "none" leaves perplexity out.
        column: text column of the file or data set; "text" if not given.
        split: split of the data set.
        context: tokens per window.
        stride: tokens from one window to the next. Windows do not overlap if it is not given.
        max_tokens: use only the first tokens of the text.
        tasks: multiple-choice benchmarks, separated by commas; "commonsense" stands for the seven
            commonsense tasks. Empty for none.
        limit: items per task, of mmlu per subject, from its start.
        questions: "even" or "odd": every other item of each task alone, so that one half can choose settings
            and the other half report.
        batch_size: windows of text, or as often 256 tokens of tasks, per forward pass of the evaluation.
        latency_batch: sequences of the forward pass that tokens per second are measured with.
        latency_tokens: tokens of each.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: dtype to prune and evaluate in; "auto" keeps that of the checkpoint.
        backend: kernels to use.
        keep_models: keep the pruned models once they are evaluated.
        dry_run: show the rows and how long they will take, from a measurement of seconds; write nothing.
        resume: go on with the comparison in the output directory: rows that are done stay. Models, methods,
            targets and tasks may be others than before; what they add is added.
    """

    models: str
    output: str = ""
    methods: str = "adapt-pruner,adapt-pruner+,llm-pruner,flap,slicegpt"
    targets: float | str = "0.8"
    target_of: Literal["all", "non-embedding"] = "non-embedding"
    baseline: str | None = None
    page: str | None = None
    iterations: int | None = None
    calibration: str = "default"
    calibration_column: str | None = None
    num_sequences: int | None = None
    sequence_length: int = 64
    micro_batch_size: int = 16
    pack: bool = False
    seed: int = 0
    data: str = "default"
    column: str | None = None
    split: str = "train"
    context: int = 1024
    stride: int | None = None
    max_tokens: int | None = None
    tasks: str = "commonsense"
    limit: int | None = None
    questions: Literal["all", "even", "odd"] = "all"
    batch_size: int = 8
    latency_batch: int = 1
    latency_tokens: int = 128
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    keep_models: bool = False
    dry_run: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.output and not self.dry_run:
            raise MissingSetting("output is missing: expected the directory to create")
        for name in ("latency_batch", "latency_tokens"):
            require(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        for name in ("models", "methods"):
            require(name, getattr(self, name), "at least one name", bool(split_names(getattr(self, name))))
        page = self.page
        require("page", page, "a file that ends in .md", page is None or page.endswith(".md"))
        self.fractions()
        require_choices(self)

    def fractions(self) -> tuple[float, ...]:
        """The targets as numbers.

        Raises:
            ValueError: one is no fraction within 0 and 1, or there is none.
        """
        given = [parse_target(part) for part in split_names(str(self.targets))]
        fits = bool(given) and all(isinstance(value, float) and value < 1 for value in given)
        require("targets", self.targets, "fractions between 0 and 1, separated by commas", fits)
        return tuple(dict.fromkeys(given))


def split_names(text: str) -> tuple[str, ...]:
    """What stands between the commas, each once."""
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `inspect`.

    Args:
        model: model or run directory, built-in name or name on the hub. A run directory shows its model
            before and after.
        base: model to compare with.
        context: context length in tokens that the attention FLOPs are counted at.
    """

    model: str
    base: str | None = None
    context: int = 1024

    def __post_init__(self) -> None:
        require("context", self.context, "at least 1", self.context >= 1)


@dataclass(frozen=True)
class PlanMemoryConfig:
    """Settings of `plan-memory`.

    Args:
        model: directory of a model or its config.json alone, built-in name, or name on the hub, of which the
            config is fetched alone.
        method: of `prune`.
        dtype: "auto" is that of the config; else fp32, bf16 or fp16.
        num_sequences: calibration sequences of each iteration; the method's own if not given.
        sequence_length: tokens of each sequence.
        micro_batch_size: sequences per forward and backward pass.
        iterations: of the run; the method's own if not given.
        memory: of the engine streaming, as for `prune`.
        processes: of the engine sharded, each with a device like the one here.
        device: "auto", "cpu" or "cuda".
    """

    model: str
    method: str = "adapt-pruner"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    num_sequences: int | None = None
    sequence_length: int = 64
    micro_batch_size: int = 16
    iterations: int | None = None
    memory: str | None = None
    processes: int = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require("processes", self.processes, "at least 1", self.processes >= 1)
        require_choices(self)


@dataclass(frozen=True)
class BenchConfig:
    """Settings of `bench`.

    Args:
        suite: what to measure: kernels.
        ops: ops, separated by commas; a public op such as unit_importance stands for its variants, "all" for
            every one.
        shapes: ROWSxCOLUMNS of weights, separated by commas; the down projections of SmolLM2-135M and
            Llama-3.1-8B if neither these nor models are given.
        models: take the shapes of these models' layers; "all" for every known one.
        dtypes: fp32, bf16 and fp16, separated by commas.
        threads: of the CPU ops; those torch has chosen if not given.
        providers: eager (with and without preallocated temporaries), compile and ours, separated by commas.
        backends: kernels to use, cpu, cuda and triton, separated by commas; "auto" for all that work here.
        rounds: measurements of each case; all cases of a shape take turns.
        clock: time of the wall, or CPU time per thread for cores that are shared with other work (CPU only).
        seed: of the random tensors and of the kept units.
        compare: kernels.csv of an earlier run, to report what became slower.
        threshold: by how much of its time at least, in fractions of one.
        output: directory to create, with the rows as CSV, a plot and the settings.
    """

    suite: Literal["kernels"]
    ops: str = "all"
    shapes: str | None = None
    models: str | None = None
    dtypes: str = "fp32,bf16"
    threads: int | None = None
    providers: str = "eager,compile,ours"
    backends: str = "auto"
    rounds: int = 10
    clock: Literal["wall", "cpu"] = "wall"
    seed: int = 0
    compare: str | None = None
    threshold: float = 0.1
    output: str | None = None

    def __post_init__(self) -> None:
        require("rounds", self.rounds, "at least 1", self.rounds >= 1)
        threads = self.threads
        require("threads", threads, "at least 1, or not given", threads is None or threads >= 1)
        require("seed", self.seed, "at least 0", self.seed >= 0)
        require("threshold", self.threshold, "finite, above 0", 0 < self.threshold < math.inf)
        require("models", self.models, "not given beside shapes", not (self.models and self.shapes))
        require_choices(self)
