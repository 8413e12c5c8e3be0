"""Engines: where the weights live while a model is scored and pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapt_pruner.engines.in_memory import InMemoryEngine, load_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapt_pruner.budget import Counts, UnitBudget
    from adapt_pruner.checkpoint import Checkpoint
    from adapt_pruner.families import Family, LayerWidths
    from adapt_pruner.plan import Indices
    from adapt_pruner.scoring import Scores


class Engine(Protocol):
    """What the pruning loop needs of every engine; what only one of them has, it asks that one for.

    Methods are described where they are implemented: `InMemoryEngine` has them with all their settings.
    `measured` is what the record of an iteration has about the engine.
    """

    checkpoint: Checkpoint
    family: Family
    widths: tuple[LayerWidths, ...]
    measured: dict[str, Any]

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def num_parameters(self) -> int: ...

    def budget(self, initial: Counts) -> UnitBudget: ...

    def score(self, batch: Tensor, *args: Any, **kwargs: Any) -> Scores: ...

    def remove_units(self, keep: Sequence[Mapping[str, Indices]], *args: Any, **kwargs: Any) -> None: ...

    def save(self, directory: Path) -> None: ...


__all__ = ["Engine", "InMemoryEngine", "load_model"]
