"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v. Qwen3: norms of queries and keys instead.

The norms have head_dim weights that all heads share: they stay.
"""

from dataclasses import replace

from adapt_pruner.families.base import Family, attention_kv_group, gated_mlp_channel

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2", "adapt_qwen2"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(attention_kv_group(), gated_mlp_channel()),
    models="Qwen2, Qwen2.5",
)
QWEN3 = replace(QWEN2, name="qwen3", model_types=("qwen3", "adapt_qwen3"), models="Qwen3, dense")
