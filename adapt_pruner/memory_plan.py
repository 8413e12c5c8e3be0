"""What pruning a model will take with each engine, from its config alone: memory, bytes read, FLOPs, time."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from adapt_pruner.assets import MODELS, resolve_model
from adapt_pruner.checkpoint import Checkpoint, TensorInfo
from adapt_pruner.config import PlanMemoryConfig, PruneConfig, parse_bytes
from adapt_pruner.engines.choice import in_memory_bytes
from adapt_pruner.engines.device import available_memory, resolve_device
from adapt_pruner.engines.in_memory import DTYPES
from adapt_pruner.engines.streaming import streaming_problem
from adapt_pruner.families import Family, find_family, layer_widths
from adapt_pruner.inspection import ModelSummary, summary_of
from adapt_pruner.methods import find_method, resolve
from adapt_pruner.modeling import register
from adapt_pruner.modeling.conversion import empty_model, keep_config_layers
from adapt_pruner.saving import DTYPE_NAMES
from adapt_pruner.scoring.estimators import Estimator
from adapt_pruner.scoring.layerwise import CHUNK_BYTES

_TIMED_TOKENS = 256
_TIMED_BYTES = 64 * 2**20  # weights at most of the layer that is timed
# Widths of that layer, which are halved until it has no more.
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_DISK_BYTES = 256 * 2**20  # that are written and read to time the disk


@dataclass(frozen=True)
class MachineRates:
    """What this machine reaches.

    Args:
        flops_per_second: of a decoder layer of the model, forward and backward, in the dtype of the weights.
        disk_bytes_per_second: reading a file that is in no cache.
        available_bytes: of memory, now.
        disk_directory: where that file was, or None where it was not measured.
    """

    flops_per_second: float
    disk_bytes_per_second: float
    available_bytes: int
    disk_directory: str | None = None


@dataclass(frozen=True)
class EnginePlan:
    """What one engine takes.

    Args:
        engine: "in-memory", "streaming" or "sharded".
        memory_bytes: of tensors at the peak, of each process.
        bytes_read_once: of weights, before the first iteration, by each process.
        bytes_per_iteration: read and written in each iteration: weights, and activations that do not fit.
        flops_per_iteration: of each process.
        seconds_once, seconds_per_iteration: at the rates of this machine, which each process is to have.
        fits: whether the memory that is available now is enough.
        problem: why this engine cannot prune with these settings, or None.
    """

    engine: str
    memory_bytes: int
    bytes_read_once: int
    bytes_per_iteration: int
    flops_per_iteration: float
    seconds_once: float
    seconds_per_iteration: float
    fits: bool
    problem: str | None


@dataclass(frozen=True)
class MemoryPlan:
    """What pruning a model takes.

    Args:
        parameters, layers: of the model.
        weight_bytes: of its checkpoint.
        largest_layer_bytes: of the weights of a decoder layer.
        iterations, calibration_tokens: of a run, and of each iteration.
        processes: of the sharded engine.
    """

    model: str
    parameters: int
    layers: int
    weight_bytes: int
    largest_layer_bytes: int
    iterations: int
    calibration_tokens: int
    processes: int
    machine: MachineRates
    engines: tuple[EnginePlan, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_memory(config: PlanMemoryConfig, *, rates: MachineRates | None = None) -> MemoryPlan:
    """What `prune` with a method's defaults takes of a model that need not be here; no weight is read.

    Times are those of the arithmetic and the disk, whichever is slower, as the streaming engine reads ahead.

    Args:
        rates: instead of those measured now, which takes seconds.
    Raises:
        ValueError: an unknown architecture, a setting that does not fit, a method that scores no units, or
            no directory to measure the disk in.
    """
    path = _path_of(config.model)
    described = _described(config.model, path)
    said = described.dtype if isinstance(described.dtype, torch.dtype) else torch.bfloat16
    dtype = DTYPES.get(config.dtype, said)
    checkpoint = _headers(described, dtype)
    family = find_family(checkpoint.config["model_type"])
    widths = layer_widths(checkpoint.config)
    given = {name: getattr(config, name) for name in ("iterations", "num_sequences", "memory")}
    settings = PruneConfig(
        model=config.model,
        target=0.5,
        output="-",
        method=config.method,
        sequence_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        device=config.device,
        **given,
    )
    settings, estimator = resolve(settings, len(widths), find_method(config.method))
    if estimator is None:
        raise ValueError(f"method is {config.method!r}, expected one that removes units")
    assert settings.num_sequences is not None
    assert settings.iterations is not None  # both resolved
    device = resolve_device(config.device)
    if rates is None:
        flops = layer_flops_per_second(described, dtype, device)
        directory = _disk_directory(path)
        disk = disk_bytes_per_second(directory)
        rates = MachineRates(flops, disk, available_memory(device), str(directory))
    summary = summary_of(checkpoint, context=max(1, settings.sequence_length // 2))
    costs = _Costs(settings, estimator, checkpoint, family, summary, rates)
    engines = (
        costs.in_memory(),
        costs.streaming(streaming_problem(settings, estimator, widths)),
        costs.sharded(config.processes),
    )
    return MemoryPlan(
        config.model,
        checkpoint.num_parameters,
        len(widths),
        checkpoint.num_bytes,
        costs.largest_layer,
        settings.iterations,
        costs.tokens,
        config.processes,
        rates,
        engines,
    )


def _path_of(model: str) -> Path | None:
    """A directory or config.json, of a run or a built-in model too; None where there is none."""
    path = Path(model).expanduser()
    is_run = path.is_dir() and not (path / "config.json").exists()
    if is_run or model in MODELS:
        path = resolve_model(model)
    return path if path.exists() else None


def _disk_directory(path: Path | None) -> Path:
    """Where the disk is measured: beside the model or, where that cannot be, in the working directory."""
    own = [] if path is None else [path if path.is_dir() else path.parent]
    directories = [directory.resolve() for directory in (*own, Path())]
    for directory in directories:
        if os.access(directory, os.W_OK) and shutil.disk_usage(directory).free > _DISK_BYTES:
            return directory
    raise ValueError(
        f"the disk cannot be measured in {' or '.join(map(str, directories))}: expected a directory that can "
        f"be written to, with {_DISK_BYTES / 1e6:.0f} MB of space; try another working directory"
    )


def _described(model: str, path: Path | None) -> PreTrainedConfig:
    """The config of a model: of a directory, a config.json, a built-in model, or one of the hub."""
    register()
    try:
        return AutoConfig.from_pretrained(model if path is None else str(path))
    except OSError as error:
        raise ValueError(
            f"model is {model!r}, expected a directory or config.json, one of {sorted(MODELS)}, or a model "
            f"of the hub: {str(error).splitlines()[0]}"
        ) from error


def _headers(config: PreTrainedConfig, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint of this config as its headers would be; there are no files."""
    tensors = {
        name: TensorInfo(Path(), DTYPE_NAMES[dtype], tuple(p.shape), 0, p.numel() * dtype.itemsize)
        for name, p in empty_model(config, dtype).named_parameters()
    }
    return Checkpoint(Path(), config.to_dict(), tensors)


class _Costs:
    """What all engines have in common, and what each takes."""

    def __init__(
        self,
        settings: PruneConfig,
        estimator: Estimator,
        checkpoint: Checkpoint,
        family: Family,
        summary: ModelSummary,
        rates: MachineRates,
    ) -> None:
        assert settings.num_sequences is not None  # resolved
        self._settings, self._checkpoint, self._rates = settings, checkpoint, rates
        self._memory = in_memory_bytes(settings, estimator, checkpoint, family)
        self._size = checkpoint.num_bytes // checkpoint.num_parameters
        self._one_pass = settings.num_sequences <= settings.micro_batch_size
        self._backward = estimator.loss is not None
        self._layers = [layer.parameters * self._size for layer in summary.layers]
        self._of_layers = sum(layer.flops_per_token for layer in summary.layers)
        self._of_head = summary.flops_per_token - self._of_layers
        self._width = int(checkpoint.config["hidden_size"]) * self._size
        self.tokens = settings.num_sequences * settings.sequence_length
        self.largest_layer = max(self._layers)

    def in_memory(self) -> EnginePlan:
        read = self._checkpoint.num_bytes
        return self._plan("in-memory", sum(self._memory), read, 0, 3, 1)

    def streaming(self, problem: str | None) -> EnginePlan:
        """What goes into each layer; and two layers, one's gradients and activations, or the head."""
        count = len(self._layers)
        gradients = self.largest_layer if self._one_pass else self.largest_layer // self._size * 4
        sweep = 2 * self.largest_layer + self._memory.activations // count
        sweep += gradients if self._backward else 0
        head = int(self._checkpoint.config["vocab_size"]) * self._width
        boundary = self.tokens * self._width
        budget = self._rates.available_bytes // 2
        if self._settings.memory is not None:
            budget = parse_bytes("memory", self._settings.memory)
        kept = min(count + 1, budget // boundary)
        memory = max(sweep, head + 4 * CHUNK_BYTES) + kept * boundary
        weights = sum(self._layers) * (2 if self._backward else 1) + head
        # Written and read once, as the input of a layer once more, and as its gradient once more both.
        uses = [3, *[5] * (count - 1), 4] if self._backward else [2] * (count + 1)
        moved = boundary * sum(uses[kept:])
        # A forward pass, and once more with the backward pass.
        return self._plan("streaming", memory, 0, weights + moved, 4, 1, problem)

    def sharded(self, processes: int) -> EnginePlan:
        """A part of weights and gradients; two layers and what is outside the layers whole."""
        outside = self._checkpoint.num_bytes - sum(self._layers)
        memory = (self._memory.weights + self._memory.gradients) // processes
        memory += 2 * self.largest_layer + outside + self._memory.activations + self._memory.logits
        return self._plan("sharded", memory, self._checkpoint.num_bytes // processes, 0, 3, processes)

    def _plan(
        self,
        engine: str,
        memory: int,
        read_once: int,
        moved: int,
        passes: int,
        processes: int,
        problem: str | None = None,
    ) -> EnginePlan:
        """
        Args:
            moved: bytes from and to the disk in an iteration.
            passes: through the layers, a backward pass as two; one where there is none.
        """
        head = 2 if self._backward else 1  # its weight needs no gradient
        per_token = (passes if self._backward else 1) * self._of_layers + head * self._of_head
        flops = per_token * self.tokens / processes
        return EnginePlan(
            engine,
            memory,
            read_once,
            moved,
            flops,
            read_once / self._rates.disk_bytes_per_second,
            max(flops / self._rates.flops_per_second, moved / self._rates.disk_bytes_per_second),
            memory <= self._rates.available_bytes,
            problem,
        )


def layer_flops_per_second(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> float:
    """What forward and backward pass of a random decoder layer reach, the better of two rounds.

    It is one of the model's where that is small, else one whose widths are halved until it is. FLOPs are
    those of `summary_of`: of the experts that a token goes through alone.
    """
    config = copy.deepcopy(config)
    keep_config_layers(config, range(1))
    config.vocab_size = 256
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    while sum(p.numel() for p in empty_model(config, dtype).parameters()) * dtype.itemsize > _TIMED_BYTES:
        for name in _WIDTHS:
            if hasattr(config, name):
                setattr(config, name, max(1, getattr(config, name) // 2))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        ids = torch.randint(0, 256, (4, _TIMED_TOKENS // 4))
    layer = summary_of(_headers(config, dtype), context=ids.shape[1] // 2).layers[0]
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 3 * layer.flops_per_token * ids.numel() / best


def disk_bytes_per_second(directory: Path) -> float:
    """Reading a file in this directory that is in no cache."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(block)):
            pass
        return _DISK_BYTES / (time.perf_counter() - began)
