"""Training sequences of one length from documents, which share a sequence but do not see each other.

Documents are joined and cut into sequences. Positions start at 0 with every document: from that, transformers
makes the mask under which a token attends to its own document only, in batches of any size, if the attention
is "sdpa" or "eager" (`check_attention`), there is no cache (`collate` turns it off) and no attention mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from adapt_pruner.data import (
    PARTS,
    TOKENIZE_BATCH,
    TokenizedDocuments,
    column_texts,
    load_documents,
    part_of,
    token_ids,
    tokenize,
)

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Example = dict[str, Tensor]
_UNPREDICTED = -100  # the label of tokens without a loss, for all losses of transformers and torch


class PackedExamples(Dataset[Example]):
    """Documents in random order as sequences of one length; what is left at the end is dropped.

    Example i depends on the documents, the seed and i only. It is {"input_ids", "labels", "position_ids"},
    each [sequence_length] int64:

    - Every document is followed by EOS, if the tokenizer has one, and starts with the prefix token, if there
      is one. Documents without tokens are left out.
    - A document that is cut goes on in the next sequence as if it were another one, after a prefix token of
      its own: a model that expects one would be trained on what it never sees.
    - position_ids are 0 where a document starts or goes on, and count from there.
    - labels are input_ids (losses shift them), but -100 for tokens of which no part of their document is in
      front: at position 0, and after the prefix token where a document goes on.

    Args:
        documents: with the EOS and prefix tokens to use.
        sequence_length: tokens of each sequence, at least 2.
        seed: of the order of the documents, not negative.
    Raises:
        ValueError: an argument is out of range, or there are too few tokens for one sequence.
    """

    def __init__(self, documents: TokenizedDocuments, sequence_length: int, *, seed: int) -> None:
        _check(sequence_length, seed)
        self._documents = documents
        self._sequence_length = sequence_length
        self._order = np.random.default_rng(seed).permutation(np.flatnonzero(documents.lengths))
        around = _tokens_around(documents.eos_token_id, documents.prefix_token_id)
        # In the order of the documents, [documents + 1]: where each begins if all are joined.
        self._begins = np.concatenate(([0], np.cumsum(documents.lengths[self._order] + around)))
        self._starts = self._cuts()
        if not len(self._starts):
            raise ValueError(_too_few(len(documents), int(self._begins[-1]), sequence_length))

    def _cuts(self) -> np.ndarray:
        """Where each sequence starts in the joined documents."""
        starts, start, end = [], 0, int(self._begins[-1])
        while start < end:
            inside = self._begins[self._document_at(start)] < start
            stop = start + self._sequence_length - (inside and self._documents.prefix_token_id is not None)
            if stop <= end:
                starts.append(start)
            start = stop
        return np.array(starts, np.int64)

    def _document_at(self, position: int) -> int:
        return int(np.searchsorted(self._begins, position, side="right")) - 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        start = int(self._starts[index])
        first = self._document_at(start)
        documents = map(self._documents.document, self._order[first:])
        return next(
            _pack(
                documents,
                self._sequence_length,
                self._documents.eos_token_id,
                self._documents.prefix_token_id,
                start=start - int(self._begins[first]),
            )
        )


class StreamedExamples(IterableDataset[Example]):
    """As `PackedExamples`, from texts that are read and tokenized while it is iterated over.

    What is made is the same every time, if `texts` are. How many sequences there are only shows at the end.
    At most one worker of a data loader may read it.

    Args:
        texts: texts, whose order is kept; or a data set of the library `datasets` in its streaming form,
            which is shuffled by that library: its shards, and its rows in a buffer.
        tokenizer: of the model to train.
        sequence_length: tokens of each sequence, at least 2.
        prefix_token_id: what every document starts with, if anything (see `data.prefix_token`).
        part: only the documents of this part, as in `data.load_documents`; None for all.
        column: the column with the text, only for a data set.
        seed: of the shuffling of a data set, not negative.
        buffer_size: rows in the buffer of the shuffling.
    Raises:
        ValueError: an argument is out of range; while iterating: there is no such column, more than one
            worker, or the texts have too few tokens for one sequence.
    """

    def __init__(
        self,
        texts: Iterable[str] | datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        prefix_token_id: int | None = None,
        part: str | None = None,
        column: str | None = None,
        seed: int = 0,
        buffer_size: int = 10_000,
    ) -> None:
        import datasets

        _check(sequence_length, seed)
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {texts[:40]!r}; expected several texts")
        if part is not None and part not in PARTS:
            raise ValueError(
                f"unknown part {part!r}; expected one of {', '.join(PARTS)} or None for everything"
            )
        if buffer_size < 1:
            raise ValueError(f"buffer_size is {buffer_size}; expected at least 1")
        self._rows = isinstance(texts, datasets.IterableDataset)
        if isinstance(texts, datasets.IterableDataset):
            texts = texts.shuffle(seed=seed, buffer_size=buffer_size)
        elif column is not None:
            raise ValueError(f"column {column!r} was named, but the texts are no data set with columns")
        self._texts = texts
        self._column = column
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._prefix_token_id = prefix_token_id
        self._part = part

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a data loader with {worker.num_workers} workers would read every streamed text as often; "
                "expected num_workers 0 or 1"
            )
        return _pack(
            self._token_ids(), self._sequence_length, self._tokenizer.eos_token_id, self._prefix_token_id
        )

    def _token_ids(self) -> Iterator[np.ndarray]:
        around = _tokens_around(self._tokenizer.eos_token_id, self._prefix_token_id)
        texts = self._documents()
        documents = tokens = 0
        while batch := list(islice(texts, TOKENIZE_BATCH)):
            for document in token_ids(batch, self._tokenizer):
                documents += 1
                tokens += len(document) + around
                yield document
        if tokens < self._sequence_length:
            raise ValueError(_too_few(documents, tokens, self._sequence_length))

    def _documents(self) -> Iterator[str]:
        texts = column_texts(self._texts, "data set", self._column) if self._rows else self._texts
        stripped = (text.strip() for text in texts)
        return (text for text in stripped if text and self._part in (None, part_of(text)))


def recovery_examples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    seed: int,
    part: str | None = "recovery",
    column: str | None = None,
    split: str = "train",
    max_documents: int | None = None,
    prefix_token_id: int | None = None,
) -> PackedExamples:
    """The sequences of a text source to train on, or with `part="held-out"` those to measure with.

    Args:
        source, part, column, split, max_documents: as of `data.load_documents`.
        tokenizer: of the model to train.
        sequence_length, seed: as of `PackedExamples`.
        prefix_token_id: what every document starts with, if anything (see `data.prefix_token`).
    Raises:
        ValueError: an argument is out of range, there is no such text or too little of it.
    """
    _check(sequence_length, seed)
    documents = load_documents(source, part=part, column=column, split=split, max_documents=max_documents)
    tokens = dataclasses.replace(tokenize(documents, tokenizer), prefix_token_id=prefix_token_id)
    return PackedExamples(tokens, sequence_length, seed=seed)


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch for a model of transformers: what examples have, each [examples, sequence_length] int64.

    Returns:
        the keys of the examples, and use_cache False: a model with a cache, which is what most have unless
        told, takes no notice of where documents start and attends across them.
    """
    return {**default_collate(list(examples)), "use_cache": False}


def check_attention(config: PreTrainedConfig) -> None:
    """Make sure that a model with this configuration keeps the documents of a sequence apart.

    Raises:
        ValueError: its attention does not, in batches of more than one sequence.
    """
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {attention!r} does not keep the documents of packed sequences apart in batches; "
            "load the model with attn_implementation 'sdpa' or 'eager'"
        )


def _pack(
    documents: Iterable[np.ndarray],
    sequence_length: int,
    eos_token_id: int | None,
    prefix_token_id: int | None,
    *,
    start: int = 0,
) -> Iterator[Example]:
    """Examples of documents in their order; of the first, what goes before `start` is taken already."""
    eos, prefix = (np.array([] if t is None else [t], np.int64) for t in (eos_token_id, prefix_token_id))
    segments: list[np.ndarray] = []  # of the sequence at hand
    room, unpredicted = sequence_length, 1
    for tokens in documents:
        if not len(tokens):
            continue
        document = np.concatenate((prefix, tokens, eos))
        while start < len(document):
            front = prefix if start else prefix[:0]  # it goes on, which is always at a sequence's start
            if not segments:
                unpredicted = 1 + len(front)
            body = document[start : start + room - len(front)]
            segments.append(np.concatenate((front, body)))
            start += len(body)
            room -= len(segments[-1])
            if not room:
                yield _example(segments, unpredicted)
                segments, room = [], sequence_length
        start = 0


def _example(segments: list[np.ndarray], unpredicted: int) -> Example:
    """What a model needs of one sequence, of which the loss leaves out so many tokens in front."""
    input_ids = torch.from_numpy(np.concatenate(segments))
    position_ids = torch.from_numpy(np.concatenate([np.arange(len(segment)) for segment in segments]))
    labels = input_ids.masked_fill(position_ids == 0, _UNPREDICTED)
    labels[:unpredicted] = _UNPREDICTED
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _check(sequence_length: int, seed: int) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; expected at least 2")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected not negative")


def _tokens_around(*special: int | None) -> int:
    return sum(token is not None for token in special)


def _too_few(documents: int, tokens: int, sequence_length: int) -> str:
    return (
        f"{documents} documents have {tokens} tokens, those around them included: too few for one sequence "
        f"of {sequence_length}"
    )
