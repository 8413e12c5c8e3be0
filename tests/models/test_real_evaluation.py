"""The converted SmolLM2-135M: its tokenizer, its perplexity and its answers.

The expected numbers were measured once with the fp32 model. They do not depend on the machine beyond
rounding, so the bounds are tight: a wrong rope base alone moves the perplexity by 9%.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adapt_pruner.assets import BENCHMARKS, load_benchmark, resolve_model
from adapt_pruner.data import PARTS, load_documents, part_of, prefix_token, sample_sequences, tokenize
from adapt_pruner.evaluation import TASKS, evaluate_multiple_choice, evaluate_perplexity
from adapt_pruner.evaluation.multiple_choice import load_items

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_digits_are_tokenised_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    # Without the digit rule the last space of several would be split off: "Ġ", "Ġ", "2", ...
    assert tokenizer.tokenize("in  2021\n\n7") == ["in", "ĠĠ", "2", "0", "2", "1", "ĊĊ", "7"]


def test_known_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("1234") == [33, 34, 35, 36]  # without special tokens
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert prefix_token(tokenizer, None) is None  # it adds no BOS to text
    text = "Été 1999: naïve café, 日本 \t\n  end"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_converted_model(directory: Path, model: PreTrainedModel) -> None:
    assert not list(directory.glob("*.bin"))
    assert model.num_parameters() == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    result = evaluate_perplexity(model, tokenizer, "default", "held-out", context=512, max_tokens=4096)
    assert result.tokens == 8 * 511
    assert result.perplexity == pytest.approx(25.09, rel=5e-3)
    assert result.bits_per_byte == pytest.approx(1.0769, rel=5e-3)


@pytest.mark.parametrize(("task", "accuracy"), [("piqa", 0.725), ("arc_easy", 0.5)])
def test_answers_are_better_than_guesses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, accuracy: float
) -> None:
    (result,) = evaluate_multiple_choice(model, tokenizer, [task], limit=40).tasks
    assert result.accuracy > result.chance + 0.15
    assert result.accuracy == pytest.approx(accuracy, abs=0.051)  # two questions may flip by rounding


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_row_becomes_an_item(task: str) -> None:
    for row in load_benchmark(task):
        item = TASKS[task].item(row)
        assert 0 <= item.gold < len(item.continuations) == len(item.contexts) == len(item.lengths) >= 2
        assert all(context.strip() for context in item.contexts)


def test_mmlu() -> None:
    """57 subjects, each with five examples to put in front of its questions."""
    assert len(load_items("mmlu")) == 14042
    items = load_items("mmlu", limit=1, num_fewshot=5)
    assert len(items) == 57
    assert all(item.contexts[0].count("\nAnswer:") == 6 for item in items)


def test_default_corpus(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = {part: load_documents("default", part=part) for part in PARTS}
    assert {part: len(documents) for part, documents in parts.items()} == {
        "held-out": 873,
        "calibration": 1816,
        "recovery": 6287,
    }
    assert all(part_of(document) == part for part, documents in parts.items() for document in documents)
    tokens = tokenize(parts["calibration"], tokenizer)
    assert sample_sequences(tokens, 512, 64, seed=0).shape == (512, 64)  # without packing
