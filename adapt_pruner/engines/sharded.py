"""The sharded engine: every process holds a part of the model, none of them all of it (FSDP2)."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from adapt_pruner.budget import Counts, UnitBudget, model_budget
from adapt_pruner.checkpoint import Checkpoint
from adapt_pruner.config import PruneConfig
from adapt_pruner.engines.device import resolve_device
from adapt_pruner.engines.in_memory import DTYPES
from adapt_pruner.engines.shards import prune_sharded, read_model
from adapt_pruner.families import (
    Granularity,
    LayerWidths,
    find_family,
    layer_widths,
)
from adapt_pruner.kernels.backends import choose_backend
from adapt_pruner.modeling import register
from adapt_pruner.modeling.conversion import pruned_config
from adapt_pruner.plan import Indices, decode_runs, encode_runs
from adapt_pruner.saving import save_model
from adapt_pruner.scoring import Scores
from adapt_pruner.scoring.estimators import TAYLOR_FIRST, Estimator, GqaCredit
from adapt_pruner.scoring.layers import Metric
from adapt_pruner.scoring.sharded import SALIENCIES, score_sharded
from adapt_pruner.sharding import make_mesh, named_tensors, sum_gradients, world

_ALLOCATIONS = ("adaptive", "uniform", "global", "threshold")


class ShardedEngine:
    """Scores and prunes a model of which each process holds a part; all of them call each method alike."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        granularity: Granularity = "kv_group",
    ) -> None:
        self.checkpoint = checkpoint
        family = find_family(checkpoint.config.get("model_type"))
        self.family = family.with_granularity(granularity)
        self.widths = layer_widths(checkpoint.config)
        target = resolve_device(device)
        choose_backend(backend, target)  # fails before the weights are read
        self._backend = backend
        register()
        self._config = AutoConfig.from_pretrained(checkpoint.directory)
        config = pruned_config(self._config, self.widths)  # of the class that a pruned model has
        self.model = read_model(checkpoint, config, make_mesh(target.type), DTYPES.get(dtype))
        sum_gradients(self.model)
        self.measured: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_parameters(self) -> int:
        """Parameters of all processes together; a tied head counts once."""
        return sum(p.numel() for p in named_tensors(self.model).values())

    def budget(self, initial: Counts) -> UnitBudget:
        """Units and their cost in parameters now; `initial` are the units of the original model."""
        shapes = {name: tuple(p.shape) for name, p in named_tensors(self.model).items()}
        return model_budget(self.family, self.widths, shapes, initial)

    def score(
        self,
        batch: Tensor,
        *,
        micro_batch_size: int,
        metric: Metric = "cosine",
        estimator: Estimator = TAYLOR_FIRST,
        gqa_credit: GqaCredit = "owner",
        earlier: Scores | None = None,
        share: float = 1.0,
        **others: Any,
    ) -> Scores:
        """Unit and layer importance from one pass over `batch`, [sequences, length], in which all take part.

        The same on every process; see `scoring.score` for the settings. `others` do not matter to the
        estimators that there are here.
        """
        assert not any(others.get(what) for what in ("grams", "means")), "compensation is refused before"
        return score_sharded(
            self.model,
            self.family,
            self.widths,
            batch.to(self.model.device),
            micro_batch_size=micro_batch_size,
            metric=metric,
            estimator=estimator,
            gqa_credit=gqa_credit,
            earlier=earlier,
            share=share,
            backend=self._backend,
        )

    def remove_units(self, keep: Sequence[Mapping[str, Indices]], **others: Any) -> None:
        """Keeps the named units of every layer, numbered as they are now; the rest is gone for good.

        Args:
            keep: the same on every process.
            others: None, as there is no compensation.
        Raises:
            RuntimeError: the processes would keep different units; nothing has been removed then.
        """
        assert not any(others.get(what) for what in ("grams", "means")), "compensation is refused before"
        self.model, self.widths = prune_sharded(
            self.model, self.family, self.widths, agreed(keep), config=self._config, backend=self._backend
        )
        gc.collect()  # the model before and its hooks refer to each other, so that it would stay

    def save(self, directory: Path) -> None:
        """Writes the model with its tokenizer files, one tensor at a time; appears complete or not at all."""
        save_model(directory, self.model, side_files=self.checkpoint.directory)


def agreed(keep: Sequence[Mapping[str, Indices]]) -> tuple[dict[str, Indices], ...]:
    """The units that the first process keeps, once every other process has come to the same ones.

    Raises:
        RuntimeError: one has not.
    """
    runs = [{kind: encode_runs(indices).tolist() for kind, indices in layer.items()} for layer in keep]
    own = json.dumps(runs)
    decided = [own]
    dist.broadcast_object_list(decided)
    hashes: list[str] = [""] * world().size
    dist.all_gather_object(hashes, hashlib.sha256(own.encode()).hexdigest())
    expected = hashlib.sha256(decided[0].encode()).hexdigest()
    for rank, seen in enumerate(hashes):
        if seen != expected:
            raise RuntimeError(
                f"rank {rank} has chosen other units to keep than rank 0: their hash is {seen}, expected "
                f"{expected}"
            )
    return tuple(
        {kind: decode_runs(np.array(kept)) for kind, kept in layer.items()}
        for layer in json.loads(decided[0])
    )


def require_supported(
    config: PruneConfig, estimator: Estimator | None, widths: Sequence[LayerWidths]
) -> None:
    """That several processes can prune a model together with these settings.

    Args:
        config: resolved.
        widths: of the model.
    Raises:
        ValueError: they cannot; the message names the setting and what can.
    """
    problem = None
    if config.granularity == "layer" or estimator is None:
        problem = "granularity is 'layer', expected 'kv_group' or 'query_head'"
    elif any(layer.num_experts for layer in widths):
        problem = "the model is a mixture of experts, expected a dense one"
    elif estimator not in SALIENCIES:
        problem = f"the estimator is {estimator.name!r}, expected one of {[e.name for e in SALIENCIES]}"
    elif config.allocation not in _ALLOCATIONS:
        problem = f"allocation is {config.allocation!r}, expected one of {list(_ALLOCATIONS)}"
    elif config.compensation != "none":
        problem = f"compensation is {config.compensation!r}, expected 'none'"
    elif config.gradients == "fused":
        problem = "gradients is 'fused', expected 'auto' or 'materialised'"
    elif config.target_latency is not None:
        problem = f"target_latency is {config.target_latency!r}, expected none"
    if problem is not None:
        raise ValueError(f"{problem}, where {world().size} processes prune a model together")
