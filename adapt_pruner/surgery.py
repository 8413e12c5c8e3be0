"""Applies keep_indices to the modules and tensors of a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner import kernels
from adapt_pruner.families import Family, LayerWidths, Segment, UnitTensor, by_expert
from adapt_pruner.plan import Indices, within_expert


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
        kept = within_expert(part[0], tensors[part[0].name].shape, keep)
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
