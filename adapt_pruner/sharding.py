"""Fully sharded models: every rank holds a part of each weight, gradient and moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from adapt_pruner.families import find_family

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


class World(NamedTuple):
    """This process among all that work together: its rank, from 0, and how many there are."""

    rank: int
    size: int


def world() -> World:
    """Rank and number of processes; rank 0 of 1 where torch.distributed has not been initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size())


def join_processes(device_type: str) -> World:
    """Joins the processes that torchrun has started, over gloo on CPUs and NCCL on GPUs; none of none.

    Args:
        device_type: "cpu" or "cuda".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if device_type == "cpu" else "nccl")
    return world()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that no rank leaves before all have reached its end, and that fails on all if it fails on one.

    Raises:
        RuntimeError: it has failed on another rank, which the message names.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures: list[Any] = [None]
    if world().size > 1:
        failures = [None] * world().size
        dist.all_gather_object(failures, None if error is None else repr(error))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RuntimeError(f"rank {rank} has failed: {failure}")


def make_mesh(device_type: str, *, replicate: bool = False) -> DeviceMesh:
    """All processes as one group that shares a model, or with `replicate` each with a replica of its own."""
    if replicate:
        return init_device_mesh(device_type, (world().size, 1), mesh_dim_names=("replicas", "shards"))
    return init_device_mesh(device_type, (world().size,))


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been applied to the model."""
    return isinstance(model, FSDPModule)


def is_replicated(model: nn.Module) -> bool:
    """Whether `shard` has made replicas of the model, each of which may be sharded itself."""
    parameter = next(iter(model.parameters()))
    return isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2


def shard(
    model: PreTrainedModel, mesh: DeviceMesh, *, mixed_precision: torch.dtype | None = None
) -> PreTrainedModel:
    """Shards a causal LM in place over the ranks of a mesh, each decoder layer as one group, the rest as one.

    The optimizer has to be made afterwards, of the sharded parameters. Gradients are averaged over the ranks.
    Gradient checkpointing is the model's own `gradient_checkpointing_enable`, before or after.

    Args:
        model: with the same weights on every rank; it moves to the mesh's devices layer by layer.
        mesh: over all ranks, of "cpu" (gloo) or "cuda" (nccl): one dimension, or two, where ranks along the
            first are replicas and those along the second share one.
        mixed_precision: torch.bfloat16 computes in it, with weights kept in fp32; None computes in the dtype
            of the weights. Gradients are summed over the ranks in fp32.
    Returns:
        The same object. Its head and embedding stay whole between a forward and the backward pass, and after
        a forward pass without one, when `parameters()` has them whole; `named_tensors` always has the parts.
    Raises:
        ValueError: a model that is sharded already or of an unknown family, a mesh of more dimensions, or
            another dtype.
    """
    if is_sharded(model):
        raise ValueError("the model is sharded already, expected one that is not")
    if mesh.ndim > 2:
        raise ValueError(f"the mesh has shape {tuple(mesh.shape)}, expected one dimension or two")
    if mixed_precision not in (None, torch.bfloat16):
        raise ValueError(f"mixed_precision is {mixed_precision}, expected torch.bfloat16 or None")
    causal: Any = getattr(model, "get_base_model", lambda: model)()  # without adapters around it
    family = find_family(str(causal.config.model_type).removeprefix("sliced_"))
    policy = MixedPrecisionPolicy(param_dtype=mixed_precision, reduce_dtype=torch.float32)
    layers = list(causal.get_submodule(family.layers_module).children())
    for module in (*layers, model):
        if mixed_precision is not None:
            _to_fp32(module)
        # The root is needed again as soon as the backward pass begins.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
    return model


def sum_gradients(model: PreTrainedModel) -> None:
    """Makes the gradients of a sharded model sums over the ranks instead of means."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor


def own_rows(rows: int) -> range:
    """Which rows of a sharded tensor this rank has; none where there are fewer rows than ranks."""
    rank, size = world()
    each = -(-rows // size)
    return range(min(rank * each, rows), min((rank + 1) * each, rows))


def _to_fp32(module: nn.Module) -> None:
    """Turns the weights that are not sharded yet into fp32; tied ones stay tied."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones once, by their first name; the parts if sharded."""
    # state_dict, not named_parameters: it first puts the parts back where a forward pass left whole weights.
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return dict(named.values())
