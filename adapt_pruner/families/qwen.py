"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v."""

from adapt_pruner.families.base import Family, attention_kv_group, gated_mlp_channel

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2", "adapt_qwen2"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(attention_kv_group(), gated_mlp_channel()),
)
