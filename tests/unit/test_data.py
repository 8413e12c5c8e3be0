"""Documents, parts, token cache and sequences."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adapt_pruner import data
from adapt_pruner.data import PARTS, TokenizedDocuments, load_documents, part_of, sample_sequences, tokenize

TEXT = "the cat sat on a mat while two dogs were barking at it from behind the old fence"
WORDS = TEXT.split()


def make_tokenizer(vocab_size: int = 300, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


def make_tokens(lengths: list[int], eos: int | None = 0) -> TokenizedDocuments:
    """Documents whose tokens tell where they come from: 1000 * document + position."""
    pieces = [np.arange(length, dtype=np.int32) + 1000 * (i + 1) for i, length in enumerate(lengths)]
    return TokenizedDocuments(np.concatenate(pieces), np.cumsum([0, *lengths]), eos)


# Documents and parts


def test_blank_lines_separate_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\nstill one\n\n  two \n \t \n\n\nthree\n")
    assert load_documents(str(path)) == ["one\nstill one", "two", "three"]
    assert load_documents(str(path), max_documents=2) == ["one\nstill one", "two"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_tables_are_read_from_a_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [{"text": " one ", "body": "eins", "number": 1}, {"text": "two", "body": "zwei", "number": 2}]
    table = datasets.Dataset.from_list(rows)
    {"parquet": table.to_parquet, "csv": table.to_csv}.get(suffix, table.to_json)(str(path))
    assert load_documents(str(path)) == ["one", "two"]
    assert load_documents(str(path), column="body") == ["eins", "zwei"]
    with pytest.raises(ValueError, match="has no column 'texts'; it has 'text', 'body', 'number'"):
        load_documents(str(path), column="texts")
    with pytest.raises(ValueError, match=r"column 'number' of .* holds int; expected text"):
        load_documents(str(path), column="number")


def test_missing_values_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one", None, "", "two")))
    assert load_documents(str(path)) == ["one", "two"]


def test_parts_are_disjoint_complete_and_stable(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    texts = [f"document number {i % 1000}" for i in range(2000)]  # each one twice
    path.write_text("\n\n".join(texts))
    parts = {part: load_documents(str(path), part=part) for part in PARTS}
    for part, documents in parts.items():
        assert {part_of(document) for document in documents} == {part}
        assert all(count == 2 for count in Counter(documents).values())
    assert sorted(text for documents in parts.values() for text in documents) == sorted(texts)
    shares = {part: len(documents) / len(texts) for part, documents in parts.items()}
    assert shares == pytest.approx({"held-out": 0.1, "calibration": 0.2, "recovery": 0.7}, abs=0.03)
    # The split is by content alone, so these never change.
    assert [part_of(text) for text in "abef"] == ["held-out", "recovery", "calibration", "calibration"]


def test_default_source_is_the_built_in_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "fetch_text", lambda: [f"passage {i}" for i in range(50)])
    assert len(load_documents("default")) == 50
    parts = [load_documents("default", part=part) for part in PARTS]
    assert sum(map(len, parts)) == 50


def test_hub_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, configuration: str | None, **options: object) -> datasets.Dataset:
        calls.append((name, configuration, options))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_documents("wikitext:wikitext-2-raw-v1", split="test") == ["one", "two"]
    assert load_documents("org/name", max_documents=1) == ["one"]
    assert calls == [
        ("wikitext", "wikitext-2-raw-v1", {"split": "test", "streaming": False}),
        ("org/name", None, {"split": "train", "streaming": True}),
    ]


def test_unreachable_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"no text source 'some/set': .*ConnectionError: no route\)"):
        load_documents("some/set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "'.*empty.txt' is an empty file"),
        ("white.txt", " \n\n\t\n", "'.*white.txt' has no usable text"),
        ("empty.jsonl", "", "'.*empty.jsonl' is an empty file"),
        ("none.jsonl", '{"text": ""}\n{"text": null}', "'.*none.jsonl' has no usable text"),
        ("broken.jsonl", "{not json", "'.*broken.jsonl' could not be read as .jsonl"),
        ("notes.md", "text", "is a file of an unknown kind '.md'; known: .txt, .jsonl"),
    ],
)
def test_files_without_usable_text(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8 text"):
        load_documents(str(tmp_path / "latin.txt"))


def test_a_part_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single document")
    other = next(part for part in PARTS if part != part_of("a single document"))
    with pytest.raises(ValueError, match=f"none of the 1 documents of .*one.txt' is in its part '{other}'"):
        load_documents(str(tmp_path / "one.txt"), part=other)


def test_arguments_of_load_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(ValueError, match=r"text\.txt' does not exist"):
        load_documents(str(path))
    path.write_text("text")
    with pytest.raises(
        ValueError, match="unknown part 'test'; expected one of held-out, calibration, recovery"
    ):
        load_documents(str(path), part="test")
    with pytest.raises(ValueError, match="max_documents is 0; expected at least 1"):
        load_documents(str(path), max_documents=0)
    with pytest.raises(ValueError, match=r"column 'body' was named, but .* is plain text"):
        load_documents(str(path), column="body")
    with pytest.raises(ValueError, match="split 'test' of the local file"):
        load_documents(str(path), split="test")
    with pytest.raises(ValueError, match="is a directory; expected a file"):
        load_documents(str(tmp_path))


# Tokens


def test_tokens_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["the cat", "", "a mat, été"]
    tokens = tokenize(documents, tokenizer)
    assert tokens.tokens.dtype == np.int32
    assert len(tokens) == 3
    assert list(tokens.lengths) == [len(tokens.document(i)) for i in range(3)]
    assert [tokenizer.decode(tokens.document(i)) for i in range(3)] == documents
    assert tokens.eos_token_id == tokenizer.eos_token_id


def test_cache_is_used(
    tokenizer: PreTrainedTokenizerFast, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize(WORDS, tokenizer)
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".safetensors"]
    tokenizer("a b", padding="max_length", truncation=True, max_length=4)  # leaves traces in the tokenizer
    monkeypatch.setattr(data, "_tokenize", lambda *_: pytest.fail("tokenised a second time"))
    second = tokenize(WORDS, tokenizer)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.offsets, second.offsets)


def test_cache_depends_on_documents_and_tokenizer(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    tokenize(["ab", "c"], tokenizer)
    tokenize(["a", "bc"], tokenizer)
    tokenize(["ab", "c"], make_tokenizer(270))
    assert len(list((cache / "tokens").iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_corrupt_cache_is_rebuilt(tokenizer: PreTrainedTokenizerFast, cache: Path, damage: str) -> None:
    first = tokenize(WORDS, tokenizer)
    (path,) = (cache / "tokens").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"truncated": content[:-8], "changed": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="rebuilding the (unreadable|corrupt) token cache"):
        second = tokenize(WORDS, tokenizer)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(WORDS, tokenizer)


def test_documents_without_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="2 documents have no token at all"):
        tokenize(["", ""], tokenizer)


def test_check_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    data.check_vocabulary(tokenizer, size)
    message = f"produces ids up to {size - 1}, but the model's vocabulary has {size - 1} entries"
    with pytest.raises(ValueError, match=message):
        data.check_vocabulary(tokenizer, size - 1)


# Sequences


def test_sequences_are_windows_of_distinct_documents() -> None:
    tokens = make_tokens([5, 40, 8, 30, 7, 8, 100])
    for seed in range(20):
        sequences = sample_sequences(tokens, 4, 8, seed=seed)
        assert sequences.dtype == torch.int64
        assert sequences.shape == (4, 8)
        assert (sequences.diff(dim=1) == 1).all()  # consecutive tokens of one document
        assert len(set((sequences[:, 0] // 1000).tolist())) == 4


def test_windows_start_everywhere_in_a_document() -> None:
    tokens = make_tokens([10])
    starts = {int(sample_sequences(tokens, 1, 8, seed=seed)[0, 0]) for seed in range(50)}
    assert starts == {1000, 1001, 1002}


def test_sequences_depend_on_seed_and_iteration_only() -> None:
    tokens = make_tokens([50] * 40)

    def draw(seed: int, iteration: int) -> torch.Tensor:
        return sample_sequences(tokens, 8, 16, seed=seed, iteration=iteration)

    in_order = [draw(1, iteration) for iteration in range(5)]
    assert torch.equal(draw(1, 4), in_order[4])  # without having drawn the others
    assert len({tuple(sequence.flatten().tolist()) for sequence in [*in_order, draw(2, 0), draw(4, 1)]}) == 7
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(draw(1, 0), in_order[0])


def test_packing_joins_documents_with_eos() -> None:
    tokens = make_tokens([3, 5, 4])
    packed = sample_sequences(tokens, 3, 5, seed=0, pack=True)
    assert packed.shape == (3, 5)
    stream = packed.flatten().tolist()
    documents = [list(group) for group in split_at_zero(stream)]
    assert sorted(map(len, documents)) == [3, 4, 5]
    assert all(np.diff(document).tolist() == [1] * (len(document) - 1) for document in documents)
    assert torch.equal(packed, sample_sequences(tokens, 3, 5, seed=0, pack=True))
    assert any(
        not torch.equal(packed, sample_sequences(tokens, 3, 5, seed=s, pack=True)) for s in range(1, 9)
    )


def split_at_zero(stream: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for token in stream:
        if token:
            pieces[-1].append(token)
        else:
            pieces.append([])
    return [piece for piece in pieces if piece]


def test_too_few_long_documents_are_packed_with_one_warning() -> None:
    tokens = make_tokens([20, 4, 4, 4])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        drawn = [sample_sequences(tokens, 3, 10, seed=0, iteration=i) for i in range(3)]
    assert [str(warning.message) for warning in caught] == [
        "only 1 of 4 documents have 10 tokens and 3 were asked for: documents are packed instead"
    ]
    assert torch.equal(drawn[1], sample_sequences(tokens, 3, 10, seed=0, iteration=1, pack=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: sample_sequences(t, 5, 4, seed=0),
            "5 sequences of 4 tokens need 20 .* has 14 even",
        ),
        (lambda t: sample_sequences(t, 0, 4, seed=0), "num_sequences is 0; expected at least 1"),
        (lambda t: sample_sequences(t, 1, 1, seed=0), "sequence_length is 1; expected at least 2"),
        (lambda t: sample_sequences(t, 1, 4, seed=-1), "seed is -1 and iteration is 0"),
        (lambda t: sample_sequences(t, 1, 4, seed=0, iteration=-2), "seed is 0 and iteration is -2"),
    ],
)
def test_arguments_of_sample_sequences(call: Callable[[TokenizedDocuments], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_tokens([3, 5, 3]))


def test_packing_needs_an_eos_token() -> None:
    with pytest.raises(ValueError, match="no EOS token"):
        sample_sequences(make_tokens([5, 5], eos=None), 1, 4, seed=0, pack=True)
