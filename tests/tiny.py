"""Tiny random models and texts that the tests share."""

from __future__ import annotations

import random

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
