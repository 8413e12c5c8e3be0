"""Mixtral: Mistral with a mixture of experts in every layer."""

from adapt_pruner.families.base import Family, attention_kv_group
from adapt_pruner.families.experts import expert_channel, whole_expert

_EXPERT = {
    "gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "up": "block_sparse_moe.experts.{expert}.w3.weight",
    "down": "block_sparse_moe.experts.{expert}.w2.weight",
}
MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral", "adapt_mixtral"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(attention_kv_group(), expert_channel(**_EXPERT)),
    expert_kind=whole_expert(**_EXPERT, router="block_sparse_moe.gate.weight"),
    models="Mixtral 8x7B and 8x22B",
    source="arXiv 2401.04088",
)
