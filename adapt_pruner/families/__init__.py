"""Families of decoder models: one Family object each, found by the `model_type` of a config."""

from adapt_pruner.families.base import (
    Family,
    Granularity,
    LayerWidths,
    MlpGranularity,
    Segment,
    UnitKind,
    UnitTensor,
    by_expert,
    is_uniform,
    layer_widths,
    removal_counts,
    unit_costs,
    unit_counts,
)
from adapt_pruner.families.gemma import GEMMA2, GEMMA3
from adapt_pruner.families.llama import LLAMA
from adapt_pruner.families.mixtral import MIXTRAL
from adapt_pruner.families.phi import PHI3
from adapt_pruner.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: list[Family] = [LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, MIXTRAL, QWEN3_MOE]


def add_family(family: Family) -> None:
    """Makes a family known to this process; `adapt_pruner.modeling.register_family` adds its classes too.

    Raises:
        ValueError: one of its model types is known already.
    """
    if taken := sorted(set(family.model_types) & set(known_model_types())):
        raise ValueError(f"family {family.name}: model types {taken} are known already")
    FAMILIES.append(family)


def known_model_types() -> list[str]:
    return sorted(t for family in FAMILIES for t in family.model_types)


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: no family has this model type; the message lists the known ones.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if str(model_type).startswith("sliced_"):
        raise ValueError(
            f"model_type is {model_type!r}: a model that slicegpt has sliced cannot be pruned again"
        )
    known = known_model_types()
    raise ValueError(
        f"unknown architecture: model_type is {model_type!r}, expected one of {known}; "
        "docs/families.md shows how to add one"
    )


__all__ = [
    "FAMILIES",
    "Family",
    "Granularity",
    "LayerWidths",
    "MlpGranularity",
    "Segment",
    "UnitKind",
    "UnitTensor",
    "add_family",
    "by_expert",
    "find_family",
    "is_uniform",
    "known_model_types",
    "layer_widths",
    "removal_counts",
    "unit_costs",
    "unit_counts",
]
