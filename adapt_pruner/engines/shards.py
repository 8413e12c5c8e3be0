"""Sharded models that no process ever holds whole: read from a checkpoint, and pruned.

Each process has its part of every tensor and, for a moment, one whole tensor that is pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from adapt_pruner.checkpoint import Checkpoint, CheckpointError
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.modeling.conversion import empty_model, generation_config_of, pruned_config
from adapt_pruner.plan import Indices, pruned_members
from adapt_pruner.sharding import named_tensors, own_rows, shard, sum_gradients, together
from adapt_pruner.surgery import gather_members
from adapt_pruner.tensor_reader import require_fit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel


def read_model(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    *,
    mixed_precision: torch.dtype | None = None,
) -> PreTrainedModel:
    """Reads a verified checkpoint as a sharded causal LM in evaluation mode, on all ranks.

    Every rank reads its own rows of each tensor alone.

    Args:
        checkpoint: without experts, whose tensors have other names in a model.
        config: of the model to make; its tensors are those of the checkpoint.
        mesh: over all ranks, of one dimension.
        dtype: of the weights; None keeps that of the checkpoint.
        mixed_precision: as for `sharding.shard`.
    Raises:
        CheckpointError: tensors that do not fit the config, or weights that are not finite.
        RuntimeError: another rank could not read its part.
    """
    if dtype is None:
        first = next(iter(checkpoint.tensors))
        said = config.dtype
        dtype = said if isinstance(said, torch.dtype) else _read(checkpoint, first, range(1)).dtype
    model = _empty_model(config, dtype, mesh, mixed_precision)
    model.generation_config = generation_config_of(checkpoint)
    weights = named_tensors(model)
    require_fit(checkpoint, {name: tuple(weight.shape) for name, weight in weights.items()})
    wrong = []
    with together():
        for name, weight in weights.items():
            assert isinstance(weight, DTensor)
            own = _read(checkpoint, name, own_rows(weight.shape[0]))
            own = own.to(mesh.device_type, dtype, copy=True)  # off the file mapping
            wrong.append((~own.isfinite()).sum())
            part = DTensor.from_local(
                own, mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
            )
            _put(model, name, part)
    model.tie_weights()
    counts = torch.stack(wrong)
    dist.all_reduce(counts)
    for (name, weight), count in zip(weights.items(), counts.tolist(), strict=True):
        if count:
            raise CheckpointError(
                f"{checkpoint.directory}: {count} of {weight.numel()} values of {name} are NaN or infinite"
            )
    return model


def prune_sharded(
    model: PreTrainedModel,
    family: Family,
    widths: Sequence[LayerWidths],
    keep: Sequence[Mapping[str, Indices]],
    *,
    config: PreTrainedConfig,
    backend: str = "auto",
) -> tuple[PreTrainedModel, tuple[LayerWidths, ...]]:
    """Removes units from all layers of a sharded model, on all ranks; the other weights are not copied.

    Rows that one rank had may go to another one: a tensor that shrinks is gathered, and then shared out anew.

    Args:
        model: as `read_model` or this function returns it, its gradients sums; of no use afterwards, as
            weights are shared.
        widths: its widths now.
        keep: per layer and unit kind, sorted int64 indices among the units there are now.
        config: of the base model.
    Returns:
        The pruned model, of the class that it has on disk, whose gradients are sums too, and its widths.
    """
    pruned = tuple(family.kept_widths(layer, units) for layer, units in zip(widths, keep, strict=True))
    before = named_tensors(model)
    members = pruned_members(keep, family, widths, before)
    weight = next(iter(before.values()))
    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    smaller = _empty_model(pruned_config(config, pruned), model.dtype, mesh)
    sum_gradients(smaller)
    smaller.generation_config = model.generation_config
    for name, empty in named_tensors(smaller).items():
        value = before[name].detach()
        assert isinstance(value, DTensor)
        if value.shape != empty.shape:
            whole = gather_members({name: value.full_tensor()}, *members[name], backend=backend)[name]
            value = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        _put(smaller, name, value)
    smaller.tie_weights()
    return smaller, pruned


def _empty_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    mixed_precision: torch.dtype | None = None,
) -> PreTrainedModel:
    """A sharded model whose weights have no memory yet; buffers, such as rotary frequencies, are there."""
    return shard(empty_model(config, dtype), mesh, mixed_precision=mixed_precision)


def _put(model: PreTrainedModel, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def _read(checkpoint: Checkpoint, name: str, rows: range) -> Tensor:
    """Some rows of a tensor."""
    with safe_open(checkpoint.tensors[name].shard, framework="pt") as file:
        part: Tensor = file.get_slice(name)[rows.start : rows.stop]
    return part
