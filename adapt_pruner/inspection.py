"""What a model costs, layer by layer, from its headers alone: parameters, FLOPs and KV cache per token."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import DTYPE_BYTES, Checkpoint, open_checkpoint
from adapt_pruner.config import InspectConfig
from adapt_pruner.families import LayerWidths, find_family, layer_widths, unit_costs
from adapt_pruner.modeling.registration import register
from adapt_pruner.plan import PruningPlan


@dataclass(frozen=True)
class LayerSummary:
    """One decoder layer: widths, parameters, forward FLOPs per token, KV-cache bytes per token and in all."""

    widths: LayerWidths
    parameters: int
    flops_per_token: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class ModelSummary:
    """A whole model.

    A multiply-add counts as two FLOPs. `flops_per_token` is the forward pass for one token at the end of
    `context` tokens, the head included and the embedding lookup not. `kv_cache_bytes` is the cache of one
    sequence of `context` tokens; a layer with a sliding window keeps no more than that. `removed_layers` are
    those of the model before pruning that are gone as a whole, where it is compared with that.
    """

    model_type: str
    dtype: str
    context: int
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    layers: tuple[LayerSummary, ...]
    removed_layers: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        for layer in result["layers"]:
            if not layer["widths"]["num_experts"]:
                for key in ("num_experts", "experts_per_token", "hidden_size"):
                    del layer["widths"][key]
        return result


def summarize(model: str | Path, *, context: int = 1024) -> ModelSummary:
    """Summary of the model in a directory; no weight is read.

    Raises:
        CheckpointError: the directory holds no usable checkpoint. ValueError: unknown architecture.
    """
    return summary_of(open_checkpoint(model), context=context)


def summary_of(checkpoint: Checkpoint, *, context: int = 1024) -> ModelSummary:
    """Summary of a model by its config and the headers of its tensors; errors as `summarize`."""
    # Slicing changes the widths of hidden states, none of those that a family knows of.
    family = find_family(str(checkpoint.config.get("model_type")).removeprefix("sliced_"))
    widths = layer_widths(checkpoint.config)
    numel = {name: info.numel for name, info in checkpoint.tensors.items()}
    unit_costs(family, widths, {name: info.shape for name, info in checkpoint.tensors.items()})
    embeddings = sum(numel[name] for name in family.embeddings if name in numel)
    dtypes = Counter[str]()
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.numel
    dtype = dtypes.most_common(1)[0][0]
    windows = attended_tokens(checkpoint, context)
    layers = []
    for i, layer in enumerate(widths):
        prefix = family.layer_prefix.format(layer=i) + "."
        weights = {n: t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        matrices = sum(t.numel for t in weights.values() if len(t.shape) > 1)
        experts = sum(
            weights[name].numel
            for kind in family.kinds_in(layer)
            if kind.layers == "sparse"
            for name in {tensor.name for tensor in family.unit_tensors(kind, i, layer, weights)}
        )
        if experts:  # a token goes through some of them alone
            matrices -= experts // layer.num_experts * (layer.num_experts - layer.experts_per_token)
        cached = 2 * layer.num_key_value_heads * layer.head_dim * DTYPE_BYTES[dtype]
        layers.append(
            LayerSummary(
                layer,
                sum(t.numel for t in weights.values()),
                2 * matrices + 4 * layer.num_attention_heads * layer.head_dim * windows[i],
                cached,
                cached * windows[i],
            )
        )
    head = next(numel[name] for name in reversed(family.embeddings) if name in numel)
    return ModelSummary(
        checkpoint.config["model_type"],
        dtype,
        context,
        checkpoint.num_parameters,
        checkpoint.num_parameters - embeddings,
        sum(layer.flops_per_token for layer in layers) + 2 * head,
        sum(layer.kv_cache_bytes_per_token for layer in layers),
        sum(layer.kv_cache_bytes for layer in layers),
        tuple(layers),
    )


def attended_tokens(checkpoint: Checkpoint, context: int) -> list[int]:
    """Per layer, how many of `context` tokens the last one attends to and the cache keeps."""
    config, num_layers = checkpoint.config, checkpoint.config["num_hidden_layers"]
    window, types = config.get("sliding_window"), config.get("layer_types")
    if window is None:
        return [context] * num_layers
    if types is None:
        # Which layers look at the window alone follows from other keys, as the class of the config knows.
        from transformers import AutoConfig

        register()
        values = {key: value for key, value in config.items() if key != "model_type"}
        built = AutoConfig.for_model(config["model_type"], **values)
        if built.sliding_window is None:
            return [context] * num_layers
        types = getattr(built, "layer_types", None) or ["sliding_attention"] * num_layers
    return [min(context, window) if kind == "sliding_attention" else context for kind in types]


def limits_of_run(run: str | Path) -> dict[str, dict[str, float]]:
    """What a run directory reports of each limited resource: before, target and after; else nothing."""
    path = Path(run) / "metrics.json"
    if not path.exists():
        return {}
    metrics = json.loads(path.read_text(encoding="utf-8"))
    limits: dict[str, dict[str, float]] = {}
    if metrics.get("parameters_target") is not None:  # which a training has not
        limits["parameters"] = {key: metrics[f"parameters_{key}"] for key in ("before", "target", "after")}
    return limits | metrics.get("resources", {})


def inspect_model(config: InspectConfig) -> tuple[ModelSummary, ModelSummary | None]:
    """Summary of a model and, if there is one to compare with, of the model before pruning.

    The model before is `config.base`, or for a run directory the base model of its plan.
    """
    after = summarize(resolve_model(config.model), context=config.context)
    base = config.base
    removed: tuple[int, ...] = ()
    plan_file = Path(config.model) / "plan.json"
    if plan_file.exists():
        plan = PruningPlan.load(plan_file)
        base, removed = base or _base_of(plan), plan.removed_layers
    before = summarize(resolve_model(base), context=config.context) if base else None
    if before:
        after = replace(after, removed_layers=removed)
    if before and len(before.layers) != len(after.layers) + len(removed):
        raise ValueError(
            f"{config.model} has {len(after.layers)} layers, {base} has {len(before.layers)}: "
            "expected a model pruned from it"
        )
    return after, before


def _base_of(plan: PruningPlan) -> str | None:
    """The base model of a plan, or None with a warning where it is gone or has changed."""
    try:
        changed = open_checkpoint(resolve_model(plan.base_model)).fingerprint() != plan.weight_fingerprint
        problem = "its weights have changed" if changed else None
    except ValueError as error:
        problem = str(error)
    if problem:
        warnings.warn(f"nothing to compare with: base model {plan.base_model}: {problem}", stacklevel=2)
        return None
    return plan.base_model


def ratios(after: ModelSummary, before: ModelSummary) -> dict[str, float]:
    """What is left of each total, as a fraction."""
    keys: Sequence[str] = (
        "parameters",
        "non_embedding_parameters",
        "flops_per_token",
        "kv_cache_bytes_per_token",
        "kv_cache_bytes",
    )
    return {key: getattr(after, key) / getattr(before, key) for key in keys}
