"""Checkpoints on disk: safetensors shards read by header, verified before use, written atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
class Checkpoint:
    """A verified model directory: its config and the header of every tensor; no weight has been read."""

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

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


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Checks a model directory and reads its headers.

    Raises:
        CheckpointError: no config, no safetensors weights (pickled weights are never loaded), a quantised
            model, a missing or truncated shard, a tensor that the index names and no shard has.
    """
    directory = Path(directory)
    config = _read_json(directory / CONFIG_NAME)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{directory}: the checkpoint is quantised ({method}); pruning needs fp32, fp16 or bf16 weights"
        )
    if config.get("layer_sharing"):
        raise CheckpointError(
            f"{directory}: layer_sharing is true in its config: every layer runs more than once; expected a "
            "model without it"
        )
    if (directory / INDEX_NAME).exists():
        index: dict[str, str] = _read_json(directory / INDEX_NAME).get("weight_map", {})
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
    return Checkpoint(directory, config, tensors)


def _shares_embedding(config: Mapping[str, Any]) -> bool:
    """Whether a MobileLLM ties its head to its embedding, which is its default and goes by another name."""
    return config.get("model_type") == "mobilellm" and bool(config.get("share_embedding", True))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Header of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is truncated, longer than its header says, or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{path}: not a safetensors file or truncated: header of {length} bytes in {size}"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    base = 8 + length
    tensors = {}
    try:
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), base + start, base + end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error!r}") from error
    for name, info in tensors.items():
        length = info.end - info.start
        # Dtypes that are not in the table cannot be pruned anyway: `open_checkpoint` refuses them by name.
        expected = info.numel * DTYPE_BYTES[info.dtype] if info.dtype in DTYPE_BYTES else length
        if info.start < base or length != expected:
            raise CheckpointError(
                f"{path}: tensor {name} of {info.dtype} {info.shape} has {length} bytes of data"
            )
    expected = max((t.end for t in tensors.values()), default=base)
    if expected != size:
        raise CheckpointError(f"{path}: truncated or damaged: {size} bytes, its header says {expected}")
    return tensors


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
    except (ValueError, UnicodeDecodeError) as error:
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


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that becomes `target` by rename when the block ends without error.

    Raises:
        FileExistsError: `target` exists and is not empty; nothing is written then.
    """
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        _publish(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"could not write {target}: {error}") from error
        raise


@contextlib.contextmanager
def resumable_directory(target: Path, key: str) -> Iterator[Path]:
    """As `atomic_directory`, but what an interrupted process has left for the same target and key is there
    again. An error leaves nothing behind; what was left for another key goes.

    Args:
        key: what the contents depend on, as letters and digits.
    Raises:
        FileExistsError: `target` exists and is not empty; nothing is written then.
        BlockingIOError: another process is writing the same.
    """
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.resumable-"
    partial = target.with_name(prefix + key)
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        for other in target.parent.glob(f"{glob.escape(prefix)}*"):
            if other != partial:
                with contextlib.suppress(BlockingIOError), _locked(other):
                    shutil.rmtree(other)
        try:
            yield partial
            _publish(partial, target)
        except Exception:  # not an interrupt
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process at a time has this; the lock goes with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing", str(directory)) from None
        yield
    finally:
        os.close(descriptor)


def _publish(partial: Path, target: Path) -> None:
    """Gives a complete directory its name, once it is on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)  # safetensors makes its files private
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        target.rmdir()
    partial.rename(target)


def require_empty(target: Path) -> None:
    """Raises FileExistsError unless `target` is absent or an empty directory."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory; nothing was written")


def require_free_space(target: Path, num_bytes: int) -> None:
    """Raises OSError (ENOSPC) when the file system of `target` has fewer free bytes than needed."""
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space for the pruned model: {num_bytes:,} bytes needed, {free:,} free",
            str(target),
        )
