"""Which engine a run takes: by the settings, the number of processes and the memory there is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from adapt_pruner.checkpoint import DTYPE_BYTES, Checkpoint
from adapt_pruner.config import PruneConfig
from adapt_pruner.engines.device import available_memory, resolve_device
from adapt_pruner.engines.in_memory import DTYPES
from adapt_pruner.engines.streaming import streaming_problem
from adapt_pruner.families import Family, LayerWidths, layer_widths
from adapt_pruner.scoring.estimators import Estimator
from adapt_pruner.sharding import world


class Choice(NamedTuple):
    """An engine, "in-memory", "streaming" or "sharded", and why it is the one, in a few words."""

    engine: str
    reason: str


def require_engine(config: PruneConfig, estimator: Estimator | None, widths: Sequence[LayerWidths]) -> None:
    """That the engine which the settings name can prune the model with them; no memory is looked at.

    Args:
        config: resolved.
        widths: of the model.
    Raises:
        ValueError: it cannot; the message names the setting and what can.
    """
    processes = world().size
    if processes > 1:
        from adapt_pruner.engines.sharded import require_supported

        if config.engine in ("in-memory", "streaming"):
            raise ValueError(f"engine is {config.engine!r}, which one process has: found {processes}")
        require_supported(config, estimator, widths)
    elif config.engine == "sharded":
        raise ValueError("engine is 'sharded', which several processes share: start them by torchrun")
    elif config.engine == "streaming":
        problem = streaming_problem(config, estimator, widths)
        if problem is not None:
            raise ValueError(f"{problem}, where engine is 'streaming'")


def choose_engine(
    config: PruneConfig,
    estimator: Estimator | None,
    checkpoint: Checkpoint,
    family: Family,
    *,
    before: str | None = None,
) -> Choice:
    """The engine of a run; "auto" takes what fits, with a tenth to spare, and in memory wherever that is.

    Warns where none fits.

    Args:
        config: resolved, of an engine that `require_engine` lets pass.
        before: the engine that a run had which goes on: it keeps it, whatever memory there is now.
    """
    if world().size > 1:
        return Choice("sharded", f"{world().size} processes share the model")
    if config.engine != "auto":
        return Choice(config.engine, "as the settings say")
    if before in ("in-memory", "streaming"):
        return Choice(before, "as before")
    device = resolve_device(config.device)
    needed, available = sum(in_memory_bytes(config, estimator, checkpoint, family)), available_memory(device)
    why = f"the whole model takes about {_gigabytes(needed)}, {_gigabytes(available)} are available"
    if 1.1 * needed <= available:
        return Choice("in-memory", why)
    problem = streaming_problem(config, estimator, layer_widths(checkpoint.config))
    if problem is not None:
        why = f"{why}, but layer by layer it cannot be pruned: {problem}"
        warnings.warn(f"engine in-memory: {why}", stacklevel=2)
        return Choice("in-memory", why)
    return Choice("streaming", why)


class Memory(NamedTuple):
    """Bytes that scoring a whole model takes; activations and logits are those of a micro-batch."""

    weights: int
    gradients: int
    activations: int
    logits: int


def in_memory_bytes(
    config: PruneConfig, estimator: Estimator | None, checkpoint: Checkpoint, family: Family
) -> Memory:
    """About what scoring a whole model takes, from headers alone.

    Of activations, what the backward pass of stock layers keeps.
    """
    assert config.num_sequences is not None  # resolved
    widths = layer_widths(checkpoint.config)
    stored = checkpoint.num_bytes / checkpoint.num_parameters
    size = DTYPES[config.dtype].itemsize if config.dtype != "auto" else round(stored)
    weights = checkpoint.num_parameters * size
    one_pass = config.num_sequences <= config.micro_batch_size
    sequences = 1 if estimator and estimator.loss == "sequence" else config.micro_batch_size
    tokens = min(sequences, config.num_sequences) * config.sequence_length
    hidden, vocabulary = int(checkpoint.config["hidden_size"]), int(checkpoint.config["vocab_size"])
    logits = tokens * vocabulary * (size + 3 * DTYPE_BYTES["F32"])
    if estimator is None or estimator.loss is None:
        return Memory(weights, 0, 0, logits)
    prunable = {
        tensor.name
        for layer, layer_widths_ in enumerate(widths)
        for kind in family.kinds_in(layer_widths_)
        for tensor in family.unit_tensors(kind, layer, layer_widths_, checkpoint.tensors)
    }
    numel = sum(checkpoint.tensors[name].numel for name in prunable)
    sums = {"sequence": 2}.get(estimator.loss, 1)  # Fisher diagonal and gradient
    gradients = numel * (size if one_pass and sums == 1 else 4 * sums)
    if config.gradients == "fused" or estimator.drawn_labels:
        gradients = 0
    activations = tokens * sum(activation_bytes(layer, hidden, size) for layer in widths)
    return Memory(weights, gradients, activations, logits)


def activation_bytes(widths: LayerWidths, hidden: int, size: int) -> int:
    """What the backward pass of a stock decoder layer keeps of a token, in numbers of `size` bytes.

    Norms keep theirs in fp32.
    """
    channels = widths.intermediate_size * max(1, widths.experts_per_token)
    norms = 0 if size == 4 else 4 * 4 * hidden
    return size * (8 * hidden + 4 * channels + 4 * widths.num_attention_heads * widths.head_dim) + norms


def _gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"
