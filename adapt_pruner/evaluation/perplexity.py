"""Perplexity of a token stream, in windows of a fixed context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adapt_pruner.data import check_vocabulary, load_documents, prefix_token, read_text, tokenize
from adapt_pruner.evaluation.log_probabilities import check_logits, evaluating, token_log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Args:
        perplexity: exp(loss). Comparable between models with the same tokenizer, context and stride only.
        loss: mean negative log-likelihood per scored token, in nats.
        bits_per_byte: loss in bits times tokens per byte of the text, comparable between tokenizers; None if
            the number of bytes was not given.
        tokens: scored tokens; a window's first token has nothing to be predicted from and is not scored.
        context: tokens of a window, a prefix token included.
        stride: distance of the windows' starts; equal to the window's own tokens if they do not overlap.
        prefix_token_id: token put in front of every window, or None.
    """

    perplexity: float
    loss: float
    bits_per_byte: float | None
    tokens: int
    context: int
    stride: int
    prefix_token_id: int | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary of plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Window:
    start: int
    end: int
    first_target: int


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor | np.ndarray | Sequence[int],
    *,
    context: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    prefix_token_id: int | None = None,
    num_bytes: int | None = None,
) -> PerplexityResult:
    """Perplexity of a model on one stream of tokens.

    Args:
        model: causal language model; its training flags are restored afterwards.
        tokens: [total], integers. Nothing is added to them but the prefix token, if any.
        context: tokens of a window.
        stride: None for windows side by side; smaller than the context for overlapping windows, of which only
            the tokens not scored before count.
        max_tokens: look at the first so many tokens only.
        batch_size: windows at a time; does not change the result.
        prefix_token_id: put in front of every window, where it takes one position of the context and is not
            scored; for models that never saw text without it (Gemma's BOS).
        num_bytes: UTF-8 bytes of the tokens looked at, to get bits per byte.
    Raises:
        ValueError: an argument is out of range, or there is nothing to score.
    """
    ids = torch.as_tensor(np.asarray(tokens)).to(torch.int64)
    if ids.dim() != 1:
        raise ValueError(f"tokens have shape {tuple(ids.shape)}; expected one dimension")
    ids = ids[: _checked(max_tokens)]
    width = context - (prefix_token_id is not None)  # of the text in a window
    stride = width if stride is None else stride
    _check_arguments(model, ids, context, width, stride, batch_size, num_bytes)
    check_logits(model)
    windows = list(_windows(len(ids), width, stride, 0 if prefix_token_id is not None else 1))
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            scored = _score(model, ids, windows[start : start + batch_size], prefix_token_id)
            total -= scored.double().sum().cpu()
            count += len(scored)
    loss = float(total) / count
    bits = None if num_bytes is None else loss / math.log(2) * len(ids) / num_bytes
    value = math.exp(min(loss, 700.0))  # beyond that a float overflows
    return PerplexityResult(value, loss, bits, count, context, stride, prefix_token_id)


def _checked(max_tokens: int | None) -> int | None:
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 2")
    return max_tokens


def _check_arguments(
    model: PreTrainedModel,
    ids: Tensor,
    context: int,
    width: int,
    stride: int,
    batch_size: int,
    num_bytes: int | None,
) -> None:
    config: Any = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if width < 2:
        raise ValueError(f"context is {context}; expected at least 2 tokens of text")
    if positions is not None and context > positions:
        raise ValueError(f"context is {context}, but the model has only {positions} positions")
    if not 1 <= stride <= width:
        raise ValueError(f"stride is {stride}; expected 1 to {width}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if num_bytes is not None and num_bytes < 1:
        raise ValueError(f"num_bytes is {num_bytes}; expected at least 1")
    if len(ids) < 2:
        raise ValueError(f"there are {len(ids)} tokens; expected at least 2")
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}; the vocabulary has {config.vocab_size}"
        )


def _windows(total: int, width: int, stride: int, unscored: int) -> Iterator[_Window]:
    scored_to = 0
    for start in range(0, total, stride):
        end = min(start + width, total)
        first_target = max(scored_to, start + unscored)
        if first_target < end:
            yield _Window(start, end, first_target)
        scored_to = end
        if end == total:
            return


def _score(model: PreTrainedModel, ids: Tensor, windows: list[_Window], prefix: int | None) -> Tensor:
    shift = 0 if prefix is None else 1
    # The last token of a window is only predicted, never read.
    inputs = torch.zeros(len(windows), max(w.end - w.start for w in windows) - 1 + shift, dtype=torch.int64)
    if prefix is not None:
        inputs[:, 0] = prefix
    rows, columns, targets = [], [], []
    for row, window in enumerate(windows):
        read = ids[window.start : window.end - 1]
        inputs[row, shift : shift + len(read)] = read
        positions = torch.arange(window.first_target, window.end)
        rows.append(torch.full_like(positions, row))
        columns.append(positions - window.start - 1 + shift)
        targets.append(ids[window.first_target : window.end])
    return token_log_probabilities(model, inputs, torch.cat(rows), torch.cat(columns), torch.cat(targets))


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    part: str | None = None,
    *,
    column: str | None = None,
    split: str = "train",
    context: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    prefix_bos: bool | None = None,
) -> PerplexityResult:
    """Perplexity of a model on a text source, read as one stream; see `perplexity` for the other arguments.

    A .txt file without a part is tokenised unchanged, as a whole. Documents of other sources and of parts are
    joined with an empty line. The tokenizer adds no special tokens.

    Args:
        source, part, column, split: as for `data.load_documents`.
        prefix_bos: put the tokenizer's BOS in front of every window; None: where it adds it to text itself.
    Raises:
        ValueError: as for `perplexity` and `data.load_documents`, the tokenizer does not belong to the model,
            or it has no BOS although one was asked for.
    """
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    prefix = prefix_token(tokenizer, prefix_bos)
    ids = text_tokens(tokenizer, source, part, column=column, split=split)[: _checked(max_tokens)]
    seen: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return perplexity(
        model,
        ids,
        context=context,
        stride=stride,
        batch_size=batch_size,
        prefix_token_id=prefix,
        num_bytes=len(seen.encode("utf-8")),
    )


def text_tokens(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    part: str | None = None,
    *,
    column: str | None = None,
    split: str = "train",
) -> np.ndarray:
    """The stream that `evaluate_perplexity` reads, [total] int32, without any prefix token."""
    path = Path(source).expanduser()
    if part is None and path.suffix == ".txt" and path.is_file() and path.stat().st_size:
        text = read_text(path)
    else:
        text = "\n\n".join(load_documents(source, part=part, column=column, split=split))
    return tokenize([text], tokenizer).tokens
