"""The calibration sequences of a run: from its settings and the tokenizer to a batch per iteration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from adapt_pruner.checkpoint import Checkpoint
from adapt_pruner.config import PruneConfig
from adapt_pruner.data import (
    TokenizedDocuments,
    check_vocabulary,
    load_documents,
    prefix_token,
    sample_sequences,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_prefix(config: PruneConfig, checkpoint: Checkpoint) -> PruneConfig:
    """The settings with what the tokenizer decides."""
    if config.prefix_bos is not None:
        return config
    return dataclasses.replace(config, prefix_bos=prefix_token(_tokenizer(checkpoint), None) is not None)


def calibration_tokens(config: PruneConfig, checkpoint: Checkpoint) -> TokenizedDocuments:
    """The tokenized text, of which every iteration draws.

    Raises:
        ValueError: a tokenizer that does not fit the model, no such text, or too little of it.
    """
    tokenizer = _tokenizer(checkpoint)
    check_vocabulary(tokenizer, checkpoint.config["vocab_size"])
    documents = load_documents(
        config.calibration,
        part="calibration" if config.calibration == "default" else None,
        column=config.calibration_column,
    )
    prefix = prefix_token(tokenizer, config.prefix_bos)
    tokens = dataclasses.replace(tokenize(documents, tokenizer), prefix_token_id=prefix)
    draw(config, tokens, 0)  # too little text shows now, not after the model is loaded
    return tokens


def draw(config: PruneConfig, tokens: TokenizedDocuments, iteration: int) -> Tensor:
    """The batch of an iteration, [num_sequences, sequence_length] int64."""
    assert config.num_sequences is not None  # resolved
    return sample_sequences(
        tokens,
        config.num_sequences,
        config.sequence_length,
        seed=config.seed,
        iteration=iteration,
        pack=config.pack,
    )


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.directory)
    return tokenizer
