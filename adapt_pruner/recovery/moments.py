"""Optimizer moments that go on after a pruning: gathered with the indices that the weights were."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.plan import PruningPlan, pruned_members
from adapt_pruner.recovery.training_state import STATE_NAME, dcp_errors, state_name
from adapt_pruner.sharding import named_tensors
from adapt_pruner.surgery import gather_members

Surgery = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """Moments of a model before a pruning, for the model after it.

    Args:
        state: training state that they are in, as `save_training_state` writes it.
        plan: what the pruning left.
        base: directory of the model before it.
    """

    state: Path
    plan: PruningPlan
    base: Path

    def surgery(self) -> Surgery:
        """What turns a tensor of the shape of a weight before the pruning into one of its shape after it."""
        checkpoint = open_checkpoint(self.base)
        family = find_family(checkpoint.config.get("model_type"))
        family = family.with_granularity(self.plan.granularity, self.plan.mlp_granularity)
        base = layer_widths(checkpoint.config)
        members = pruned_members(self.plan.keep_indices, family, base, checkpoint.tensors)

        def prune(name: str, tensor: Tensor) -> Tensor:
            if name not in members:
                return tensor
            return gather_members({name: tensor}, *members[name])[name]

        return prune


def load_moments(moments: Moments, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Begins an optimizer with what is left of earlier moments, in place, on any number of ranks.

    Every rank reads one parameter's moments at a time, whole, and keeps its part of what the pruning left.
    Learning rates and other settings stay those of the optimizer. Step counts go on, so that the bias
    corrections of AdamW do.

    Args:
        model, optimizer: of the pruned model, sharded or not.
    Raises:
        ValueError: no training state, or moments that do not fit what the plan leaves of the model.
    """
    file = moments.state / STATE_NAME
    if not file.is_file():
        raise ValueError(f"{moments.state}: expected a training state, found no {STATE_NAME}")
    saved_keys: Mapping[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))["optimizer_state"]
    reader = HuggingFaceStorageReader(str(moments.state))
    saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    prune = moments.surgery()
    positions = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for name, parameter in named_tensors(model).items():
        if id(parameter) not in positions or name not in saved_keys:
            continue
        whole = {}
        for key in saved_keys[name]:
            entry = saved[state_name(name, key)]
            whole[state_name(name, key)] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with dcp_errors(f"could not read {moments.state}"):
            dcp.load(whole, storage_reader=reader, no_dist=True)
        own = {}
        for key in saved_keys[name]:
            value = whole[state_name(name, key)]
            own[key] = _part(prune(name, value), name, parameter) if value.ndim else value
        state[positions[id(parameter)]] = own
    groups: list[dict[str, Any]] = [
        {**group, "params": [positions[id(p)] for p in group["params"]]} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _part(moment: Tensor, name: str, parameter: Tensor) -> Tensor:
    """This rank's part of a whole moment."""
    if moment.shape != parameter.shape:
        raise ValueError(
            f"what the pruning leaves of the moments of {name} is {tuple(moment.shape)}, expected "
            f"{tuple(parameter.shape)}"
        )
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        moment = moment.to(mesh.device_type)
        return distribute_tensor(moment, mesh, parameter.placements, src_data_rank=None)
    return moment.to(parameter.device)
