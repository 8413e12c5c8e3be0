"""Training state on disk, written by any number of ranks and read by any other, without pickle."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from adapt_pruner.checkpoint import header_text, read_header, write_json
from adapt_pruner.saving import shared_directory
from adapt_pruner.sharding import named_tensors, world

if TYPE_CHECKING:
    from torch.optim import Optimizer

STATE_NAME = "training_state.json"
_FILE_BYTES = 256 * 2**20
# How an optimizer computes, which is the process's own choice; the rest of a parameter group is saved.
_IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")


def save_training_state(directory: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Writes weights, moments and settings of the optimizer, as they are, for `load_training_state`.

    Every rank calls it and writes its own parts; what is the same on all ranks is written by rank 0. The same
    state gives the same bytes, and the directory appears when all of it is there.

    Args:
        directory: absent or empty, on a file system that all ranks share.
        model: sharded or not; the same on every rank if not.
        optimizer: one over parameters of `model` whose state is tensors, such as AdamW.
    Raises:
        ValueError: the optimizer has parameters that are not the model's, or state that cannot be saved.
        FileExistsError: `directory` is not empty. OSError: it could not be written.
        RuntimeError: another rank has failed.
    """
    parameters = named_tensors(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    groups, kept = [], {}
    for group, names in zip(optimizer.param_groups, _group_names(optimizer, parameters), strict=True):
        groups.append({"params": names, **{k: v for k, v in group.items() if k not in _IMPLEMENTATION}})
        for name in names:
            state = optimizer.state.get(parameters[name], {})
            kept[name] = sorted(state)
            tensors |= {state_name(name, key): value for key, value in state.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is {value!r}, expected a tensor")
    description = {"param_groups": groups, "optimizer_state": kept}
    try:
        json.dumps(description)
    except TypeError as error:
        raise ValueError(f"the settings of the optimizer are not all numbers: {error}") from error
    with shared_directory(Path(directory)) as partial:
        _write_parts(partial, tensors)
        if world().rank == 0:
            write_json(partial / STATE_NAME, description)


def load_training_state(directory: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Puts a saved training state into a model and its optimizer, in place, on any number of ranks.

    Args:
        directory: what `save_training_state` has written.
        model, optimizer: of the same parameters and parameter groups; sharded or not, whatever was saved.
    Raises:
        ValueError: no training state, a damaged one, or one with missing, unexpected or different tensors or
            parameter groups. Nothing has been changed then.
    """
    directory = Path(directory)
    if not (directory / STATE_NAME).is_file():
        raise ValueError(f"{directory}: expected a training state, found no {STATE_NAME}")
    description = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
    for file in sorted(directory.glob("*.safetensors")):
        read_header(file)
    reader = HuggingFaceStorageReader(str(directory))
    saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata

    parameters = named_tensors(model)
    group_names = _group_names(optimizer, parameters)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    state: dict[str, dict[str, Tensor]] = {}
    for name in (name for names in group_names for name in names):
        state[name] = {}
        for key in description["optimizer_state"].get(name, ()):
            entry = saved.get(state_name(name, key))
            if entry is not None and not entry.size:  # the number of steps
                value = torch.zeros((), dtype=entry.properties.dtype)
            else:
                value = torch.zeros_like(parameters[name])
            state[name][key] = tensors[state_name(name, key)] = value
    _require_fit(directory, tensors, saved)
    saved_groups = description["param_groups"]
    if [sorted(group["params"]) for group in saved_groups] != [sorted(names) for names in group_names]:
        raise ValueError(
            f"{directory}: the state has parameter groups of {[len(g['params']) for g in saved_groups]} "
            f"parameters, the optimizer has other ones of {[len(names) for names in group_names]}"
        )

    with dcp_errors(f"could not read {directory}"):
        dcp.load(tensors, storage_reader=reader)
    positions = {name: i for i, name in enumerate(name for names in group_names for name in names)}
    groups = []
    for group, names, settings in zip(optimizer.param_groups, group_names, saved_groups, strict=True):
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        groups.append({**group, **settings, "params": [positions[name] for name in names]})
    optimizer.load_state_dict(
        {"state": {positions[n]: values for n, values in state.items() if values}, "param_groups": groups}
    )


def state_name(parameter: str, key: str) -> str:
    return f"optimizer.{parameter}.{key}"


def _group_names(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the parameters of each group of the optimizer."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if any(None in group for group in groups):
        raise ValueError(
            "the optimizer has parameters that the model does not have; was it made before `shard`?"
        )
    return groups  # type: ignore[return-value]


def _require_fit(directory: Path, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Raises ValueError unless the files hold these tensors, all of each, and no others."""
    problems = {
        "missing": sorted(tensors.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - tensors.keys()),
    }
    different, incomplete = [], []
    for name in sorted(tensors.keys() & saved.keys()):
        entry, tensor = saved[name], tensors[name]
        seen = (tuple(entry.size), entry.properties.dtype)
        if seen != (tuple(tensor.shape), tensor.dtype):
            different.append(f"{name}: {seen}, expected {(tuple(tensor.shape), tensor.dtype)}")
        elif sum(math.prod(chunk.sizes) for chunk in entry.chunks) != tensor.numel():
            incomplete.append(name)
    problems |= {"different": different, "incomplete": incomplete}
    if any(problems.values()):
        found = "; ".join(f"{len(v)} {k}: {v[:5]}" for k, v in problems.items() if v)
        raise ValueError(f"{directory}: the training state does not fit the model: {found}")


def _write_parts(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes this rank's parts of the tensors, a file at a time: of each there is a copy in memory."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // _FILE_BYTES
        size += tensor.numel() * tensor.itemsize // world().size
    writer = _SameBytesWriter(str(directory), fqn_to_index_mapping=files, save_distributed=True)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with dcp_errors(f"could not write {directory}"):
        dcp.save(dict(tensors), storage_writer=writer, planner=planner)


class _SameBytesWriter(HuggingFaceStorageWriter):
    """Safetensors writes the metadata of a file in a random order; here it is sorted."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in future.wait()}:
            with Path(self.path, name).open("r+b") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
                header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
                text = header_text(header, length)
                file.seek(8)
                file.write(text)
        return future


@contextlib.contextmanager
def dcp_errors(what: str) -> Iterator[None]:
    """Turns what torch.distributed.checkpoint raises on all ranks, which is no Exception, into OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine
        try:
            yield
        except CheckpointException as error:
            causes = [f"rank {rank}: {failure[0]!r}" for rank, failure in sorted(error.failures.items())]
            raise OSError(f"{what}: {'; '.join(causes)}") from error
