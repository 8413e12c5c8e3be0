"""Applies keep_indices: to the modules of a live model, and to a checkpoint on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adapt_pruner import kernels
from adapt_pruner.checkpoint import (
    DTYPE_BYTES,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    TensorInfo,
    atomic_directory,
    config_hash,
    copy_side_files,
    open_checkpoint,
    require_empty,
    require_free_space,
    write_json,
)
from adapt_pruner.families import Family, LayerWidths, UnitTensor, find_family, layer_widths
from adapt_pruner.plan import Indices, PruningPlan

MAX_SHARD_BYTES = 4 * 2**30


def prune_layer(
    model: nn.Module,
    family: Family,
    layer: int,
    widths: LayerWidths,
    keep: Mapping[str, Indices],
    *,
    backend: str = "auto",
) -> LayerWidths:
    """Removes units from one decoder layer of a live model, in place; the other weights are not touched.

    A unit kind of which everything stays keeps its very tensors.

    Args:
        widths: the layer's widths now.
        keep: per unit kind, sorted int64 indices among the units there are now.
    Returns:
        The layer's widths afterwards.
    """
    pruned = widths
    prefix = family.layer_prefix.format(layer=layer)
    parameters = {f"{prefix}.{name}": p for name, p in model.get_submodule(prefix).named_parameters()}
    for kind in family.unit_kinds:
        indices = keep[kind.name]
        if len(indices) == kind.count(widths):
            continue
        tensors = family.unit_tensors(kind, layer, widths, parameters)
        gathered = kernels.gather_units(
            [parameters[t.name].detach() for t in tensors],
            [t.dim for t in tensors],
            [t.group_size for t in tensors],
            torch.from_numpy(indices),
            backend=backend,
        )
        for tensor, value in zip(tensors, gathered, strict=True):
            owner, _, leaf = tensor.name.rpartition(".")
            module = model.get_submodule(owner)
            old = parameters[tensor.name]
            setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = value.shape
        pruned = kind.resized(pruned, len(indices))
    return pruned


def apply_plan(
    plan: PruningPlan, model: str | Path, output: str | Path, *, uncompensated: bool = False
) -> Path:
    """Replays a plan on the checkpoint it was made for, shard by shard, without building the model.

    The weights keep the dtype they are stored in.

    Args:
        model: directory of the base model, safetensors.
        output: directory to create; it appears complete or not at all.
        uncompensated: replay a plan made with compensation all the same; a plan has kept units alone, so the
            weights are those of the base model.
    Returns:
        `output`.
    Raises:
        ValueError: the plan was made for another model (family, config, widths or weights differ), or with
            compensation.
        CheckpointError: the checkpoint is damaged. FileExistsError: `output` is not empty.
        OSError: the file system of `output` is too small.
    """
    from transformers import AutoConfig

    from adapt_pruner.modeling.conversion import pruned_config

    output = Path(output)
    require_empty(output)
    compensation = plan.settings.get("compensation", "none")
    if compensation != "none" and not uncompensated:
        raise ValueError(
            f"the plan was made with compensation {compensation!r}, and a plan holds the kept units but not "
            "the compensated weights: use the model in its run directory, or ask for the kept units with the "
            "original weights (uncompensated)"
        )
    checkpoint = open_checkpoint(model)
    family = find_family(checkpoint.config.get("model_type"))
    _require_same_model(plan, checkpoint, family)
    base = layer_widths(checkpoint.config)
    config = pruned_config(AutoConfig.from_pretrained(checkpoint.directory), plan.widths(family, base))
    sources = _tensor_sources(plan, checkpoint, family, base)
    shards = _plan_shards(sources)
    require_free_space(output, sum(sum(s.num_bytes for s in shard) for shard in shards))
    with atomic_directory(output) as partial:
        config.save_pretrained(partial)
        copy_side_files(checkpoint.directory, partial)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for source in shard:
                tensors[source.name] = source.read()
                weight_map[source.name] = name
            save_file(tensors, partial / name, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(source.num_bytes for shard in shards for source in shard)
            write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return output


class _TensorSource:
    """One tensor of the base checkpoint and what the plan leaves of it."""

    def __init__(self, name: str, info: TensorInfo, unit: UnitTensor | None, keep: Indices | None) -> None:
        self.name, self.info, self._unit, self._keep = name, info, unit, keep

    @property
    def num_bytes(self) -> int:
        shape = list(self.info.shape)
        if self._unit is not None and self._keep is not None:
            shape[self._unit.dim] = len(self._keep) * self._unit.group_size
        return math.prod(shape) * DTYPE_BYTES[self.info.dtype]

    def read(self) -> Tensor:
        with safe_open(self.info.shard, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        if self._unit is None or self._keep is None:
            return tensor
        keep = torch.from_numpy(self._keep)
        return kernels.gather_units([tensor], [self._unit.dim], [self._unit.group_size], keep)[0]


def _tensor_sources(
    plan: PruningPlan, checkpoint: Checkpoint, family: Family, base: tuple[LayerWidths, ...]
) -> list[_TensorSource]:
    pruned: dict[str, tuple[UnitTensor, Indices]] = {}
    for layer, (widths, keep) in enumerate(zip(base, plan.keep_indices, strict=True)):
        for kind in family.unit_kinds:
            for unit in family.unit_tensors(kind, layer, widths, checkpoint.tensors):
                pruned[unit.name] = (unit, keep[kind.name])
    return [
        _TensorSource(name, info, *pruned.get(name, (None, None)))
        for name, info in checkpoint.tensors.items()
    ]


def _plan_shards(sources: list[_TensorSource]) -> list[list[_TensorSource]]:
    shards: list[list[_TensorSource]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + source.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.num_bytes
    return shards


def _require_same_model(plan: PruningPlan, checkpoint: Checkpoint, family: Family) -> None:
    where = f"{checkpoint.directory}: the plan was made for {plan.base_model}"
    if plan.family != family.name:
        raise ValueError(f"{where}, family {plan.family!r}; this model is of family {family.name!r}")
    for what, expected, seen in (
        ("config", plan.config_hash, config_hash(checkpoint.config)),
        ("weights", plan.weight_fingerprint, checkpoint.fingerprint()),
    ):
        if expected != seen:
            raise ValueError(f"{where}, whose {what} differ: {seen[:12]}, expected {expected[:12]}")
