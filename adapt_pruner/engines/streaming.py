"""The streaming engine: one decoder layer at a time, from the files of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adapt_pruner.apply import KeptTensor
from adapt_pruner.budget import Counts, UnitBudget, model_budget
from adapt_pruner.checkpoint import Checkpoint, CheckpointError
from adapt_pruner.config import PruneConfig
from adapt_pruner.engines.device import available_memory, resolve_device
from adapt_pruner.engines.in_memory import DTYPES
from adapt_pruner.families import (
    Granularity,
    LayerWidths,
    find_family,
    layer_widths,
    unit_counts,
)
from adapt_pruner.kernels.backends import choose_backend
from adapt_pruner.plan import Indices, pruned_members
from adapt_pruner.saving import DTYPE_NAMES, save_model
from adapt_pruner.scoring import Scores
from adapt_pruner.scoring.boundaries import bytes_on_disk
from adapt_pruner.scoring.estimators import ESTIMATORS, TAYLOR_FIRST, Estimator, GqaCredit
from adapt_pruner.scoring.gradients import Gradients
from adapt_pruner.scoring.layers import Metric
from adapt_pruner.scoring.layerwise import LayerwiseModel
from adapt_pruner.scoring.streamed import score_streamed, streamable
from adapt_pruner.shard_io import write_shards
from adapt_pruner.sharding import named_tensors
from adapt_pruner.tensor_reader import TORCH_DTYPES, KeptMembers, TensorReader, require_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamingEngine:
    """Scores and prunes a model of which at most two decoder layers are in memory, or one beside the head.

    Nothing is written between iterations: the model is the base checkpoint and the units of it that are kept.

    Attributes:
        measured: of the last scoring, what the record of an iteration has about it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        directory: Path,
        memory: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        granularity: Granularity = "kv_group",
    ) -> None:
        """
        Args:
            directory: where activations go that do not fit the memory, in a file without a name.
            memory: bytes for activations between the forward and the backward sweep; None for half of what
                is available on the device and, beside a GPU, of the host.
        Raises:
            CheckpointError: tensors that do not fit the config, or values outside the layers that are NaN or
                infinite.
            BackendUnavailable: the named backend is not usable here.
        """
        from transformers import AutoConfig

        self.checkpoint, self._directory, self._memory, self._backend = checkpoint, directory, memory, backend
        family = find_family(checkpoint.config.get("model_type"))
        self.family = family.with_granularity(granularity)
        self.widths = self._base_widths = layer_widths(checkpoint.config)
        self.device = resolve_device(device)
        choose_backend(backend, self.device)
        self._config = AutoConfig.from_pretrained(checkpoint.directory)
        first = next(iter(checkpoint.tensors.values()))
        self._dtype: torch.dtype = DTYPES.get(dtype) or self._config.dtype or TORCH_DTYPES[first.dtype]
        self._reader = TensorReader(checkpoint, dtype=self._dtype, device=self.device, backend=backend)
        self._keep: tuple[dict[str, Indices], ...] = tuple(
            {kind: np.arange(count) for kind, count in layer.items()}
            for layer in unit_counts(self.family, self.widths)
        )
        self.measured: dict[str, Any] = {}
        self._build()
        within = f"{self.family.layers_module}."
        # The layers are looked at as they are read.
        self._reader.require_finite(name for name in self._shapes() if not name.startswith(within))

    @property
    def model(self) -> PreTrainedModel:
        """The model with the widths it has now; its parameters have no memory."""
        return self._parts.skeleton

    @property
    def num_parameters(self) -> int:
        """Parameters now; a tied head counts once."""
        return sum(p.numel() for p in self.model.parameters())

    def budget(self, initial: Counts) -> UnitBudget:
        """Units and their cost in parameters now; `initial` are the units of the original model."""
        return model_budget(self.family, self.widths, self._shapes(), initial)

    def score(
        self,
        batch: Tensor,
        *,
        micro_batch_size: int,
        metric: Metric = "cosine",
        gradients: Gradients = "auto",
        estimator: Estimator = TAYLOR_FIRST,
        gqa_credit: GqaCredit = "owner",
        seed: tuple[int, ...] = (0,),
        earlier: Scores | None = None,
        share: float = 1.0,
        **others: Any,
    ) -> Scores:
        """Unit and layer importance from two sweeps over the layers with `batch`, [sequences, length].

        See `scoring.score` for the settings; `others` do not matter to the estimators that there are here.

        Raises:
            CheckpointError: also if a file of the checkpoint has changed since the engine was made.
        """
        assert not any(others.get(what) for what in ("grams", "means")), "compensation is refused before"
        before = self._reader.bytes_read
        scores, sweeps = score_streamed(
            self._parts,
            self.family,
            self.widths,
            batch.to(self.device),
            micro_batch_size=micro_batch_size,
            memory=self._boundary_memory(),
            directory=self._directory,
            metric=metric,
            gradients=gradients,
            estimator=estimator,
            gqa_credit=gqa_credit,
            seed=seed,
            earlier=earlier,
            share=share,
            backend=self._backend,
        )
        self.checkpoint.require_unchanged()
        self.measured = {
            "sweep_seconds": sweeps.seconds,
            "weight_bytes_read": self._reader.bytes_read - before,
            "boundaries_in_memory": sweeps.boundaries_in_memory,
            "boundaries_on_disk": sweeps.boundaries_on_disk,
            "boundary_bytes_moved": sweeps.boundary_bytes,
        }
        return scores

    def disk_bytes(self, sequences: int, length: int) -> int:
        """Of activations that scoring as many sequences will have on the disk."""
        shape = (sequences, length, self._parts.hidden_size)
        return bytes_on_disk(len(self.widths) + 1, shape, self._dtype, self._boundary_memory())

    def _boundary_memory(self) -> int:
        if self._memory is not None:
            return self._memory
        devices = {self.device, torch.device("cpu")}
        return sum(available_memory(device) // 2 for device in devices)

    def remove_units(self, keep: Sequence[Mapping[str, Indices]], **others: Any) -> None:
        """Keeps the named units of every layer, numbered as they are now; the rest is not read any more.

        Args:
            others: None, as there is no compensation.
        """
        assert not any(others.get(what) for what in ("grams", "means")), "compensation is refused before"
        self.widths = tuple(
            self.family.kept_widths(layer, units) for layer, units in zip(self.widths, keep, strict=True)
        )
        self._keep = tuple(
            {kind: old[kind][new[kind]] for kind in old} for old, new in zip(self._keep, keep, strict=True)
        )
        self._build()

    def save(self, directory: Path) -> None:
        """Writes the model with its tokenizer files; it appears complete or not at all.

        File to file where the checkpoint has the dtype, else one tensor at a time.
        """
        stored = {name: self.checkpoint.tensors[name] for name in named_tensors(self.model)}

        def copy(partial: Path) -> None:
            kept = {name: KeptTensor(info, *self._members.get(name, ())) for name, info in stored.items()}
            write_shards(partial, [tensor.as_new(name) for name, tensor in kept.items()])
            self.checkpoint.require_unchanged()

        self._reader.require_finite(stored)
        as_it_is = {info.dtype for info in stored.values()} == {DTYPE_NAMES.get(self._dtype)}
        save_model(
            directory,
            self.model,
            dtype=self._dtype,
            side_files=self.checkpoint.directory,
            read=self._read,
            write=copy if as_it_is else None,
        )

    def _build(self) -> None:
        """The parts of the model as it is now."""
        from adapt_pruner.modeling.conversion import empty_model, generation_config_of, pruned_config

        skeleton = empty_model(pruned_config(self._config, self.widths), self._dtype)
        skeleton.generation_config = generation_config_of(self.checkpoint)
        if self.widths == self._base_widths:
            require_fit(self.checkpoint, {name: tuple(p.shape) for name, p in skeleton.named_parameters()})
        members = pruned_members(self._keep, self.family, self._base_widths, self.checkpoint.tensors)
        if stray := sorted(members.keys() - dict(skeleton.named_parameters()).keys()):
            raise CheckpointError(
                f"{self.checkpoint.directory}: {stray[:3]} belong to units, but a model with this config has "
                "no such tensors"
            )
        whole = {
            name
            for name, (of_tensor, keep) in members.items()
            if tuple(skeleton.get_parameter(name).shape) == self.checkpoint.tensors[name].shape
        }
        self._members: dict[str, KeptMembers] = {n: kept for n, kept in members.items() if n not in whole}
        self._parts = LayerwiseModel(
            skeleton, self.family, self.device, read=self._read, read_rows=self._reader.read_rows
        )

    def _read(self, name: str) -> Tensor:
        return self._reader.read(name, self._members.get(name))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}


_ALLOCATIONS = ("adaptive", "uniform", "global", "threshold", "reference")


def streaming_problem(
    config: PruneConfig, estimator: Estimator | None, widths: Sequence[LayerWidths]
) -> str | None:
    """Why a model cannot be pruned layer by layer with these settings, or None.

    Args:
        config: resolved.
        widths: of the model.
    """
    if config.granularity == "layer" or estimator is None:
        return "granularity is 'layer', expected 'kv_group' or 'query_head'"
    if any(layer.num_experts for layer in widths):
        return "the model is a mixture of experts, expected a dense one"
    if not streamable(estimator):
        able = [each.name for each in ESTIMATORS if streamable(each)]
        return f"the estimator is {estimator.name!r}, expected one of {able}"
    if config.allocation not in _ALLOCATIONS:
        return f"allocation is {config.allocation!r}, expected one of {list(_ALLOCATIONS)}"
    if config.compensation != "none":
        return f"compensation is {config.compensation!r}, expected 'none'"
    if config.target_latency is not None:
        return f"target_latency is {config.target_latency!r}, expected none"
    return None
