"""Units of a mixture of experts: channels inside its experts, or whole experts."""

from adapt_pruner.families.base import Member, Part, UnitKind

_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def expert_channel(gate: str, up: str, down: str) -> UnitKind:
    """A channel of one expert: a row in each half of its gate and up, a column of its down.

    Args:
        gate, up, down: their names in a checkpoint, where each expert has its own, with an `{expert}` field.
    """
    parts: tuple[Part, ...] = ("channel", "channel")
    return UnitKind(
        "channel",
        (
            Member(_GATE_UP, 0, "one", parts=parts, index=0, per_expert=True, stored=(gate,)),
            Member(_GATE_UP, 0, "one", parts=parts, index=1, per_expert=True, stored=(up,)),
            Member(_DOWN, 1, "one", per_expert=True, stored=(down,)),
        ),
        layers="sparse",
    )


def whole_expert(gate: str, up: str, down: str, router: str) -> UnitKind:
    """An expert with its row of the router; names as in `expert_channel`."""
    return UnitKind(
        "expert",
        (
            Member(_GATE_UP, 0, "gate_up", stored=(gate, up)),
            Member(_DOWN, 0, "hidden", stored=(down,)),
            Member("mlp.gate.weight", 0, "one", stored=(router,)),
        ),
        layers="sparse",
    )
