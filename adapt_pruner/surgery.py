"""Applies keep_indices: to the modules of a live model, and to a checkpoint on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from adapt_pruner.families import (
    Family,
    LayerWidths,
    Segment,
    UnitTensor,
    by_expert,
    find_family,
    layer_widths,
)
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
    for kind in family.kinds_in(widths):
        indices = keep[kind.name]
        if len(indices) == kind.count(widths):
            continue
        members = family.unit_tensors(kind, layer, widths, parameters)
        tensors = {t.name: parameters[t.name].detach() for t in members}
        for name, value in gather_members(tensors, members, indices, backend=backend).items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(value, requires_grad=parameters[name].requires_grad))
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = value.shape
        pruned = kind.resized(pruned, len(indices))
    if pruned != widths:
        _tell_modules(model.get_submodule(prefix), pruned, config=family.config_widths)
    return pruned


def keep_layers(model: Any, family: Family, kept: Sequence[int]) -> None:
    """Removes whole decoder layers from a live causal LM and its config, in place; no weight is copied.

    Args:
        kept: numbers of the layers that stay, ascending; they are numbered anew.
    """
    from adapt_pruner.modeling.conversion import keep_config_layers

    owner, _, leaf = family.layers_module.rpartition(".")
    layers = model.get_submodule(family.layers_module)
    setattr(model.get_submodule(owner), leaf, nn.ModuleList(layers[i] for i in kept))
    for number, layer in enumerate(model.get_submodule(family.layers_module)):
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):  # its place in the KV cache
                module.layer_idx = number
    keep_config_layers(model.config, kept)


def gather_members(
    tensors: Mapping[str, Tensor], members: Sequence[UnitTensor], keep: Indices, *, backend: str = "auto"
) -> dict[str, Tensor]:
    """What the kept units leave of the tensors of one unit kind, by name.

    Of a fused tensor, rows between and behind the members stay.

    Args:
        tensors: those that the members name.
        keep: sorted int64 indices among the units there are now.
    """
    matrices: dict[str, list[Tensor]] = {}
    for part in by_expert(members).values():
        kept = _within_expert(part[0], tensors[part[0].name].shape, keep)
        for name, matrix in _gather_matrices(tensors, part, kept, backend).items():
            matrices.setdefault(name, []).append(matrix)
    results = {}
    for member in members:
        name, shape = member.name, tensors[member.name].shape
        if len(shape) < 3:
            results[name] = matrices[name][0]
        elif member.expert is None:
            results[name] = matrices[name][0].unflatten(0, (-1, shape[1]))
        elif name not in results:
            results[name] = torch.stack(matrices[name])
    return results


def _within_expert(member: UnitTensor, shape: Sequence[int], keep: Indices) -> Indices:
    """The kept units that lie in this member, numbered as in it."""
    if member.expert is None:
        return keep
    rows = member.matrix_shape(shape)[member.dim] if member.segment is None else member.segment.length
    units = rows // member.group_size
    numbers: Indices = keep - member.expert * units
    return numbers[(numbers >= 0) & (numbers < units)]


def _gather_matrices(
    tensors: Mapping[str, Tensor], members: Sequence[UnitTensor], keep: Indices, backend: str
) -> dict[str, Tensor]:
    """The kept units of members that share their units, all of them or those of one expert."""
    gathered = kernels.gather_units(
        [m.view(tensors[m.name]) for m in members],
        [m.dim for m in members],
        [m.group_size for m in members],
        torch.from_numpy(keep),
        backend=backend,
    )
    results: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[Segment, int, Tensor]]] = {}
    for member, value in zip(members, gathered, strict=True):
        if member.segment is None:
            results[member.name] = value
        else:
            parts.setdefault(member.name, []).append((member.segment, member.dim, value))
    for name, values in parts.items():
        dim, end, pieces = values[0][1], 0, []
        whole = replace(members[0], segment=None).view(tensors[name])
        for segment, _, value in sorted(values, key=lambda part: part[0].start):
            pieces += [whole.narrow(dim, end, segment.start - end), value]
            end = segment.start + segment.length
        pieces.append(whole.narrow(dim, end, whole.shape[dim] - end))
        results[name] = torch.cat(pieces, dim)
    return results


def _tell_modules(layer: nn.Module, widths: LayerWidths, *, config: bool) -> None:
    """Updates what stock modules remember of the widths and read in their forward pass."""
    from adapt_pruner.modeling.modeling_adapt import LayerConfigView, choose_experts_function

    heads, kv_heads = widths.num_attention_heads, widths.num_key_value_heads
    names = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    remembered = {**names, "num_heads": heads, "num_key_value_groups": heads // kv_heads}
    if widths.num_experts:
        remembered["num_experts"], remembered["top_k"] = widths.num_experts, widths.experts_per_token
        remembered["intermediate_dim"] = widths.intermediate_size  # of experts alone
    module: Any
    for module in layer.modules():
        for name, value in remembered.items():
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, value)
        if config and "config" in module.__dict__:
            module.config = LayerConfigView(module.config, **names)
    if widths.num_experts:
        choose_experts_function(layer)


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

    from adapt_pruner.modeling.conversion import keep_config_layers, pruned_config

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
    family = family.with_granularity(plan.granularity, plan.mlp_granularity)
    base = layer_widths(checkpoint.config)
    widths = plan.widths(family, base)
    config = AutoConfig.from_pretrained(checkpoint.directory)
    keep_config_layers(config, plan.kept_layers)
    config = pruned_config(config, widths)
    sources = _of_kept_layers(_tensor_sources(plan, checkpoint, family, base), plan, family)
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
    """One tensor of the base checkpoint, what the plan leaves of it, and its name in the pruned model."""

    def __init__(
        self,
        base_name: str,
        name: str,
        info: TensorInfo,
        members: Sequence[UnitTensor] = (),
        keep: Indices | None = None,
    ) -> None:
        self._base_name, self.name, self.info = base_name, name, info
        self._members, self._keep = members, keep

    @property
    def num_bytes(self) -> int:
        numel = self.info.numel
        for member in self._members:
            assert self._keep is not None
            shape = member.matrix_shape(self.info.shape)
            before = shape[member.dim] if member.segment is None else member.segment.length
            after = len(_within_expert(member, self.info.shape, self._keep)) * member.group_size
            numel -= (before - after) * (math.prod(shape) // shape[member.dim])
        return numel * DTYPE_BYTES[self.info.dtype]

    def read(self) -> Tensor:
        with safe_open(self.info.shard, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self._base_name)
        if self._keep is None:
            return tensor
        return gather_members({self._base_name: tensor}, self._members, self._keep)[self._base_name]


def pruned_members(
    keep_indices: Sequence[Mapping[str, Indices]],
    family: Family,
    base: Sequence[LayerWidths],
    tensors: Mapping[str, Any],
) -> dict[str, tuple[list[UnitTensor], Indices]]:
    """Of each tensor that may lose rows or columns: what of it belongs to units, and which of these stay.

    Args:
        keep_indices: per layer and unit kind, as in a plan.
        base: widths of the model before.
        tensors: its tensors, or their headers, by name.
    """
    pruned: dict[str, tuple[list[UnitTensor], Indices]] = {}
    for layer, (widths, keep) in enumerate(zip(base, keep_indices, strict=True)):
        for kind in family.kinds_in(widths):
            for member in family.unit_tensors(kind, layer, widths, tensors):
                if kind.name != "expert" or member.expert is None:  # an expert goes with whole tensors
                    pruned.setdefault(member.name, ([], keep[kind.name]))[0].append(member)
    return pruned


def _tensor_sources(
    plan: PruningPlan, checkpoint: Checkpoint, family: Family, base: tuple[LayerWidths, ...]
) -> list[_TensorSource]:
    pruned = pruned_members(plan.keep_indices, family, base, checkpoint.tensors)
    names = {name: name for name in checkpoint.tensors}
    for layer, (widths, keep) in enumerate(zip(base, plan.keep_indices, strict=True)):
        for kind in family.kinds_in(widths):
            if kind.name == "expert":
                members = family.unit_tensors(kind, layer, widths, checkpoint.tensors)
                _renumber_experts(names, members, keep[kind.name])
    return [
        _TensorSource(base_name, name, checkpoint.tensors[base_name], *pruned.get(base_name, ()))
        for base_name, name in names.items()
    ]


def _renumber_experts(names: dict[str, str], members: Sequence[UnitTensor], keep: Indices) -> None:
    """Takes the tensors of whole experts out of `names` that go, and gives the others their new names."""
    parts = by_expert(members)
    parts.pop(None, None)  # tensors that all experts share
    for part in parts.values():
        for tensor in part:
            del names[tensor.name]
    if parts:
        for number, expert in enumerate(keep.tolist()):
            for old, new in zip(parts[expert], parts[number], strict=True):
                names[old.name] = new.name


def _of_kept_layers(sources: list[_TensorSource], plan: PruningPlan, family: Family) -> list[_TensorSource]:
    """The tensors without those of removed layers, saved under the new numbers of their layers."""
    layers = {family.layer_prefix.format(layer=i): i for i in range(len(plan.keep_indices))}
    numbers = {layer: number for number, layer in enumerate(plan.kept_layers)}
    parts = family.layer_prefix.count(".") + 1
    result = []
    for source in sources:
        prefix = ".".join(source.name.split(".")[:parts])
        layer = layers.get(prefix)
        if layer in plan.removed_layers:
            continue
        if layer is not None:
            new_prefix = family.layer_prefix.format(layer=numbers[layer])
            source.name = new_prefix + source.name.removeprefix(prefix)
        result.append(source)
    return result


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
