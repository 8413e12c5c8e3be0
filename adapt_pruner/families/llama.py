"""Llama and what shares its tensors: SmolLM2, TinyLlama, Mistral, MobileLLM."""

from adapt_pruner.families.base import Family, attention_kv_group, gated_mlp_channel

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "mobilellm", "adapt_llama", "adapt_mistral"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(attention_kv_group(), gated_mlp_channel()),
    models="Llama 2 and 3, SmolLM2, TinyLlama, Mistral, MobileLLM",
    source="arXiv 2302.13971, 2407.21783; Mistral 2310.06825; MobileLLM 2402.14905",
)
