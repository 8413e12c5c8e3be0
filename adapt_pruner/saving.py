"""Models that may be sharded, written as ordinary checkpoints by all processes together."""

from __future__ import annotations

import contextlib
import copy
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from adapt_pruner.checkpoint import INDEX_NAME, WEIGHTS_NAME, copy_side_files, weights_layout, write_json
from adapt_pruner.output import atomic_directory
from adapt_pruner.sharding import named_tensors, together, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_FILE_BYTES = 4 * 2**30
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def save_model(
    directory: Path,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    side_files: Path | None = None,
    read: Callable[[str], Tensor] | None = None,
    write: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model that may be sharded as an ordinary checkpoint; no rank holds more than one whole tensor.

    Every rank calls it; rank 0 writes what `save_pretrained` of the whole model would.

    Args:
        directory: absent or empty.
        model: of the class that its config names, as `convert_pruned_model` gives for a pruned one.
        dtype: of the saved weights; None keeps theirs, which is fp32 under mixed precision.
        side_files: a model directory whose tokenizer files are copied.
        read: gives a tensor of the model by its name, if they have no memory in it.
        write: writes the files of weights into a directory, in place of both.
    Raises:
        ValueError: the tensors are not those of the model's config, or `dtype` cannot be saved.
        FileExistsError: `directory` is not empty. OSError: it could not be written.
        RuntimeError: another rank has failed.
    """
    tensors = named_tensors(model)
    dtypes = {dtype} if dtype is not None else {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= DTYPE_NAMES.keys():
        raise ValueError(
            f"the weights have dtypes {sorted(map(str, dtypes))}, expected one of {list(DTYPE_NAMES)}"
        )
    (dtype,) = dtypes
    twin = _meta_twin(model, dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in named_tensors(twin).items()}
    if different := sorted(expected.items() ^ {(name, tuple(t.shape)) for name, t in tensors.items()}):
        raise ValueError(f"the model's tensors are not those of its config: {different[:6]}")
    with shared_directory(Path(directory)) as partial:
        whole = _whole_tensors(tensors.values()) if read is None else map(read, tensors)
        try:
            if world().rank == 0:
                twin.save_pretrained(partial, state_dict={})  # everything but the weights
                if side_files is not None:
                    copy_side_files(side_files, partial)
                if write is not None:
                    write(partial)
                else:
                    _write_weights(partial, twin, whole)
        finally:
            for _ in whole if read is None else ():  # every rank takes part in every tensor, whatever fails
                pass


def _meta_twin(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same config without memory: what is sharded is of another class and partly elsewhere."""
    from transformers import AutoModelForCausalLM

    from adapt_pruner.modeling import register

    register()
    with torch.device("meta"):
        twin: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    twin.generation_config = model.generation_config
    twin.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return twin


def _whole_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        tensor = tensor.detach()
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_weights(directory: Path, twin: PreTrainedModel, whole: Iterator[Tensor]) -> None:
    """Writes safetensors files with the names that tensors have in a checkpoint of the twin's class.

    Args:
        whole: the tensors, in the order of `named_tensors`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Experts, one tensor in a module, are many in a checkpoint.
    stored = [revert_weight_conversion(twin, {n: t.detach()}) for n, t in named_tensors(twin).items()]
    files: list[list[dict[str, Tensor]]] = [[]]
    for parts in stored:
        if files[-1] and _num_bytes([*files[-1], parts]) > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(parts)
    names, weight_map = iter(named_tensors(twin)), {}
    for number, content in enumerate(files, 1):
        file_name = WEIGHTS_NAME if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        header, starts = weights_layout(
            {name: (DTYPE_NAMES[t.dtype], t.shape) for parts in content for name, t in parts.items()}
        )
        with (directory / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for _ in content:
                name, tensor = next(names), next(whole)
                tensor = tensor.to("cpu", twin.dtype)
                for part_name, part in revert_weight_conversion(twin, {name: tensor}).items():
                    file.seek(8 + len(header) + starts[part_name])
                    file.write(part.contiguous().flatten().view(torch.uint8).numpy())
                    weight_map[part_name] = file_name
    if len(files) > 1:
        total = sum(_num_bytes(content) for content in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_NAME, index)


def _num_bytes(tensors: Iterable[Mapping[str, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.itemsize for parts in tensors for tensor in parts.values())


@contextlib.contextmanager
def shared_directory(target: Path) -> Iterator[Path]:
    """`atomic_directory` for all ranks: it becomes `target` when the block has ended well on each of them."""
    with contextlib.ExitStack() as stack:
        path: list[Any] = [None]
        with together():
            if world().rank == 0:
                path = [stack.enter_context(atomic_directory(target))]
        if world().size > 1:
            dist.broadcast_object_list(path)
        with together():
            yield path[0]
        with together():
            stack.close()
