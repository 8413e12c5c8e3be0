"""What a recovery will take before it begins: steps, tokens, time, and memory of each process."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import adapt_pruner.modeling
from adapt_pruner.adapt_accel import plan_stages
from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import Checkpoint, open_checkpoint
from adapt_pruner.engines.device import resolve_device
from adapt_pruner.families import LayerWidths
from adapt_pruner.inspection import summarize
from adapt_pruner.modeling.conversion import keep_config_layers
from adapt_pruner.recovery.config import AccelConfig, RecoverConfig
from adapt_pruner.recovery.losses import default_chunk_tokens
from adapt_pruner.recovery.recover import accumulation_steps, recovery_data, uses_bf16, whole
from adapt_pruner.recovery.trainer import recovery_loss_of
from adapt_pruner.sharding import join_processes

_LAYERS = 2  # of the model that is timed
_ROUNDS = 2


@dataclass(frozen=True)
class Estimate:
    """What a stage, or a recovery alone, will take.

    Args:
        stage: from 1; None of a recovery alone.
        parameters: of the model that is trained.
        steps, sequences, tokens: of the training.
        pruning_minutes, training_minutes: by the rate of forward and backward passes measured here.
        memory_bytes: of the tensors of each process at the peak of the training: weights, gradients, moments,
            activations, logits and teacher.
    """

    stage: int | None
    parameters: int
    steps: int
    sequences: int
    tokens: int
    pruning_minutes: float
    training_minutes: float
    memory_bytes: int


def estimate_recovery(config: RecoverConfig) -> tuple[Estimate, ...]:
    """What `recover` will take with these settings and as many processes as there are; writes nothing.

    Raises:
        ValueError: what `recover` would refuse.
    """
    checkpoint = open_checkpoint(resolve_model(config.model))
    processes = join_processes(resolve_device(config.device).type).size
    accumulation_steps(config, processes)
    part = whole(config, recovery_data(config, checkpoint))
    rate = measured_rate(config, checkpoint)
    parameters = checkpoint.num_parameters
    return (_estimate(config, checkpoint, part.steps, parameters, rate, processes),)


def estimate_accel(config: AccelConfig) -> tuple[Estimate, ...]:
    """What each stage of `accel` will take; writes nothing.

    Of a pruning, the passes over its calibration sequences alone are counted.

    Raises:
        ValueError: what `accel` would refuse.
    """
    checkpoint = open_checkpoint(resolve_model(config.model))
    recovery = config.recovery(config.model, "-", False)
    processes = join_processes(resolve_device(recovery.device).type).size
    setup, stages = plan_stages(config, checkpoint)
    accumulation_steps(recovery, processes)
    rate = measured_rate(recovery, checkpoint)
    base = setup.embeddings if config.target_of == "non-embedding" else 0
    before = setup.budget.num_parameters
    removable = before - setup.budget.floor
    settings = setup.config
    assert settings.iterations is not None
    assert settings.num_sequences is not None  # both resolved
    result = []
    for stage in stages:
        parameters = stage.target + base
        rounds = max(1, round((before - parameters) / removable * settings.iterations))
        tokens = rounds * settings.num_sequences * settings.sequence_length
        flops = _training_flops(checkpoint, settings.sequence_length, before)
        seconds = tokens * flops / rate / processes
        made = _estimate(recovery, checkpoint, stage.steps, parameters, rate, processes)
        result.append(dataclasses.replace(made, stage=stage.number, pruning_minutes=seconds / 60))
        before = parameters
    return tuple(result)


def _estimate(
    config: RecoverConfig, checkpoint: Checkpoint, steps: int, parameters: int, rate: float, processes: int
) -> Estimate:
    """
    Args:
        checkpoint: the model itself, or a larger one that it comes from.
        rate: FLOPs per second of one process.
    """
    sequences = steps * config.batch_size
    tokens = sequences * config.sequence_length
    flops = _training_flops(checkpoint, config.sequence_length, parameters)
    if config.gradient_checkpointing:
        flops *= 4 / 3
    if config.teacher:
        flops += summarize(
            resolve_model(config.teacher), context=_seen(config.sequence_length)
        ).flops_per_token
    seconds = tokens * flops / rate / processes
    memory = _memory(config, checkpoint, parameters, processes)
    return Estimate(None, parameters, steps, sequences, tokens, 0.0, seconds / 60, memory)


def _seen(sequence_length: int) -> int:
    """Tokens that a token attends to on average."""
    return max(1, sequence_length // 2)


def _training_flops(checkpoint: Checkpoint, sequence_length: int, parameters: int) -> float:
    """Of forward and backward pass per token, of a model of this kind with so many parameters."""
    summary = summarize(checkpoint.directory, context=_seen(sequence_length))
    gone = checkpoint.num_parameters - parameters
    return 3 * (summary.flops_per_token - 2 * gone)


def _memory(config: RecoverConfig, checkpoint: Checkpoint, parameters: int, processes: int) -> int:
    """Bytes of one process at the peak."""
    summary = summarize(checkpoint.directory)
    sharded = processes > 1 and config.sharding == "full"
    narrow = 2 if uses_bf16(config) else 4
    share = parameters / checkpoint.num_parameters
    # Weights, gradients and two moments in fp32; of weights that adapters stand in for, themselves.
    held = (4 if config.lora_rank else 16) * parameters / (processes if sharded else 1)
    layers = [share * layer.parameters for layer in summary.layers]
    if sharded:  # what is whole at a time: two layers, and all that is in none
        held += narrow * (2 * max(layers) + parameters - sum(layers))
    elif narrow == 2:
        held += narrow * parameters
    tokens = config.micro_batch_size * config.sequence_length
    hidden, vocabulary = checkpoint.config["hidden_size"], checkpoint.config["vocab_size"]
    kept = [share * narrow * tokens * _kept_per_token(layer.widths, hidden) for layer in summary.layers]
    activations = sum(kept)
    if config.gradient_checkpointing:
        activations = max(kept) + len(kept) * narrow * tokens * hidden
    chunk = default_chunk_tokens(torch.empty(vocabulary, hidden, device="meta"))
    logits = 4 * 4 * vocabulary * min(chunk, tokens) + 4 * vocabulary * hidden  # and the head's gradient
    teacher = open_checkpoint(resolve_model(config.teacher)).num_parameters * narrow if config.teacher else 0
    return int(held + activations + logits + teacher)


def _kept_per_token(widths: LayerWidths, hidden: int) -> int:
    """Numbers that a decoder layer keeps of a token for its backward pass.

    Of the hidden size: inputs of two norms, what these give, and two sums with the residual. Of heads:
    queries, keys and values, queries and keys rotated, and what attention gives. Of channels: gate, up,
    activation and product.
    """
    heads = 3 * widths.num_attention_heads + 3 * widths.num_key_value_heads
    channels = 4 * widths.intermediate_size * max(1, widths.experts_per_token)
    return 6 * hidden + heads * widths.head_dim + channels


def measured_rate(config: RecoverConfig, checkpoint: Checkpoint) -> float:
    """FLOPs per second of forward and backward passes, of a random model with two layers of these shapes."""
    adapt_pruner.modeling.register()
    device = resolve_device(config.device)
    shape = AutoConfig.from_pretrained(checkpoint.directory)
    keep_config_layers(shape, range(min(_LAYERS, shape.num_hidden_layers)))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        ids = torch.randint(0, shape.vocab_size, (config.micro_batch_size, config.sequence_length))
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config)):
            loss = recovery_loss_of(model, {"input_ids": ids, "use_cache": False}, ids, None).loss
        loss.backward()
        loss.item()
        best = min(best, time.perf_counter() - began)
    summary = summarize(checkpoint.directory, context=_seen(config.sequence_length))
    gone = summary.layers[_LAYERS:]
    per_token = 3 * (summary.flops_per_token - sum(layer.flops_per_token for layer in gone))
    return ids.numel() * per_token / best
