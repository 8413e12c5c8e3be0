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


# Config class, model class and settings beside SHAPE, by model type.
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    # Windows shorter than the tests' texts, in two and in three of the four layers.
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 10}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": 8, "query_pre_attn_scalar": 10, "layer_types": [
                "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"
            ],
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
}  # fmt: skip

# Mixtures of experts, whose channels come in equal numbers per expert: what tests keep has to suit them.
SPARSE_FAMILIES = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 3},
    ),
    # Layer 2 has an ordinary MLP.
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [2],
            "norm_topk_prob": True,
        },
    ),
}  # fmt: skip


def make_model(
    family: str, *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
):
    """A random model of a family, with the biases it can have, at a scale where layers matter."""
    import transformers

    config_name, model_name, settings = (FAMILIES | SPARSE_FAMILIES)[family]
    config = getattr(transformers, config_name)(
        **{**SHAPE, "tie_word_embeddings": tied, **settings, **changes}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def make_text(documents: int = 300, seed: int = 0) -> str:
    """Documents of random words, separated by blank lines."""
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=draw.randint(40, 90))) for _ in range(documents))
