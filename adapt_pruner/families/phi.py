"""Phi-3 and Phi-3.5 (mini, medium): q, k and v are one tensor, gate and up another."""

from adapt_pruner.families.base import Family, fused_attention_kv_group, fused_gated_mlp_channel

PHI3 = Family(
    name="phi3",
    model_types=("phi3", "adapt_phi3"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(fused_attention_kv_group(), fused_gated_mlp_channel()),
    models="Phi-3, Phi-3.5, Phi-4, without vision or experts",
    source="arXiv 2404.14219",
    config_widths=True,
)
