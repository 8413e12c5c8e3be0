"""What is limited besides parameters: FLOPs and KV cache, counted from the headers of the original model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapt_pruner.budget import Counts, Limit, UnitBudget, used
from adapt_pruner.checkpoint import DTYPE_BYTES, Checkpoint
from adapt_pruner.config import PruneConfig
from adapt_pruner.families import Family, LayerWidths, layer_widths, unit_costs
from adapt_pruner.inspection import attended_tokens, summarize


@dataclass(frozen=True)
class Resource:
    """A resource that is used in proportion to the units.

    Attributes:
        setting: of the target, for messages.
        cost: as `Limit.cost`.
        before: what the original model uses.
        target: what the pruned model may use.
    """

    name: str
    setting: str
    cost: Counts
    before: int
    target: int

    def limit(self, budget: UnitBudget) -> Limit:
        """With what the model of this budget uses."""
        removed = used(budget.initial, self.cost) - used(budget.current, self.cost)
        return Limit(self.name, self.cost, self.before - removed, self.target)


def find_resources(
    config: PruneConfig, checkpoint: Checkpoint, family: Family, budget: UnitBudget
) -> tuple[Resource, ...]:
    """FLOPs and KV cache, where the settings limit them.

    Args:
        budget: of the model before pruning.
    Raises:
        ValueError: a target that is more than the model uses or less than what cannot go does, or one for
            the KV cache where no unit holds a part of it.
    """
    targets = config.targets()
    if not {"target_flops", "target_kv_cache"} & targets.keys():
        return ()
    summary = summarize(checkpoint.directory, context=config.target_context)
    widths = layer_widths(checkpoint.config)
    tokens = attended_tokens(checkpoint, config.target_context)
    resources = []
    if "target_flops" in targets:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
        cost = unit_flops(family, widths, shapes, tokens)
        resources.append(_resource("flops", "target_flops", cost, summary.flops_per_token, targets, budget))
    if "target_kv_cache" in targets:
        stored = DTYPE_BYTES[summary.dtype]
        kept = {"auto": stored, "fp32": 4}.get(config.dtype, 2)
        cost = unit_cache(family, widths, [kept * n for n in tokens])
        before = summary.kv_cache_bytes * kept // stored
        resources.append(_resource("kv_cache_bytes", "target_kv_cache", cost, before, targets, budget))
    return tuple(resources)


def _resource(
    name: str,
    setting: str,
    cost: Counts,
    before: int,
    targets: Mapping[str, float | int],
    budget: UnitBudget,
) -> Resource:
    value = targets[setting]
    target = int(value * before) if isinstance(value, float) else value
    resource = Resource(name, setting, cost, before, target)
    require_reachable(resource, budget)
    return resource


def require_reachable(resource: Resource, budget: UnitBudget) -> None:
    """Raises a ValueError unless the units that may go can meet the target."""
    limit = resource.limit(budget)
    floor = budget.amount(limit, budget.least)
    if floor == resource.before > resource.target:
        advice = (
            "; it shrinks with whole KV groups: expected granularity kv_group, attention_rate above 0, and "
            "layers with more than one KV head"
        )
        raise ValueError(
            f"{resource.setting} cannot be met: no unit that may go uses {resource.name}"
            f"{advice if resource.name == 'kv_cache_bytes' else ''}"
        )
    if not floor <= resource.target <= resource.before:
        relation = "above what the model uses" if resource.target > resource.before else "below what stays"
        raise ValueError(
            f"{resource.setting} is {resource.target:,} {resource.name}, {relation}: "
            f"expected {floor:,} to {resource.before:,}"
        )


def unit_flops(
    family: Family,
    widths: tuple[LayerWidths, ...],
    matrices: Mapping[str, tuple[int, ...]],
    tokens: list[int],
) -> Counts:
    """Per layer, FLOPs per token that go with each kind: of its parts of the matrices, and of attention.

    Args:
        matrices: shapes of the two-dimensional tensors of the model, by name.
        tokens: per layer, how many the last token attends to.
    """
    costs = []
    for layer, parameters, attended in zip(widths, unit_costs(family, widths, matrices), tokens, strict=True):
        cost = {}
        for kind in family.kinds_in(layer):
            after = kind.resized(layer, kind.count(layer) - kind.lanes(layer))
            heads = layer.num_attention_heads - after.num_attention_heads
            cost[kind.name] = 2 * parameters[kind.name] + 4 * heads * layer.head_dim * attended
        costs.append(cost)
    return tuple(costs)


def unit_cache(family: Family, widths: tuple[LayerWidths, ...], bytes_per_value: list[int]) -> Counts:
    """Per layer, bytes of the KV cache that go with each kind.

    Args:
        bytes_per_value: per layer, bytes of all tokens' values of one row of keys.
    """
    costs = []
    for layer, size in zip(widths, bytes_per_value, strict=True):
        cost = {}
        for kind in family.kinds_in(layer):
            after = kind.resized(layer, kind.count(layer) - kind.lanes(layer))
            heads = layer.num_key_value_heads - after.num_key_value_heads
            cost[kind.name] = 2 * heads * layer.head_dim * size
        costs.append(cost)
    return tuple(costs)
