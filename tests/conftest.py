"""Tiny models, a tiny tokenizer and a text, saved as a user would have them."""

from __future__ import annotations

import os
from pathlib import Path

# Nothing may come from a model hub; set before any Hugging Face library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from tiny import FAMILIES, SPARSE_FAMILIES, make_model, make_text


@pytest.fixture(scope="session")
def tokenizer():
    """Every byte is a token; byte-level BPE, which each of the model types' tokenizer classes can load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session", autouse=True)
def _token_cache(tmp_path_factory):
    """Tests keep their token cache to themselves; fetched assets are still shared."""
    from adapt_pruner.assets import cache_dir

    shared, own = cache_dir(), tmp_path_factory.mktemp("cache")
    (shared / "assets").mkdir(parents=True, exist_ok=True)
    (own / "assets").symlink_to(shared / "assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPT_PRUNER_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Directories of a tiny model per family, with its tokenizer; not to be written to."""
    directories = {}
    for family in (*FAMILIES, *SPARSE_FAMILIES):
        directories[family] = tmp_path_factory.mktemp("models") / family
        make_model(family).save_pretrained(directories[family])
        tokenizer.save_pretrained(directories[family])
    return directories


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(make_text())
    return path
