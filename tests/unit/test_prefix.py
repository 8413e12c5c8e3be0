"""BOS in front of calibration sequences and evaluated windows: where the tokenizer adds it, or as told."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from test_pruner import SETTINGS
from tokenizers import processors
from transformers import AutoTokenizer

from adapt_pruner import PruneConfig, PruningPlan, cli, prune
from adapt_pruner.data import TokenizedDocuments, prefix_token, sample_sequences
from adapt_pruner.methods import resolve
from adapt_pruner.scoring import taylor

BOS = 1  # of the tests' tokenizer


@pytest.fixture(scope="module")
def adding(tmp_path_factory, tiny_models):
    """A tiny Gemma whose tokenizer puts its BOS in front of text."""
    directory = tmp_path_factory.mktemp("adding") / "gemma3"
    shutil.copytree(tiny_models["gemma3_text"], directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def batches(monkeypatch):
    """The calibration batches of the runs of a test."""
    seen = []
    original = taylor.score

    def watching(model, family, widths, batch, **options):
        seen.append(batch.numpy())
        return original(model, family, widths, batch, **options)

    monkeypatch.setattr("adapt_pruner.engines.in_memory.score", watching)
    return seen


def config(model, text, output, **changes):
    return PruneConfig(str(model), 0.9, str(output), calibration=str(text), **{**SETTINGS, **changes})


def documents(lengths, prefix=None):
    tokens = np.concatenate([np.arange(n, dtype=np.int32) + 100 * (i + 1) for i, n in enumerate(lengths)])
    return TokenizedDocuments(tokens, np.cumsum([0, *lengths]), 0, prefix)


@pytest.mark.parametrize("pack", [False, True])
def test_a_prefixed_sequence_is_the_prefix_and_a_sequence_one_shorter(pack):
    drawn = sample_sequences(documents([9, 7, 12, 8], prefix=7), 3, 9, seed=5, pack=pack)
    text = sample_sequences(documents([9, 7, 12, 8]), 3, 8, seed=5, pack=pack)
    assert drawn.dtype == torch.int64
    assert (drawn[:, 0] == 7).all()
    assert torch.equal(drawn[:, 1:], text)


def test_documents_of_the_text_of_a_sequence_are_long_enough():
    with pytest.warns(UserWarning, match="only 0 of 2 documents have 9 tokens"):
        sample_sequences(documents([8, 8]), 1, 9, seed=0)
    assert sample_sequences(documents([8, 8], prefix=7), 2, 9, seed=0)[:, 0].tolist() == [7, 7]


def test_automatic_is_what_the_tokenizer_does(adding, tiny_models, tokenizer):
    plain = AutoTokenizer.from_pretrained(tiny_models["gemma3_text"])
    adds = AutoTokenizer.from_pretrained(adding)
    assert [prefix_token(plain, asked) for asked in (None, True, False)] == [None, BOS, None]
    assert [prefix_token(adds, asked) for asked in (None, True, False)] == [BOS, BOS, None]
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert [prefix_token(without, asked) for asked in (None, False)] == [None, None]
    with pytest.raises(ValueError, match="prefix_bos was asked for, but the tokenizer has no BOS token"):
        prefix_token(without, True)


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (True, True), (False, False)])
def test_every_calibration_sequence_begins_with_it(
    adding, calibration_file, tmp_path, batches, asked, expected
):
    result = prune(config(adding, calibration_file, tmp_path / "run", prefix_bos=asked))
    assert len(batches) == result.metrics["iterations"] > 1
    for batch in batches:
        assert batch.shape == (8, 16)
        assert ((batch == BOS).sum(1) == int(expected)).all()
        assert (batch[:, 0] == BOS).all() == expected
    # What was decided is on record, and a resume asks for the same.
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["prefix_bos"] is expected
    assert PruningPlan.load(tmp_path / "run").settings["prefix_bos"] is expected
    other = config(adding, calibration_file, tmp_path / "run", prefix_bos=not expected, resume=True)
    with pytest.raises(ValueError, match=f"prefix_bos is {not expected}, the run was .* with {expected}"):
        prune(other)


def test_tokenizers_that_add_none_draw_as_without_the_setting(
    tiny_models, calibration_file, tmp_path, batches
):
    prune(config(tiny_models["gemma3_text"], calibration_file, tmp_path / "auto"))
    automatic = list(batches)
    batches.clear()
    prune(config(tiny_models["gemma3_text"], calibration_file, tmp_path / "off", prefix_bos=False))
    assert len(automatic) == len(batches)
    assert all(np.array_equal(a, b) for a, b in zip(automatic, batches, strict=True))
    assert not any((batch == BOS).any() for batch in automatic)


def test_the_reference_method_draws_as_the_published_implementation(adding, calibration_file, tmp_path):
    asked = config(adding, calibration_file, tmp_path, method="reference")
    assert resolve(asked, 4)[0].prefix_bos is False
    assert resolve(dataclasses.replace(asked, prefix_bos=True), 4)[0].prefix_bos is True
    assert resolve(dataclasses.replace(asked, method="adapt-pruner"), 4)[0].prefix_bos is None


def test_a_bos_that_is_not_there_is_refused_before_anything_is_written(
    tiny_models, calibration_file, tmp_path, tokenizer
):
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    without.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        prune(config(tmp_path / "model", calibration_file, tmp_path / "run", prefix_bos=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "expected"), [([], BOS), (["--prefix-bos"], BOS), (["--no-prefix-bos"], None)]
)
def test_evaluate_on_the_command_line(adding, calibration_file, capsys, options, expected):
    command = ["evaluate", str(adding), "--data", str(calibration_file), "--context", "32", "--json"]
    assert cli.main([*command, "--max-tokens", "100", "--device", "cpu", *options]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"]["prefix_token_id"] == expected
