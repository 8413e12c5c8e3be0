"""Rows of sequences that begin alike, and what models of several families make of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SPARSE_FAMILIES, VOCABULARY, make_model
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

from adapt_pruner.evaluation.log_probabilities import evaluating, longest_shared, token_log_probabilities
from adapt_pruner.evaluation.shared_rows import batches, shared_rows
from adapt_pruner.slicegpt import slice_model


def make_sequences(contexts: int = 5) -> list[np.ndarray]:
    """One to five choices behind each of some contexts, with repeated ones and one that goes on."""
    draw = np.random.default_rng(5)
    sequences = []
    for _ in range(contexts):
        context = draw.integers(3, VOCABULARY, draw.integers(4, 14))
        for _ in range(draw.integers(1, 6)):
            sequences.append(np.concatenate((context, draw.integers(3, 6, draw.integers(0, 5)))))
    return [*sequences, sequences[0], np.append(sequences[-1], 3)]


def log_probabilities(
    model: PreTrainedModel, sequences: Sequence[np.ndarray], longest: int, tokens: int
) -> tuple[list[torch.Tensor], int]:
    """Of token 7 behind every token of each sequence, and how many rows had branches."""
    found: dict[int, torch.Tensor] = {}
    branches = 0
    with evaluating(model):
        for batch in batches(shared_rows(sequences, longest), tokens):
            for number, row in enumerate(batch.rows):
                branches += row.branches
                for index, path in zip(row.sequences, row.paths, strict=True):
                    columns = torch.from_numpy(path)
                    found[index] = token_log_probabilities(
                        model,
                        batch.tokens,
                        torch.full_like(columns, number),
                        columns,
                        torch.full_like(columns, 7),
                        positions=batch.positions,
                        seen=batch.seen,
                    )
    return [found[index] for index in range(len(sequences))], branches


def alone(model: PreTrainedModel, sequences: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The same from the model's own logits, one sequence at a time."""
    with torch.no_grad():
        logits = [model(torch.from_numpy(sequence)[None]).logits[0] for sequence in sequences]
    return [torch.log_softmax(x.double(), -1)[:, 7].float() for x in logits]


def make(name: str, **changes: object) -> PreTrainedModel:
    if name == "gpt2":  # positions are embedded
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)).eval()
    if name == "sliced_llama":
        ids = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))
        return slice_model(make_model("llama"), [40] * 9, ids, micro_batch_size=4).model
    return make_model(name, **changes)


@pytest.mark.parametrize("longest", [0, 9, sys.maxsize])
def test_every_sequence_is_a_path(longest: int) -> None:
    sequences = make_sequences()
    rows = shared_rows(sequences, longest)
    assert sorted(index for row in rows for index in row.sequences) == list(range(len(sequences)))
    for row in rows:
        assert {int(column) for path in row.paths for column in path} == set(range(len(row.tokens)))
        for index, path in zip(row.sequences, row.paths, strict=True):
            assert row.tokens[path].tolist() == sequences[index].tolist()
            assert not row.branches or len(path) <= longest
    read = sum(len(row.tokens) for row in rows)
    prefixes = {tuple(s[:i]) for s in sequences for i in range(1, len(s) + 1)}
    if longest == sys.maxsize:
        assert read == len(prefixes)  # each beginning once
    else:
        assert len(prefixes) < read < sum(map(len, sequences))  # what is repeated is read once


def test_sequences_with_little_in_common_are_not_joined() -> None:
    sequences = [np.array([1, 2, *range(10 * i, 10 * i + 8)]) for i in range(1, 4)]
    assert len(shared_rows(sequences, sys.maxsize)) == 3
    long = [np.append(np.zeros(1500, int), np.full(300, i)) for i in range(12)]
    lengths = [
        sorted(len(row.tokens) for row in shared_rows(part, sys.maxsize))
        for part in (long, [s[1200:] for s in long])
    ]
    assert lengths == [[3000, 3600], [900, 1800, 1800]]  # at most twice a sequence, or 2048


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_batches(tokens: int) -> None:
    rows = shared_rows(make_sequences(), sys.maxsize)
    made = list(batches(rows, tokens))
    assert sorted(id(row) for batch in made for row in batch.rows) == sorted(map(id, rows))
    for batch in made:
        assert batch.tokens.numel() <= tokens or len(batch.rows) == 1
        assert {row.branches for row in batch.rows} == {batch.seen is not None}
        assert min(len(row.tokens) for row in batch.rows) >= 0.75 * batch.tokens.shape[1]
    assert len(made) > 1


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, None) for name in [*FAMILIES, *SPARSE_FAMILIES, "sliced_llama", "gpt2"]),
        ("llama", "eager"),
        ("gemma3_text", "eager"),
    ],
)
def test_rows_give_what_their_sequences_give(name: str, attention: str | None) -> None:
    model = make(name)
    if attention:
        model.set_attn_implementation(attention)
    sequences = make_sequences()
    expected = alone(model, sequences)
    longest = longest_shared(model)
    windows = {"gemma2": 8, "gemma3_text": 8, "mistral": 4096}
    assert longest == windows.get(name, sys.maxsize)
    for tokens in (40, 10_000):
        seen, branches = log_probabilities(model, sequences, longest, tokens)
        assert branches
        torch.testing.assert_close(torch.cat(seen), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_window_longer_than_the_sequences() -> None:
    model = make_model("gemma3_text", sliding_window=32)
    sequences = make_sequences()
    assert longest_shared(model) == 32
    seen, branches = log_probabilities(model, sequences, 32, 60)
    assert branches > 1
    torch.testing.assert_close(torch.cat(seen), torch.cat(alone(model, sequences)), rtol=1e-5, atol=1e-5)


def test_the_window_must_not_be_ignored() -> None:
    model, sequences = make_model("gemma3_text"), make_sequences()
    wrong, _ = log_probabilities(model, sequences, sys.maxsize, 60)
    assert float((torch.cat(wrong) - torch.cat(alone(model, sequences))).abs().max()) > 1e-2


def test_models_that_cannot_share() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)).eval()
    assert longest_shared(mamba) == 0
    flash = make_model("llama")
    flash.config._attn_implementation = "flash_attention_2"
    assert longest_shared(flash) == 0
    chunked = make_model("llama")
    chunked.config.layer_types = ["chunked_attention"] * 4
    assert longest_shared(chunked) == 0
    recurrent = make_model("llama")  # what it reads depends on all columns before, whatever the mask says
    recurrent.model.embed_tokens.register_forward_hook(lambda _, __, output: output.cumsum(1))
    assert longest_shared(recurrent) == 0
    seen, branches = log_probabilities(recurrent, make_sequences(), 0, 60)
    assert branches == 0
    torch.testing.assert_close(
        torch.cat(seen), torch.cat(alone(recurrent, make_sequences())), rtol=1e-5, atol=1e-5
    )
