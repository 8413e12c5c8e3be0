"""Families of decoder models: one Family object each, found by the `model_type` of a config."""

from adapt_pruner.families.base import (
    Family,
    LayerWidths,
    UnitKind,
    UnitTensor,
    is_uniform,
    layer_widths,
    unit_costs,
    unit_counts,
)
from adapt_pruner.families.llama import LLAMA
from adapt_pruner.families.qwen import QWEN2

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2)


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: no family has this model type; the message lists the known ones.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = sorted(t for family in FAMILIES for t in family.model_types)
    raise ValueError(
        f"unknown architecture: model_type is {model_type!r}, expected one of {known}; "
        "to add one, describe its tensors in adapt_pruner/families/ and list it in FAMILIES"
    )


__all__ = [
    "FAMILIES",
    "Family",
    "LayerWidths",
    "UnitKind",
    "UnitTensor",
    "find_family",
    "is_uniform",
    "layer_widths",
    "unit_costs",
    "unit_counts",
]
