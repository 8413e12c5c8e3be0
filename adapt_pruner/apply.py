"""Applies a plan to a checkpoint on disk, file to file: neither torch nor transformers is imported."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapt_pruner.checkpoint import (
    CONFIG_NAME,
    DTYPE_BYTES,
    Checkpoint,
    TensorInfo,
    config_hash,
    copy_side_files,
    open_checkpoint,
)
from adapt_pruner.families import Family, LayerWidths, UnitTensor, by_expert, find_family, layer_widths
from adapt_pruner.modeling.pruned_config import pruned_values, source_of_classes, values_of_layers
from adapt_pruner.output import require_empty, require_free_space, resumable_bytes, resumable_directory
from adapt_pruner.plan import Indices, PruningPlan, encode_runs, pruned_members, within_expert
from adapt_pruner.shard_io import (
    CHECKSUMS_NAME,
    FORMAT_VERSION,
    MAX_SHARD_BYTES,
    NewTensor,
    Piece,
    Runs,
    verify_checksums,
    write_shards,
)


def apply_plan(
    plan: PruningPlan,
    model: str | Path,
    output: str | Path,
    *,
    uncompensated: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Replays a plan on the checkpoint it was made for, without building the model or loading a weight whole.

    The weights keep the dtype they are stored in. The checkpoint is only read, and where it has a
    checksums.json that is compared first. What an interrupted call has finished stays beside `output`, in a
    hidden directory: the same call goes on with it, and ends with the same bytes.

    Args:
        model: directory of the base model, safetensors.
        output: directory to create; it appears complete or not at all.
        uncompensated: replay a plan made with compensation all the same; a plan has kept units alone, so the
            weights are those of the base model.
        max_shard_bytes: bytes of tensors in a file of the output; those of the model may have any size.
    Returns:
        `output`.
    Raises:
        ValueError: the plan was made for another model (family, config, widths or weights differ), or with
            compensation; `output` is in the model's directory.
        CheckpointError: the checkpoint is damaged, or was changed meanwhile.
        FileExistsError: `output` is not empty, a symbolic link or a mount point.
        OSError: the file system of `output` is too small. BlockingIOError: another process writes to it.
    """
    output = Path(output)
    require_empty(output)
    if output.resolve().is_relative_to(Path(model).resolve()):
        raise ValueError(f"{output} is in the directory of the model, {model}, which is only read")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    compensation = plan.settings.get("compensation", "none")
    if compensation != "none" and not uncompensated:
        raise ValueError(
            f"the plan was made with compensation {compensation!r}, and a plan holds the kept units but not "
            "the compensated weights: use the model in its run directory, or ask for the kept units with the "
            "original weights (uncompensated)"
        )
    checkpoint = open_checkpoint(model)
    family = find_family(checkpoint.config.get("model_type"))
    _require_same_model(plan, checkpoint, family)
    family = family.with_granularity(plan.granularity, plan.mlp_granularity)
    base = layer_widths(checkpoint.config)
    config = pruned_values(values_of_layers(checkpoint.config, plan.kept_layers), plan.widths(family, base))
    kept = _kept_tensors(plan, checkpoint, family, base)
    tensors = [tensor.as_new(name) for name, tensor in kept.items()]
    needed = sum(tensor.num_bytes for tensor in tensors)
    require_free_space(output.parent, max(0, needed - resumable_bytes(output)))
    verify_checksums(checkpoint)
    with resumable_directory(output, _key(plan, checkpoint, max_shard_bytes)) as partial:
        for file in partial.iterdir():  # what an interrupted call has left and has no checksum
            if file.suffix != ".safetensors" and file.name != CHECKSUMS_NAME:
                file.unlink()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers has it
        (partial / CONFIG_NAME).write_text(text, encoding="utf-8")
        if source := source_of_classes(config):
            shutil.copyfile(source, partial / source.name)
        copy_side_files(checkpoint.directory, partial)
        write_shards(partial, tensors, max_bytes=max_shard_bytes)
        checkpoint.require_unchanged()
    return output


@dataclass(frozen=True)
class KeptTensor:
    """One tensor of a checkpoint, and what pruning leaves of it: all of it without `members`."""

    info: TensorInfo
    members: Sequence[UnitTensor] = ()
    keep: Indices | None = None

    def as_new(self, name: str) -> NewTensor:
        """What `write_shards` needs to write it under a name."""
        shape = self._shape()
        num_bytes = math.prod(shape) * DTYPE_BYTES[self.info.dtype]
        return NewTensor(name, self.info.dtype, shape, num_bytes, self._pieces)

    def _shape(self) -> tuple[int, ...]:
        shape = list(self.info.shape)
        if not self.members:
            return tuple(shape)
        part = next(iter(by_expert(self.members).values()))  # experts are of one size
        dim = part[0].dim
        size = part[0].matrix_shape(shape)[dim] - sum(self._kept_and_removed(member)[1] for member in part)
        if len(shape) < 3:
            shape[dim] = size
        elif part[0].expert is None and dim == 0:  # rows of all experts one after the other
            shape[0] = size // shape[1]
        else:
            shape[1 + dim] = size
        return tuple(shape)

    def _kept_and_removed(self, member: UnitTensor) -> tuple[Indices, int]:
        """Kept units of a member, numbered as in it, and how many rows or columns go with the others."""
        assert self.keep is not None
        kept = within_expert(member, self.info.shape, self.keep)
        before = (
            member.matrix_shape(self.info.shape)[member.dim]
            if member.segment is None
            else member.segment.length
        )
        return kept, before - len(kept) * member.group_size

    def _pieces(self) -> list[Piece]:
        size = DTYPE_BYTES[self.info.dtype]
        if not self.members:
            return _piece(self.info, 0, (self.info.numel,), 0, np.array([[0, self.info.numel]]))
        pieces = []
        for expert, part in by_expert(self.members).items():
            matrix = part[0].matrix_shape(self.info.shape)
            offset = (expert or 0) * math.prod(matrix) * size if len(self.info.shape) == 3 else 0
            pieces += _piece(self.info, offset, matrix, part[0].dim, self._runs(part, matrix))
        return pieces

    def _runs(self, part: Sequence[UnitTensor], matrix: Sequence[int]) -> Runs:
        """The rows or columns of a matrix that stay; of a fused tensor also those of no unit."""
        runs, end = [], 0
        for member in sorted(part, key=lambda m: m.segment.start if m.segment else 0):
            kept, _ = self._kept_and_removed(member)
            first = member.segment.start if member.segment else 0
            if first > end:
                runs.append(np.array([[end, first - end]]))
            runs.append(np.array(encode_runs(kept)).reshape(-1, 2) * member.group_size + [first, 0])
            end = first + (member.segment.length if member.segment else matrix[member.dim])
        if end < matrix[part[0].dim]:
            runs.append(np.array([[end, matrix[part[0].dim] - end]]))
        return np.concatenate(runs)


def _piece(info: TensorInfo, offset: int, matrix: Sequence[int], dim: int, runs: Runs) -> list[Piece]:
    """Rows (dim 0) or columns (dim 1) of a matrix that begins `offset` bytes behind the tensor."""
    size = DTYPE_BYTES[info.dtype]
    if dim == 0:
        rows, stride, scale = 1, 0, math.prod(matrix[1:]) * size
    else:
        rows, stride, scale = matrix[0], matrix[1] * size, size
    runs = runs[runs[:, 1] > 0] * scale
    return [Piece(info.shard, info.start + offset, rows, stride, runs)] if len(runs) and rows else []


def _kept_tensors(
    plan: PruningPlan, checkpoint: Checkpoint, family: Family, base: Sequence[LayerWidths]
) -> dict[str, KeptTensor]:
    """What the plan leaves, under the names in the pruned model."""
    pruned = pruned_members(plan.keep_indices, family, base, checkpoint.tensors)
    names = {name: name for name in checkpoint.tensors}
    for layer, (widths, keep) in enumerate(zip(base, plan.keep_indices, strict=True)):
        for kind in family.kinds_in(widths):
            if kind.name == "expert":
                members = family.unit_tensors(kind, layer, widths, checkpoint.tensors)
                _renumber_experts(names, members, keep[kind.name])
    _renumber_layers(names, plan, family)
    return {
        name: KeptTensor(checkpoint.tensors[base_name], *pruned.get(base_name, ()))
        for base_name, name in names.items()
    }


def _renumber_experts(names: dict[str, str], members: Sequence[UnitTensor], keep: Indices) -> None:
    """Takes the tensors of whole experts out of `names` that go, and gives the others their new names."""
    parts = by_expert(members)
    parts.pop(None, None)  # tensors that all experts share
    for part in parts.values():
        for tensor in part:
            del names[tensor.name]
    if parts:
        for number, expert in enumerate(keep.tolist()):
            for old, new in zip(parts[expert], parts[number], strict=True):
                names[old.name] = new.name


def _renumber_layers(names: dict[str, str], plan: PruningPlan, family: Family) -> None:
    """The same for the tensors of whole layers."""
    layers = {family.layer_prefix.format(layer=i): i for i in range(len(plan.keep_indices))}
    numbers = {layer: number for number, layer in enumerate(plan.kept_layers)}
    parts = family.layer_prefix.count(".") + 1
    for base_name, name in list(names.items()):
        prefix = ".".join(name.split(".")[:parts])
        layer = layers.get(prefix)
        if layer in plan.removed_layers:
            del names[base_name]
        elif layer is not None:
            names[base_name] = family.layer_prefix.format(layer=numbers[layer]) + name.removeprefix(prefix)


def _key(plan: PruningPlan, checkpoint: Checkpoint, max_shard_bytes: int) -> str:
    """What the bytes of the output depend on, for those of an earlier call to be taken as they are.

    Device and inode are left out: they may be others when the file system is mounted again.
    """
    states = sorted(
        (str(path.resolve()), state.size, state.modified_ns, state.changed_ns)
        for path, state in checkpoint.states.items()
    )
    text = repr((FORMAT_VERSION, plan.hash, states, max_shard_bytes))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require_same_model(plan: PruningPlan, checkpoint: Checkpoint, family: Family) -> None:
    where = f"{checkpoint.directory}: the plan was made for {plan.base_model}"
    if plan.family != family.name:
        raise ValueError(f"{where}, family {plan.family!r}; this model is of family {family.name!r}")
    for what, expected, seen in (
        ("config", plan.config_hash, config_hash(checkpoint.config)),
        ("weights", plan.weight_fingerprint, checkpoint.fingerprint()),
    ):
        if expected != seen:
            raise ValueError(f"{where}, whose {what} differ: {seen[:12]}, expected {expected[:12]}")
