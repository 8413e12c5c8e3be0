"""Tiny models, a tiny tokenizer and a text, saved as a user would have them."""

from __future__ import annotations

import os
import random
from pathlib import Path

# Nothing may come from a model hub; set before any Hugging Face library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

VOCABULARY = 280  # 256 bytes, special tokens, some spare
# head_dim is not hidden_size / num_attention_heads, and query heads share KV heads.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = tuple("sun moon star river stone tree cloud wind fire snow road house bird fish".split())  # noqa: SIM905


def make_model(family: str, *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model of a family, with the biases it can have, at a scale where layers matter."""
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    shape = dict(SHAPE, tie_word_embeddings=tied)
    if family == "llama":
        shape |= {"attention_bias": True, "mlp_bias": True}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def make_text(documents: int = 300, seed: int = 0) -> str:
    """Documents of random words, separated by blank lines."""
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=draw.randint(40, 90))) for _ in range(documents))


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
    for family in ("llama", "mistral", "qwen2"):
        directories[family] = tmp_path_factory.mktemp("models") / family
        make_model(family).save_pretrained(directories[family])
        tokenizer.save_pretrained(directories[family])
    return directories


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(make_text())
    return path
