"""Checkpoints on disk: safetensors shards read by header, verified before use; files written atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# What belongs to a model beside its weights and config: tokenizer, chat template, generation defaults.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
)
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
MAX_HEADER_BYTES = 100_000_000  # as safetensors has it


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of a kind that cannot be pruned."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: shard file, safetensors dtype name, shape, byte range in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileState:
    """What tells of a file whether it was changed or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True)
class Checkpoint:
    """A verified model directory: its config and the header of every tensor; no weight has been read.

    Attributes:
        states: of the shards, from before their headers were read.
    """

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    states: Mapping[Path, FileState] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(t.end - t.start for t in self.tensors.values())

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and first and last 4 KiB: cheap at any size.

        It tells checkpoints apart; it does not prove that a file is undamaged.
        """
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            with info.shard.open("rb") as file:
                for offset in (info.start, max(info.start, info.end - 4096)):
                    file.seek(offset)
                    digest.update(file.read(min(4096, info.end - offset)))
        return digest.hexdigest()

    def require_unchanged(self) -> None:
        """Raises CheckpointError if a shard is not as it was when the checkpoint was opened."""
        for shard, before in self.states.items():
            now = FileState.of(shard) if shard.exists() else None
            if now != before:
                raise CheckpointError(f"{shard} was changed while it was in use: {now}, expected {before}")


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Checks a model directory and reads its headers.

    Raises:
        CheckpointError: no config, no safetensors weights (pickled weights are never loaded), a quantised
            model, a missing or truncated shard, a tensor that the index names and no shard has.
    """
    directory = Path(directory)
    config = _read_json(directory / CONFIG_NAME)
    if quantization := config.get("quantization_config"):
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if known else repr(quantization)
        raise CheckpointError(
            f"{directory}: the checkpoint is quantised ({method}); pruning needs fp32, fp16 or bf16 weights"
        )
    if config.get("layer_sharing"):
        raise CheckpointError(
            f"{directory}: layer_sharing is true in its config: every layer runs more than once; expected a "
            "model without it"
        )
    if (directory / INDEX_NAME).exists():
        index = _read_json(directory / INDEX_NAME).get("weight_map", {})
        if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
            raise CheckpointError(
                f"{directory / INDEX_NAME}: weight_map is {reprlib.repr(index)}, expected files of tensors"
            )
        shards = sorted(set(index.values()))
        if not shards:
            raise CheckpointError(f"{directory}: {INDEX_NAME} names no tensor")
    elif (directory / WEIGHTS_NAME).exists():
        index, shards = {}, [WEIGHTS_NAME]
    else:
        pickled = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pt*")]
        hint = f"; found only pickled weights {pickled}, which are never loaded" if pickled else ""
        raise CheckpointError(f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found neither{hint}")
    elsewhere = [s for s in shards if Path(s).name != s]
    if elsewhere:
        raise CheckpointError(f"{directory}: {INDEX_NAME} names files outside the directory: {elsewhere}")
    missing = [s for s in shards if not (directory / s).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(shards)} shards in {INDEX_NAME} are missing: {missing}"
        )
    states = {directory / shard: FileState.of(directory / shard) for shard in shards}
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        header = read_header(directory / shard)
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{directory}: tensors are in more than one shard: {twice[:5]}")
        tensors.update(header)
    absent = sorted(set(index) - set(tensors))
    if absent:
        raise CheckpointError(f"{directory}: {INDEX_NAME} names tensors that no shard has: {absent[:5]}")
    if config.get("tie_word_embeddings") or _shares_embedding(config):
        tensors.pop("lm_head.weight", None)  # some tools store the tied head a second time
    for name, info in tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{info.shard}: tensor {name} has dtype {info.dtype}, expected one of {FLOAT_DTYPES}"
            )
    return Checkpoint(directory, config, tensors, states)


def _shares_embedding(config: Mapping[str, Any]) -> bool:
    """Whether a MobileLLM ties its head to its embedding, which is its default and goes by another name."""
    return config.get("model_type") == "mobilellm" and bool(config.get("share_embedding", True))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Header of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is truncated, longer than its header says, or not safetensors; tensors
            overlap, or there are bytes of none between them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{path}: not a safetensors file or truncated: header of {length} bytes in {size}"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged: {reprlib.repr(header)}")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in header.items()}
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise CheckpointError(
                f"{path}: tensor {name} begins at byte {info.start - base} of the data, expected "
                f"{end - base}, where the one before it ends"
            )
        end = info.end
    if end != size:
        raise CheckpointError(f"{path}: truncated or damaged: {size} bytes, its header says {end}")
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """One entry of a header; the data begin at byte `base` of the file."""
    try:
        name.encode()  # JSON can name what is no text
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        if not (isinstance(dtype, str) and isinstance(shape, list) and numbers):
            raise ValueError("expected a name, and whole numbers of 0 or more")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is damaged: {error!r}: tensor {name!r} has {reprlib.repr(entry)}"
        ) from error
    info = TensorInfo(path, dtype, tuple(shape), base + start, base + end)
    # Dtypes that are not in the table cannot be pruned anyway: `open_checkpoint` refuses them by name.
    expected = info.numel * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else max(0, end - start)
    if end - start != expected:
        raise CheckpointError(
            f"{path}: tensor {name} of {dtype} {info.shape} has {end - start} bytes of data"
        )
    return info


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON that names nothing twice."""
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def header_text(header: Mapping[str, Any], length: int = 0) -> bytes:
    """A safetensors header as its own writer has it, padded to `length` and to a multiple of 8 bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(max(length, -(-len(text) // 8) * 8))
    assert length in (0, len(text)), f"the header has grown from {length} to {len(text)} bytes"
    return text


def weights_layout(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file of weights, and where each tensor begins behind it, in that order.

    It is that of safetensors' own writer: larger and then wider dtypes first, so that all are aligned.

    Args:
        tensors: safetensors name of the float dtype, and shape, by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, start = {}, 0
    for name in sorted(tensors, key=lambda name: (-FLOAT_DTYPES.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        end = start + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        starts[name], start = start, end
    return header_text(header), starts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; expected a Hugging Face model directory") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a model config, without what differs between copies of the same model."""
    volatile = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
    kept = {k: v for k, v in config.items() if k not in volatile}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation defaults that `target` does not have yet."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that `path` holds either the old contents or all of the new."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that `path` holds either the old contents or all of the new."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file so that `path` holds either the old contents or all of the new."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(tensors), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"could not write {path}: {error}") from error
        raise
