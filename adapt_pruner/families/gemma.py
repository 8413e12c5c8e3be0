"""Gemma 2 and the text models of Gemma 3: Llama's tensors between four norms, which stay.

Soft-capping, sliding windows and the norms of queries and keys (Gemma 3) do not depend on the widths.
"""

from dataclasses import replace

from adapt_pruner.families.base import Family, attention_kv_group, gated_mlp_channel

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2", "adapt_gemma2"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(attention_kv_group(), gated_mlp_channel()),
    models="Gemma 2",
    source="arXiv 2408.00118",
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text", "adapt_gemma3_text"),
    models="Gemma 3, text models (270M, 1B)",
    source="arXiv 2503.19786",
)
