"""What a family is: which tensors form a prunable unit, along which axis, and how many rows a unit owns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Span = Literal["one", "head", "group", "gate_up", "hidden"]
Part = Literal["query", "kv", "channel"]
Granularity = Literal["kv_group", "query_head", "layer"]
MlpGranularity = Literal["channel", "expert"]


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one decoder layer that pruning may change, and head_dim, which it never changes.

    A layer with a mixture of experts has `num_experts` of them with `intermediate_size` channels each, and a
    token goes through `experts_per_token`. Both, and `hidden_size`, which never changes, are 0 elsewhere.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int
    num_experts: int = 0
    experts_per_token: int = 0
    hidden_size: int = 0

    def span(self, span: Span) -> int:
        """Consecutive rows (or columns) of one unit: 1, head_dim, heads_per_group * head_dim, or those of a
        whole expert in its gate and up or in its down."""
        if span == "one":
            return 1
        if span == "head":
            return self.head_dim
        if span == "gate_up":
            return 2 * self.intermediate_size
        if span == "hidden":
            return self.hidden_size
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

    Experts are one tensor, [experts, rows, columns], in a module: a member is `per_expert` where each of them
    has its own units. In a checkpoint they may be tensors of other names, `stored`, with an `{expert}` field
    where each expert has its own; several `stored` ones share the span.
    """

    name: str
    dim: int
    span: Span
    optional: bool = False
    parts: tuple[Part, ...] = ()
    index: int = 0
    per_expert: bool = False
    stored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Where a member lies in a fused tensor: first row, number of rows, and the rows of the whole tensor."""

    start: int
    length: int
    total: int


@dataclass(frozen=True)
class UnitTensor:
    """A member in a given layer of a given model: full tensor name, unit axis, rows per unit, for a part of a
    fused tensor its segment, and the expert whose units alone it holds, if it does not hold all of them."""

    name: str
    dim: int
    group_size: int
    segment: Segment | None = None
    expert: int | None = None

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the matrix (or vector) in a tensor of this shape whose rows or columns the units own."""
        if len(shape) < 3:
            return tuple(shape)
        return (shape[0] * shape[1], shape[2]) if self.expert is None else tuple(shape[1:])

    def view(self, tensor: Tensor) -> Tensor:
        """The member's rows (or columns) of the tensor called `name`, or of its gradient; no copy."""
        if tensor.ndim == 3:
            tensor = tensor.flatten(0, 1) if self.expert is None else tensor[self.expert]
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
    """A kind of prunable unit, "channel", "expert", "kv_group" or "query_head", with all its member tensors,
    and the layers that have it: those with experts (sparse), those without (dense), or all."""

    name: str
    members: tuple[Member, ...]
    layers: Literal["all", "dense", "sparse"] = "all"

    def is_in(self, widths: LayerWidths) -> bool:
        """Whether a layer of these widths has units of this kind."""
        return self.layers == "all" or (self.layers == "sparse") == (widths.num_experts > 0)

    def count(self, widths: LayerWidths) -> int:
        """Number of units of this kind in a layer; the channels of all experts one after the other."""
        if self.name == "channel":
            return widths.intermediate_size * max(1, widths.num_experts)
        if self.name == "expert":
            return widths.num_experts
        return widths.num_key_value_heads if self.name == "kv_group" else widths.num_attention_heads

    def lanes(self, widths: LayerWidths) -> int:
        """In how many equal runs the units lie that must all lose the same number of them.

        Query heads: one per KV head, since each of those is read by the same number of query heads. Channels
        of experts: one per expert, since the experts of a layer are of one size.
        """
        if self.name == "channel":
            return max(1, widths.num_experts)
        return widths.num_key_value_heads if self.name == "query_head" else 1

    def resized(self, widths: LayerWidths, count: int) -> LayerWidths:
        """The layer's widths once `count` units of this kind remain."""
        if self.name == "channel":
            return replace(widths, intermediate_size=count // self.lanes(widths))
        if self.name == "expert":
            return replace(widths, num_experts=count, experts_per_token=min(widths.experts_per_token, count))
        if self.name == "query_head":
            return replace(widths, num_attention_heads=count)
        heads_per_group = widths.num_attention_heads // widths.num_key_value_heads
        return replace(widths, num_key_value_heads=count, num_attention_heads=count * heads_per_group)


@dataclass(frozen=True)
class Family:
    """An architecture as data.

    `layer_prefix` has a `{layer}` field. `embeddings` are the tensors that "non-embedding" leaves out.
    Tensor names are the same in a live module and in a checkpoint on disk but for members that are `stored`
    under others. `config_widths` says that the stock forward pass reads widths from the config of its modules
    and not from the shapes of their tensors. `expert_kind` are whole experts, which can be the units instead
    of their channels. `models` names well-known ones for people to read, and `source` where they are
    described.
    """

    name: str
    model_types: tuple[str, ...]
    layer_prefix: str
    layers_module: str
    embeddings: tuple[str, ...]
    unit_kinds: tuple[UnitKind, ...]
    config_widths: bool = False
    expert_kind: UnitKind | None = None
    models: str = ""
    source: str = ""

    def with_granularity(
        self, granularity: Granularity, mlp_granularity: MlpGranularity = "channel"
    ) -> Family:
        """The family with attention pruned by whole KV groups or by query heads, and experts by channels or
        as wholes; by "layer" all of them stay whole.

        A query head owns its part of what a kv_group owns on the side of the queries; keys and values stay.

        Raises:
            ValueError: whole experts of a family that has none.
        """
        if mlp_granularity == "expert" and self.expert_kind is None:
            raise ValueError(
                f"mlp_granularity is 'expert', and models of family {self.name} have no experts: expected "
                "'channel'"
            )
        kinds = []
        for kind in self.unit_kinds:
            if kind.name == "kv_group" and granularity == "query_head":
                members = tuple(replace(m, span="head") for m in kind.members if m.span == "group")
                kind = UnitKind("query_head", members)
            elif kind.layers == "sparse" and mlp_granularity == "expert":
                assert self.expert_kind is not None
                kind = self.expert_kind
            kinds.append(kind)
        return replace(self, unit_kinds=tuple(kinds))

    def kinds_in(self, widths: LayerWidths) -> tuple[UnitKind, ...]:
        """The unit kinds of a layer of these widths."""
        return tuple(kind for kind in self.unit_kinds if kind.is_in(widths))

    def kept_widths(self, widths: LayerWidths, keep: Mapping[str, Sized]) -> LayerWidths:
        """Widths of a layer of which, per unit kind, these units stay."""
        for kind in self.kinds_in(widths):
            widths = kind.resized(widths, len(keep[kind.name]))
        return widths

    def unit_tensors(
        self, kind: UnitKind, layer: int, widths: LayerWidths, available: Collection[str]
    ) -> tuple[UnitTensor, ...]:
        """Member tensors of one unit kind in one layer, under the names of a module or of a checkpoint.

        Args:
            available: names of the tensors the model has; optional members (biases) not in it are left out.
        Raises:
            ValueError: a member that every model of the family has is missing.
        """
        prefix = self.layer_prefix.format(layer=layer)
        tensors: list[UnitTensor] = []
        for member in kind.members:
            in_module = f"{prefix}.{member.name}" in available or not member.stored
            places = list((_module_tensors if in_module else _stored_tensors)(member, prefix, widths))
            missing = next((place.name for place in places if place.name not in available), None)
            if missing is None:
                tensors += places
            elif not member.optional:
                raise ValueError(f"family {self.name}: tensor {missing} is missing from the model")
        return tuple(tensors)


def _module_tensors(member: Member, prefix: str, widths: LayerWidths) -> Iterator[UnitTensor]:
    """A member under its name in a module, once for each expert that has its own units in it."""
    segment = None
    if member.parts:
        rows = [widths.part(part) for part in member.parts]
        segment = Segment(sum(rows[: member.index]), rows[member.index], sum(rows))
    tensor = UnitTensor(f"{prefix}.{member.name}", member.dim, widths.span(member.span), segment)
    if member.per_expert:
        yield from (replace(tensor, expert=expert) for expert in range(widths.num_experts))
    else:
        yield tensor


def _stored_tensors(member: Member, prefix: str, widths: LayerWidths) -> Iterator[UnitTensor]:
    """A member under its names in a checkpoint."""
    for stored in member.stored:
        name, rows = f"{prefix}.{stored}", widths.span(member.span) // len(member.stored)
        if "{expert}" not in stored:
            yield UnitTensor(name, member.dim, rows)
            continue
        for expert in range(widths.num_experts):
            yield UnitTensor(name.format(expert=expert), member.dim, rows, expert=expert)


def by_expert(tensors: Iterable[UnitTensor]) -> dict[int | None, tuple[UnitTensor, ...]]:
    """The tensors of one unit kind of a layer by the expert whose units they hold, in order; None is all."""
    parts: dict[int | None, list[UnitTensor]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.expert, []).append(tensor)
    return {expert: tuple(parts[expert]) for expert in sorted(parts, key=lambda e: -1 if e is None else e)}


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
        widths.append(_with_mlp(LayerWidths(heads, kv_heads, 0, head_dim), i, layer))
    return tuple(widths)


def _with_mlp(widths: LayerWidths, index: int, config: Mapping[str, Any]) -> LayerWidths:
    """The widths of a layer with those of its MLP or of its experts."""
    experts = "num_local_experts" if "num_local_experts" in config else "num_experts"
    step = config.get("decoder_sparse_step") or 1
    if not config.get(experts) or index in (config.get("mlp_only_layers") or ()) or (index + 1) % step:
        return replace(widths, intermediate_size=_positive(config, "intermediate_size"))
    count = _positive(config, experts)
    return replace(
        widths,
        intermediate_size=_positive(
            config, "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
        ),
        num_experts=count,
        experts_per_token=min(_positive(config, "num_experts_per_tok"), count),
        hidden_size=_positive(config, "hidden_size"),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def unit_counts(family: Family, widths: Sequence[LayerWidths]) -> tuple[dict[str, int], ...]:
    """Per layer, number of units of each kind."""
    return tuple({kind.name: kind.count(layer) for kind in family.kinds_in(layer)} for layer in widths)


def removal_counts(family: Family, widths: Sequence[LayerWidths]) -> tuple[dict[str, int], ...]:
    """Per layer and kind, how many times units can go: one at a time, or one of each lane together."""
    return tuple(
        {kind.name: kind.count(layer) // kind.lanes(layer) for kind in family.kinds_in(layer)}
        for layer in widths
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
        for kind in family.kinds_in(layer):
            numel = 0
            for tensor in family.unit_tensors(kind, i, layer, shapes):
                shape = tensor.matrix_shape(shapes[tensor.name])
                units = kind.count(layer) // (1 if tensor.expert is None else layer.num_experts)
                owned = units * tensor.group_size
                expected = tensor.segment.total if tensor.segment else owned
                if len(shapes[tensor.name]) == 3 and shapes[tensor.name][0] != layer.num_experts:
                    raise ValueError(
                        f"{tensor.name} has shape {tuple(shapes[tensor.name])}, the config asks for "
                        f"{layer.num_experts} experts"
                    )
                if shape[tensor.dim] != expected:
                    raise ValueError(
                        f"{tensor.name} has shape {tuple(shapes[tensor.name])}, the config asks for "
                        f"{expected} in dimension {tensor.dim}"
                    )
                numel += math.prod(shape) // expected * owned
            cost[kind.name] = numel // (kind.count(layer) // kind.lanes(layer))
        costs.append(cost)
    return tuple(costs)


def is_uniform(widths: Sequence[LayerWidths]) -> bool:
    """Whether the stock architecture can hold the model: all layers have the same widths, those with experts
    among themselves and those without among themselves."""
    mlp = {"intermediate_size": 0, "num_experts": 0, "experts_per_token": 0, "hidden_size": 0}
    attention = {replace(layer, **mlp) for layer in widths}
    kinds_of_mlp = {layer.num_experts > 0 for layer in widths}
    return len(attention) == 1 and len(set(widths)) == len(kinds_of_mlp)
