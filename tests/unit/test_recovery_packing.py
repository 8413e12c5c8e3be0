"""Packed training sequences: what is in them, and that their documents do not see each other."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from test_modeling import make_pruned
from tiny import FAMILIES, SPARSE_FAMILIES, make_model, make_text
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from adapt_pruner.data import TokenizedDocuments, load_documents, part_of, tokenize
from adapt_pruner.recovery.packing import (
    PackedExamples,
    StreamedExamples,
    check_attention,
    collate,
    recovery_examples,
)

BOS, EOS = 1, 2
KEYS = ("input_ids", "labels", "position_ids")


def make_documents(
    lengths: list[int], eos: int | None = EOS, prefix: int | None = None
) -> TokenizedDocuments:
    """Documents whose tokens tell where they come from: 1000 * document + position."""
    pieces = [np.arange(length, dtype=np.int32) + 1000 * (i + 1) for i, length in enumerate(lengths)]
    return TokenizedDocuments(np.concatenate(pieces), np.cumsum([0, *lengths]), eos, prefix)


def plain(documents: list[list[int]], length: int, prefix: int | None, eos: int | None) -> list[list[tuple]]:
    """Sequences of (token, label, position) of documents in this order, put together token by token."""
    sequences: list[list[tuple]] = [[]]
    for document in documents:
        position = 0
        whole = [token for token in (prefix, *document, eos) if token is not None] if document else []
        for n, token in enumerate(whole):
            if len(sequences[-1]) == length:
                sequences.append([])
            hidden = n == 0
            if n > 0 and not sequences[-1]:  # goes on
                position, hidden = 0, True
                if prefix is not None:
                    sequences[-1].append((prefix, -100, 0))
                    position = 1
            sequences[-1].append((token, -100 if hidden else token, position))
            position += 1
    return [sequence for sequence in sequences if len(sequence) == length]


def rows(example: dict[str, torch.Tensor]) -> list[tuple]:
    return list(zip(*(example[key].tolist() for key in KEYS), strict=True))


def order_of(examples: PackedExamples) -> list[int]:
    """The documents in the order in which their first tokens come."""
    tokens = torch.cat([example["input_ids"] for example in examples])
    return ((tokens[tokens % 1000 == 0] // 1000) - 1).tolist()


# What is in a sequence


@pytest.mark.parametrize(
    ("prefix", "tokens", "labels", "positions"),
    [
        (
            None,
            [[1000, 1001, 1002, 1003], [1004, 1005, EOS, 2000], [2001, 2002, EOS, 3000]],
            [[-100, 1001, 1002, 1003], [-100, 1005, EOS, -100], [-100, 2002, EOS, -100]],
            [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 0]],
        ),
        (
            BOS,
            [[BOS, 1000, 1001, 1002], [BOS, 1003, 1004, 1005], [BOS, EOS, BOS, 2000], [BOS, 2001, 2002, EOS]],
            [
                [-100, 1000, 1001, 1002],
                [-100, -100, 1004, 1005],
                [-100] * 3 + [2000],
                [-100, -100, 2002, EOS],
            ],
            [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]],
        ),
    ],
)
def test_a_small_case_in_full(prefix, tokens, labels, positions) -> None:
    documents = make_documents([6, 3, 1], EOS, prefix)
    seed = next(seed for seed in range(99) if order_of(PackedExamples(documents, 4, seed=seed))[:2] == [0, 1])
    packed = PackedExamples(documents, 4, seed=seed)
    assert len(packed) == len(tokens)
    batch = collate(list(packed))
    assert all(batch[key].dtype == torch.int64 for key in KEYS)
    assert batch["input_ids"].tolist() == tokens
    assert batch["labels"].tolist() == labels
    assert batch["position_ids"].tolist() == positions


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("prefix", [BOS, None])
@pytest.mark.parametrize("length", [2, 3, 7, 16, 50])
def test_sequences_are_the_documents_joined_and_cut(eos: int | None, prefix: int | None, length: int) -> None:
    drawn = np.random.default_rng(length).integers(0, 40, 40).tolist()
    documents = make_documents([*drawn, 0, 1, 2, length - 1, length, length], eos, prefix)
    packed = PackedExamples(documents, length, seed=3)
    order = order_of(packed)
    assert order != sorted(order)
    assert len(set(order)) == len(order)
    texts = [documents.document(i).tolist() for i in order]
    assert list(map(rows, packed)) == plain(texts, length, prefix, eos)
    # Another sequence could not be made of what no sequence has.
    missing = set(np.flatnonzero(documents.lengths).tolist()) - set(order)
    everything = texts + [documents.document(i).tolist() for i in missing]
    assert len(plain(everything, length, prefix, eos)) == len(packed)


def test_an_example_depends_on_documents_seed_and_number_only() -> None:
    documents = make_documents([9, 30, 4, 17, 25, 3, 60, 8] * 3, EOS, BOS)
    in_order = list(map(rows, PackedExamples(documents, 11, seed=5)))
    torch.manual_seed(1)
    np.random.seed(1)
    again = PackedExamples(documents, 11, seed=5)
    assert [rows(again[i]) for i in reversed(range(len(again)))] == in_order[::-1]
    assert rows(again[-1]) == in_order[-1]
    with pytest.raises(IndexError):
        again[len(again)]
    assert list(map(rows, PackedExamples(documents, 11, seed=6))) != in_order


def test_a_data_loader_with_workers_reads_a_stage() -> None:
    packed = PackedExamples(make_documents([50] * 20), 16, seed=0)
    stage = Subset(packed, range(8, 24))
    batches = list(DataLoader(stage, batch_size=4, collate_fn=collate, num_workers=2))
    assert [batch["input_ids"].shape for batch in batches] == [(4, 16)] * 4
    expected = torch.stack([packed[i]["input_ids"] for i in range(8, 24)])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), expected)


@pytest.mark.parametrize(
    ("lengths", "length", "seed", "message"),
    [
        (
            [5, 5],
            13,
            0,
            "2 documents have 12 tokens, those around them included: too few for one sequence of 13",
        ),
        ([5], 1, 0, "sequence_length is 1; expected at least 2"),
        ([5], 4, -1, "seed is -1; expected not negative"),
    ],
)
def test_arguments(lengths: list[int], length: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedExamples(make_documents(lengths), length, seed=seed)


# What a model makes of it


def tiny_documents(prefix: int | None = None) -> TokenizedDocuments:
    lengths = [7, 30, 1, 12, 25, 4, 18, 2, 9, 40]  # some longer than the windows of tiny Gemmas
    tokens = np.random.default_rng(0).integers(3, 280, sum(lengths)).astype(np.int32)
    return TokenizedDocuments(tokens, np.cumsum([0, *lengths]), EOS, prefix)


def alone(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every document of a batch, each in a forward pass of its own, and the loss of its labels."""
    logits, losses = [], []
    for tokens, labels, positions in zip(*(batch[key] for key in KEYS), strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        parts = []
        for start, stop in pairwise(starts):
            output = model(input_ids=tokens[None, start:stop]).logits[0]
            parts.append(output)
            wanted = labels[start + 1 : stop]
            every = torch.nn.functional.cross_entropy(output[:-1], tokens[start + 1 : stop], reduction="none")
            losses.append(every[wanted != -100])
        logits.append(torch.cat(parts))
    return torch.stack(logits), torch.cat(losses).mean()


@pytest.mark.parametrize("prefix", [None, BOS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE_FAMILIES])
@torch.no_grad()
def test_documents_of_a_batch_are_as_if_alone(family: str, attention: str, prefix: int | None) -> None:
    model = make_model(family)
    as_if_alone(model, attention, prefix)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_documents_are_as_if_alone_in_pruned_models(family: str, attention: str) -> None:
    as_if_alone(make_pruned(family)[0], attention, None)


def as_if_alone(model: PreTrainedModel, attention: str, prefix: int | None) -> None:
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{type(model).__name__} has no sdpa")
    model.set_attn_implementation(attention)
    check_attention(model.config)
    packed = PackedExamples(tiny_documents(prefix), 48, seed=0)
    assert len(packed) >= 3
    for examples in ([packed[0]], [packed[i] for i in range(3)]):
        batch = collate(examples)
        assert min(map(sum, (batch["position_ids"] == 0).int().tolist())) >= 2
        output = model(**batch)
        logits, loss = alone(model, batch)
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_with_a_cache_documents_would_see_each_other() -> None:
    """Why `collate` turns it off."""
    model = make_model("llama")
    batch = collate([PackedExamples(tiny_documents(), 48, seed=0)[0]])
    assert batch["use_cache"] is False
    apart, joined = (model(**{**batch, "use_cache": cache}).logits for cache in (False, True))
    assert (apart - joined).abs().max() > 0.1


def test_attention_that_does_not_keep_documents_apart() -> None:
    config = make_model("llama").config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention 'flash_attention_2' does not keep the documents"):
        check_attention(config)


# From text


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    texts = make_text(200).split("\n\n")
    path.write_text("\n".join(json.dumps({"body": f"  {text}\n"}) for text in ["", *texts, "  "]))
    return path


@pytest.mark.parametrize("part", ["recovery", "held-out", None])
def test_recovery_examples_are_those_of_the_part(text_file: Path, tokenizer, part: str | None) -> None:
    settings = {} if part == "recovery" else {"part": part}
    examples = recovery_examples(
        str(text_file), tokenizer, 64, seed=2, column="body", prefix_token_id=BOS, **settings
    )
    documents = load_documents(str(text_file), column="body", part=part)
    tokens = tokenize(documents, tokenizer)
    tokens = TokenizedDocuments(tokens.tokens, tokens.offsets, tokenizer.eos_token_id, BOS)
    assert list(map(rows, examples)) == list(map(rows, PackedExamples(tokens, 64, seed=2)))


def test_arguments_of_recovery_examples_are_checked_first(tokenizer) -> None:
    with pytest.raises(ValueError, match="sequence_length is 0"):
        recovery_examples("nowhere.txt", tokenizer, 0, seed=0)


@pytest.mark.parametrize("prefix", [None, BOS])
def test_streamed_texts_are_packed_in_their_order(tokenizer, monkeypatch, prefix: int | None) -> None:
    monkeypatch.setattr("adapt_pruner.recovery.packing.TOKENIZE_BATCH", 7)
    texts = ["", " \n", *make_text(40).split("\n\n")]
    stream = StreamedExamples(texts, tokenizer, 50, prefix_token_id=prefix)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts[2:]]
    expected = plain(ids, 50, prefix, tokenizer.eos_token_id)
    assert list(map(rows, stream)) == expected
    assert list(map(rows, stream)) == expected  # a second time
    batches = list(DataLoader(stream, batch_size=8, collate_fn=collate, num_workers=1, drop_last=True))
    assert [rows(example) for example in unbatched(batches)] == expected[: len(expected) // 8 * 8]


def unbatched(batches: list[dict]) -> list[dict[str, torch.Tensor]]:
    return [{key: batch[key][i] for key in KEYS} for batch in batches for i in range(len(batch["labels"]))]


def test_a_streamed_data_set_is_shuffled_and_only_a_part_of_it_read(tokenizer) -> None:
    texts = make_text(120).split("\n\n")
    source = datasets.Dataset.from_dict({"body": [*texts, None], "n": list(range(121))})
    source = source.to_iterable_dataset(num_shards=3)

    def stream(seed: int) -> list[list[tuple]]:
        settings = {"column": "body", "part": "recovery", "seed": seed, "buffer_size": 20}
        return list(map(rows, StreamedExamples(source, tokenizer, 64, **settings)))

    first = stream(1)
    assert first == stream(1)
    assert first != stream(2)
    assert len(first) == len(stream(2))
    read = tokenizer.decode([token for row in first for token, _, _ in row]).split("</s>")
    assert read[:-1] != [text for text in texts if text in read[:-1]]
    whole = [text for text in texts if part_of(text) == "recovery"]
    assert len(read) > 0.95 * len(whole) > 50
    assert set(read[:-1]) <= set(whole)


def test_only_what_is_needed_of_a_stream_is_read(tokenizer) -> None:
    read = []

    def endless():
        while True:
            read.append(1)
            yield "sun moon"

    assert len(list(islice(StreamedExamples(endless(), tokenizer, 16), 5))) == 5
    assert len(read) == 1024  # one batch of the tokenizer


def test_arguments_of_streamed_examples(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"2 documents have 9 tokens, .* too few for one sequence of 16"):
        next(iter(StreamedExamples(["sun", "moon"], tokenizer, 16)))
    with pytest.raises(ValueError, match="texts is the string 'org/name'; expected several texts"):
        StreamedExamples("org/name", tokenizer, 16)
    with pytest.raises(ValueError, match="unknown part 'test'; expected one of held-out"):
        StreamedExamples(["sun"], tokenizer, 16, part="test")
    with pytest.raises(ValueError, match="column 'body' was named, but the texts are no data set"):
        StreamedExamples(["sun"], tokenizer, 16, column="body")
    with pytest.raises(ValueError, match="buffer_size is 0; expected at least 1"):
        StreamedExamples(["sun"], tokenizer, 16, buffer_size=0)
    with pytest.raises(ValueError, match="sequence_length is 1"):
        StreamedExamples(["sun"], tokenizer, 1)
    rows = datasets.Dataset.from_dict({"body": ["sun"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="'data set' has no column 'text'; it has 'body'"):
        next(iter(StreamedExamples(rows, tokenizer, 16)))
    with pytest.raises(ValueError, match="a data loader with 2 workers would read every streamed text"):
        next(iter(DataLoader(StreamedExamples(["sun"], tokenizer, 16), num_workers=2)))
