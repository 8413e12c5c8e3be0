"""Text and data sets as token batches: documents, disjoint parts, a token cache, seeded sequences.

Calibration, recovery and held-out text come from one source, split by the content hash of each document, so
that they are disjoint by construction and the same everywhere, without an index to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapt_pruner.assets import cache_dir, fetch_text

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

DEFAULT_SOURCE = "default"
# Tenths of all documents, by the content hash modulo ten.
PARTS: dict[str, range] = {"held-out": range(1), "calibration": range(1, 3), "recovery": range(3, 10)}
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TOKENIZE_BATCH = 1024


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents as one flat array of token ids.

    Args:
        tokens: [total], int32, all documents one after the other, without special tokens between them.
        offsets: [documents + 1], int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        eos_token_id: separates documents when they are packed; None if the tokenizer has none.
        prefix_token_id: stands in front of every sequence that is drawn, if any.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    eos_token_id: int | None
    prefix_token_id: int | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The token ids of one document, [length], int32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [documents], int64."""
        return np.diff(self.offsets)


def part_of(document: str) -> str:
    """The part ("held-out", "calibration" or "recovery") a document belongs to, by its sha256."""
    tenth = int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 10
    return next(part for part, tenths in PARTS.items() if tenth in tenths)


def load_documents(
    source: str,
    *,
    part: str | None = None,
    column: str | None = None,
    split: str = "train",
    max_documents: int | None = None,
) -> list[str]:
    """The documents of a text source, stripped, without empty ones, in the order of the source.

    Args:
        source: "default" (the built-in corpus, see `assets.fetch_text`); a local .txt file, in which blank
            lines separate documents; a local .jsonl, .json, .parquet or .csv file; or a data set of the hub
            as "name" or "name:configuration".
        part: "calibration" (about 20% of the documents), "recovery" (70%), "held-out" (10%), or None for all
            of them. Parts never share a document; equal documents are always in the same part.
        column: the column with the text; only for tables, "text" unless named.
        split: the split of a hub data set; local files have only "train".
        max_documents: stop after this many documents of the part; a hub data set is then streamed, so that
            no more than needed is downloaded.
    Returns:
        at least one document.
    Raises:
        ValueError: the source does not exist or has no usable text, the column is not there, or an argument
            is out of range.
    """
    if part is not None and part not in PARTS:
        raise ValueError(f"unknown part {part!r}; expected one of {', '.join(PARTS)} or None for everything")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}; expected at least 1")
    documents: list[str] = []
    seen = 0
    for raw in _read_source(source, column, split, streaming=max_documents is not None):
        text = raw.strip()
        if not text:
            continue
        seen += 1
        if part is None or part_of(text) == part:
            documents.append(text)
            if len(documents) == max_documents:
                break
    if not documents:
        if seen:
            raise ValueError(
                f"none of the {seen} documents of {source!r} is in its part {part!r}; use a source with more "
                "documents (in a .txt file blank lines separate documents)"
            )
        raise ValueError(f"{source!r} has no usable text: it is empty or only white space")
    return documents


def _read_source(source: str, column: str | None, split: str, *, streaming: bool) -> Iterable[str]:
    path = Path(source).expanduser()
    is_table = path.suffix in _LOADERS
    if column is not None and (source == DEFAULT_SOURCE or path.suffix == ".txt"):
        raise ValueError(f"column {column!r} was named, but {source!r} is plain text without columns")
    if source == DEFAULT_SOURCE:
        return fetch_text()
    if path.is_dir():
        raise ValueError(f"{source!r} is a directory; expected a file ({_suffixes()}) or a data set's name")
    if is_table or path.suffix == ".txt":
        if not path.is_file():
            raise ValueError(f"text file {source!r} does not exist")
        if split != "train":
            raise ValueError(f"split {split!r} of the local file {source!r}: local files have only 'train'")
        if path.stat().st_size == 0:
            raise ValueError(f"{source!r} is an empty file")
        return _read_table(path, column) if is_table else re.split(r"\n\s*\n", read_text(path))
    if path.is_file():
        raise ValueError(f"{source!r} is a file of an unknown kind {path.suffix!r}; known: {_suffixes()}")
    return column_texts(_load_hub(source, split, streaming=streaming), source, column)


def _suffixes() -> str:
    return f".txt, {_tables()}"


def _tables() -> str:
    return ", ".join(_LOADERS)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unchanged but for line ends.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: {error}") from error


def _read_table(path: Path, column: str | None) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{str(path)!r} could not be read as {path.suffix} ({cause})") from error
    return column_texts(rows, str(path), column)


def stream_rows(source: str, split: str = "train") -> datasets.IterableDataset:
    """A data set of the hub, or a local table, in its streaming form: rows are read as they are needed.

    Raises:
        ValueError: there is no such data set, or the source is plain text.
    """
    import datasets

    path = Path(source).expanduser()
    if source == DEFAULT_SOURCE or path.suffix == ".txt":
        raise ValueError(f"{source!r} cannot be streamed; expected a data set of the hub, or {_tables()}")
    if path.suffix not in _LOADERS:
        return _load_hub(source, split, streaming=True)
    if not path.is_file():
        raise ValueError(f"text file {source!r} does not exist")
    return datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train", streaming=True)


def _load_hub(source: str, split: str, *, streaming: bool) -> Any:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        message = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"no text source {source!r}: it is not 'default', not a local file ({_suffixes()}), and the data "
            f"set could not be loaded ({type(error).__name__}: {message})"
        ) from error


def column_texts(rows: Any, source: str, column: str | None) -> Iterator[str]:
    """The texts in a column of a data set of the library `datasets`, without missing ones.

    Args:
        rows: the data set, streamed or not.
        source: what messages call it.
        column: "text" if None.
    Raises:
        ValueError: it has no such column; while iterating: a value is not text.
    """
    name = "text" if column is None else column
    columns = rows.column_names or list(next(iter(rows), {}))  # unknown before the first row of some streams
    if name not in columns:
        raise ValueError(f"{source!r} has no column {name!r}; it has {', '.join(map(repr, columns))}")
    return _strings(rows.select_columns(name), source, name)


def _strings(rows: Any, source: str, column: str) -> Iterator[str]:
    for row in rows:
        value = row[column]
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"column {column!r} of {source!r} holds {type(value).__name__}; expected text")
        yield value


def tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenizedDocuments:
    """Token ids of documents, without special tokens and never truncated; cached on disk.

    The cache is keyed by the documents and everything that determines what the tokenizer does. Tokenizers
    that are not backed by the `tokenizers` library cannot be fingerprinted and are not cached.

    Args:
        documents: at least one text.
        tokenizer: of the model the tokens are for.
    Returns:
        the documents in their order; documents may have no tokens.
    Raises:
        ValueError: there is not a single token.
    """
    fingerprint = _tokenizer_fingerprint(tokenizer)
    path = None
    if fingerprint is not None:
        key = hashlib.sha256(f"{fingerprint} {_documents_digest(documents)}".encode()).hexdigest()
        path = cache_dir() / "tokens" / f"{key}.safetensors"
    arrays = _read_cached_tokens(path) if path is not None and path.is_file() else None
    if arrays is None:
        arrays = _tokenize(documents, tokenizer)
        if path is not None:
            _write_cached_tokens(path, *arrays)
    tokens, offsets = arrays
    if not len(tokens):
        raise ValueError(f"{len(documents)} documents have no token at all")
    return TokenizedDocuments(tokens, offsets, tokenizer.eos_token_id)


def _tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), TOKENIZE_BATCH):
        pieces += token_ids(documents[start : start + TOKENIZE_BATCH], tokenizer)
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return (np.concatenate(pieces) if pieces else np.zeros(0, np.int32)), offsets


def token_ids(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of each document, [length] int32, without special tokens and never truncated."""
    # verbose=False: whole documents may be longer than the model's context, which is no mistake here.
    encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    for transient in ("padding", "truncation"):  # set by the latest call, without influence on ours
        state.pop(transient, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()


def _documents_digest(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # the boundaries count too
        digest.update(data)
    return digest.hexdigest()


def _read_cached_tokens(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            tokens, offsets = file.get_tensor("tokens"), file.get_tensor("offsets")
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        warnings.warn(f"rebuilding the unreadable token cache {path.name}: {error}", stacklevel=3)
        return None
    if _arrays_digest(tokens, offsets) != expected:
        warnings.warn(f"rebuilding the corrupt token cache {path.name}: its checksum differs", stacklevel=3)
        return None
    return tokens, offsets


def _write_cached_tokens(path: Path, tokens: np.ndarray, offsets: np.ndarray) -> None:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        arrays = {"tokens": tokens, "offsets": offsets}
        save_file(arrays, made, metadata={"sha256": _arrays_digest(tokens, offsets)})
        os.replace(made, path)


def _arrays_digest(tokens: np.ndarray, offsets: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in (tokens, offsets):
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sample_sequences(
    tokens: TokenizedDocuments,
    num_sequences: int,
    sequence_length: int,
    *,
    seed: int,
    iteration: int = 0,
    pack: bool = False,
) -> torch.Tensor:
    """Randomly drawn token sequences of one length; the same for the same seed and iteration.

    Each sequence is a random window of a different document that is long enough. With `pack`, or with a
    warning if too few documents are long enough, documents in random order are joined with EOS and cut.

    Args:
        tokens: where to draw from.
        num_sequences: how many, at least 1.
        sequence_length: tokens of each, at least 2 (one to predict from and one to predict), the prefix token
            included.
        seed: not negative.
        iteration: not negative; iteration k can be drawn without iterations 0 to k-1.
        pack: join documents although enough of them are long enough.
    Returns:
        [num_sequences, sequence_length], int64.
    Raises:
        ValueError: an argument is out of range, or there are too few tokens even when packed.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences is {num_sequences}; expected at least 1")
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; expected at least 2")
    if seed < 0 or iteration < 0:
        raise ValueError(f"seed is {seed} and iteration is {iteration}; expected both not negative")
    width = sequence_length - (tokens.prefix_token_id is not None)  # of the text in a sequence
    generator = np.random.default_rng(np.random.SeedSequence([seed, iteration]))
    long_enough = np.flatnonzero(tokens.lengths >= width)
    if pack or len(long_enough) < num_sequences:
        sequences = _pack(tokens, num_sequences, width, generator)
        if not pack:
            warnings.warn(
                f"only {len(long_enough)} of {len(tokens)} documents have {width} tokens and "
                f"{num_sequences} were asked for: documents are packed instead",
                stacklevel=2,
            )
    else:
        chosen = generator.choice(long_enough, num_sequences, replace=False)
        starts = tokens.offsets[chosen] + generator.integers(0, tokens.lengths[chosen] - width + 1)
        sequences = tokens.tokens[starts[:, None] + np.arange(width)].astype(np.int64)
    if tokens.prefix_token_id is not None:
        sequences = np.insert(sequences, 0, tokens.prefix_token_id, axis=1)
    return torch.from_numpy(sequences)


def _pack(
    tokens: TokenizedDocuments, num_sequences: int, sequence_length: int, generator: np.random.Generator
) -> np.ndarray:
    needed = num_sequences * sequence_length
    available = len(tokens.tokens) + len(tokens)  # each document is followed by one EOS
    if available < needed:
        raise ValueError(
            f"{num_sequences} sequences of {sequence_length} tokens need {needed} tokens, but the source has "
            f"{available} even when all its {len(tokens)} documents are packed"
        )
    if tokens.eos_token_id is None:
        raise ValueError("documents cannot be packed: the tokenizer has no EOS token to put between them")
    order = generator.permutation(len(tokens))
    used = order[: np.searchsorted(np.cumsum(tokens.lengths[order] + 1), needed) + 1]
    end = np.array([tokens.eos_token_id], dtype=np.int64)
    stream = np.concatenate([piece for index in used for piece in (tokens.document(index), end)])
    return stream[:needed].reshape(num_sequences, sequence_length).astype(np.int64)


def prefix_token(tokenizer: PreTrainedTokenizerBase, prefix_bos: bool | None) -> int | None:
    """The token to put in front of every sequence, or None.

    Args:
        prefix_bos: whether that is the tokenizer's BOS; None: where the tokenizer itself adds it to text.
    Raises:
        ValueError: a BOS was asked for, and the tokenizer has none.
    """
    bos: int | None = tokenizer.bos_token_id
    if prefix_bos and bos is None:
        raise ValueError("prefix_bos was asked for, but the tokenizer has no BOS token")
    if prefix_bos is None:
        prefix_bos = tokenizer("text").input_ids[:1] == [bos]
    return bos if prefix_bos else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Make sure that every id the tokenizer can produce has a row in the model's embedding.

    Args:
        tokenizer: of the text.
        vocab_size: rows of the embedding.
    Raises:
        ValueError: an id is too large.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer produces ids up to {largest}, but the model's vocabulary has {vocab_size} "
            "entries: they do not belong together"
        )
