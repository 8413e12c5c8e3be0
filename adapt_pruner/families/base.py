"""What a family is: which tensors form a prunable unit, along which axis, and how many rows a unit owns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Span = Literal["one", "head", "group"]
Part = Literal["query", "kv", "channel"]
Granularity = Literal["kv_group", "query_head", "layer"]


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one decoder layer that pruning may change, and head_dim, which it never changes."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int

    def span(self, span: Span) -> int:
        """Consecutive rows (or columns) of one unit: 1, head_dim, or heads_per_group * head_dim."""
        if span == "one":
            return 1
        if span == "head":
            return self.head_dim
        return self.num_attention_heads // self.num_key_value_heads * self.head_dim

    def part(self, part: Part) -> int:
        """Rows of one part of a fused tensor: those of all query heads, KV heads or channels."""
        if part == "channel":
            return self.intermediate_size
        return self.head_dim * (self.num_attention_heads if part == "query" else self.num_key_value_heads)


@dataclass(frozen=True)
class Member:
    """One tensor of a unit: name inside the decoder layer, unit axis, and the rows of one unit on it.

    A fused tensor has several `parts` one after the other, of which the member is the one at `index`; its
    units' rows are counted from the start of that part.
    """

    name: str
    dim: int
    span: Span
    optional: bool = False
    parts: tuple[Part, ...] = ()
    index: int = 0


@dataclass(frozen=True)
class Segment:
    """Where a member lies in a fused tensor: first row, number of rows, and the rows of the whole tensor."""

    start: int
    length: int
    total: int


@dataclass(frozen=True)
class UnitTensor:
    """A member in a given layer of a given model: full tensor name, unit axis, rows per unit, and for a part
    of a fused tensor its segment."""

    name: str
    dim: int
    group_size: int
    segment: Segment | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The member's rows (or columns) of the tensor called `name`, or of its gradient; no copy."""
        if self.segment is None:
            return tensor
        return tensor.narrow(self.dim, self.segment.start, self.segment.length)

    def features(self, activation: Tensor, dim: int) -> Tensor:
        """Of the inputs (dim 1) or outputs (dim 0) of the linear layer, [..., features], the member's."""
        if self.segment is None or dim != self.dim:
            return activation
        return activation.narrow(-1, self.segment.start, self.segment.length)


@dataclass(frozen=True)
class UnitKind:
    """A kind of prunable unit, "channel", "kv_group" or "query_head", with all its member tensors."""

    name: str
    members: tuple[Member, ...]

    def count(self, widths: LayerWidths) -> int:
        """Number of units of this kind in a layer."""
        if self.name == "channel":
            return widths.intermediate_size
        return widths.num_key_value_heads if self.name == "kv_group" else widths.num_attention_heads

    def lanes(self, widths: LayerWidths) -> int:
        """In how many equal runs the units lie that must all lose the same number of them.

        Query heads: one per KV head, since each of those is read by the same number of query heads.
        """
        return widths.num_key_value_heads if self.name == "query_head" else 1

    def resized(self, widths: LayerWidths, count: int) -> LayerWidths:
        """The layer's widths once `count` units of this kind remain."""
        if self.name == "channel":
            return replace(widths, intermediate_size=count)
        if self.name == "query_head":
            return replace(widths, num_attention_heads=count)
        heads_per_group = widths.num_attention_heads // widths.num_key_value_heads
        return replace(widths, num_key_value_heads=count, num_attention_heads=count * heads_per_group)


@dataclass(frozen=True)
class Family:
    """An architecture as data.

    `layer_prefix` has a `{layer}` field. `embeddings` are the tensors that "non-embedding" leaves out.
    Tensor names are the same in a live module and in a checkpoint on disk. `config_widths` says that the
    stock forward pass reads widths from the config of its modules and not from the shapes of their tensors.
    `models` names well-known ones for people to read.
    """

    name: str
    model_types: tuple[str, ...]
    layer_prefix: str
    layers_module: str
    embeddings: tuple[str, ...]
    unit_kinds: tuple[UnitKind, ...]
    config_widths: bool = False
    models: str = ""

    def with_granularity(self, granularity: Granularity) -> Family:
        """The family with attention pruned by whole KV groups, or by query heads; by "layer" both stay whole.

        A query head owns its part of what a kv_group owns on the side of the queries; keys and values stay.
        """
        if granularity != "query_head":
            return self
        kinds = []
        for kind in self.unit_kinds:
            if kind.name == "kv_group":
                members = tuple(replace(m, span="head") for m in kind.members if m.span == "group")
                kind = UnitKind("query_head", members)
            kinds.append(kind)
        return replace(self, unit_kinds=tuple(kinds))

    def unit_tensors(
        self, kind: UnitKind, layer: int, widths: LayerWidths, available: Collection[str]
    ) -> tuple[UnitTensor, ...]:
        """Member tensors of one unit kind in one layer.

        Args:
            available: names of the tensors the model has; optional members (biases) not in it are left out.
        Raises:
            ValueError: a member that every model of the family has is missing.
        """
        prefix = self.layer_prefix.format(layer=layer)
        tensors = []
        for member in kind.members:
            name = f"{prefix}.{member.name}"
            if name in available:
                segment = None
                if member.parts:
                    rows = [widths.part(part) for part in member.parts]
                    segment = Segment(sum(rows[: member.index]), rows[member.index], sum(rows))
                tensors.append(UnitTensor(name, member.dim, widths.span(member.span), segment))
            elif not member.optional:
                raise ValueError(f"family {self.name}: tensor {name} is missing from the model")
        return tuple(tensors)


def gated_mlp_channel(prefix: str = "mlp") -> UnitKind:
    """One intermediate neuron of a gated MLP: a row of gate and up, a column of down."""
    return UnitKind(
        "channel",
        (
            Member(f"{prefix}.gate_proj.weight", 0, "one"),
            Member(f"{prefix}.up_proj.weight", 0, "one"),
            Member(f"{prefix}.down_proj.weight", 1, "one"),
            Member(f"{prefix}.gate_proj.bias", 0, "one", optional=True),
            Member(f"{prefix}.up_proj.bias", 0, "one", optional=True),
        ),
    )


def attention_kv_group(prefix: str = "self_attn") -> UnitKind:
    """One KV head with the query heads that read it: rows of q, k, v, columns of o."""
    return UnitKind(
        "kv_group",
        (
            Member(f"{prefix}.q_proj.weight", 0, "group"),
            Member(f"{prefix}.k_proj.weight", 0, "head"),
            Member(f"{prefix}.v_proj.weight", 0, "head"),
            Member(f"{prefix}.o_proj.weight", 1, "group"),
            Member(f"{prefix}.q_proj.bias", 0, "group", optional=True),
            Member(f"{prefix}.k_proj.bias", 0, "head", optional=True),
            Member(f"{prefix}.v_proj.bias", 0, "head", optional=True),
        ),
    )


def fused_gated_mlp_channel(prefix: str = "mlp") -> UnitKind:
    """A channel where gate and up are one tensor: a row in each half of it, a column of down."""
    name = f"{prefix}.gate_up_proj.weight"
    parts: tuple[Part, ...] = ("channel", "channel")
    return UnitKind(
        "channel",
        (
            Member(name, 0, "one", parts=parts, index=0),
            Member(name, 0, "one", parts=parts, index=1),
            Member(f"{prefix}.down_proj.weight", 1, "one"),
        ),
    )


def fused_attention_kv_group(prefix: str = "self_attn") -> UnitKind:
    """A KV head with its query heads where q, k and v are one tensor."""
    name = f"{prefix}.qkv_proj.weight"
    parts: tuple[Part, ...] = ("query", "kv", "kv")
    return UnitKind(
        "kv_group",
        (
            Member(name, 0, "group", parts=parts, index=0),
            Member(name, 0, "head", parts=parts, index=1),
            Member(name, 0, "head", parts=parts, index=2),
            Member(f"{prefix}.o_proj.weight", 1, "group"),
        ),
    )


def layer_widths(config: Mapping[str, Any]) -> tuple[LayerWidths, ...]:
    """Widths of every decoder layer.

    Args:
        config: the contents of a `config.json` (or `PreTrainedConfig.to_dict()`), stock or with
            `per_layer_config`.
    Raises:
        ValueError: a width is missing or not a positive integer, or heads do not divide into groups.
    """
    overrides = {int(i): values for i, values in (config.get("per_layer_config") or {}).items()}
    if config.get("head_dim") is not None:
        head_dim = _positive(config, "head_dim")
    else:
        head_dim = _positive(config, "hidden_size") // _positive(config, "num_attention_heads")
    layers = range(_positive(config, "num_hidden_layers"))
    if not set(overrides) <= set(layers):
        raise ValueError(
            f"config.json: per_layer_config has layers {sorted(overrides)}, expected 0 to {len(layers) - 1}"
        )
    widths = []
    for i in layers:
        layer = {**config, **overrides.get(i, {})}
        heads = _positive(layer, "num_attention_heads")
        kv_heads = _positive(layer, "num_key_value_heads") if layer.get("num_key_value_heads") else heads
        if heads % kv_heads:
            raise ValueError(f"layer {i}: {heads} attention heads are not a multiple of {kv_heads} KV heads")
        widths.append(LayerWidths(heads, kv_heads, _positive(layer, "intermediate_size"), head_dim))
    return tuple(widths)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def unit_counts(family: Family, widths: Sequence[LayerWidths]) -> tuple[dict[str, int], ...]:
    """Per layer, number of units of each kind."""
    return tuple({kind.name: kind.count(layer) for kind in family.unit_kinds} for layer in widths)


def removal_counts(family: Family, widths: Sequence[LayerWidths]) -> tuple[dict[str, int], ...]:
    """Per layer and kind, how many times units can go: one at a time, or one of each lane together."""
    return tuple(
        {kind.name: kind.count(layer) // kind.lanes(layer) for kind in family.unit_kinds} for layer in widths
    )


def unit_costs(
    family: Family, widths: Sequence[LayerWidths], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], ...]:
    """Per layer, parameters that go at a time with each kind: those of one unit, or of one per lane.

    Args:
        shapes: shape of every tensor of the model, by name.
    Raises:
        ValueError: a tensor is missing, or its shape does not fit the widths.
    """
    costs = []
    for i, layer in enumerate(widths):
        cost = {}
        for kind in family.unit_kinds:
            tensors = family.unit_tensors(kind, i, layer, shapes)
            for tensor in tensors:
                segment = tensor.segment
                expected = kind.count(layer) * tensor.group_size if segment is None else segment.total
                if shapes[tensor.name][tensor.dim] != expected:
                    raise ValueError(
                        f"{tensor.name} has shape {tuple(shapes[tensor.name])}, the config asks for "
                        f"{expected} in dimension {tensor.dim}"
                    )
            per_unit = sum(math.prod(shapes[t.name]) // shapes[t.name][t.dim] * t.group_size for t in tensors)
            cost[kind.name] = per_unit * kind.lanes(layer)
        costs.append(cost)
    return tuple(costs)


def is_uniform(widths: Sequence[LayerWidths]) -> bool:
    """Whether all layers have the same widths, so that the stock architecture can hold the model."""
    return len(set(widths)) == 1
