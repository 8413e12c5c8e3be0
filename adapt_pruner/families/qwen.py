"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v. Qwen3: norms of queries and keys instead.

The norms have head_dim weights that all heads share: they stay. Qwen3-MoE: layers with a mixture of experts
instead of the MLP, all or some of them.
"""

from dataclasses import replace

from adapt_pruner.families.base import Family, attention_kv_group, gated_mlp_channel
from adapt_pruner.families.experts import expert_channel, whole_expert

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2", "adapt_qwen2"),
    layer_prefix="model.layers.{layer}",
    layers_module="model.layers",
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    unit_kinds=(attention_kv_group(), gated_mlp_channel()),
    models="Qwen2, Qwen2.5",
    source="arXiv 2407.10671, 2412.15115",
)
QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3", "adapt_qwen3"),
    models="Qwen3, dense",
    source="arXiv 2505.09388",
)

_EXPERT = {name: f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")}
QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    model_types=("qwen3_moe", "adapt_qwen3_moe"),
    unit_kinds=(
        attention_kv_group(),
        replace(gated_mlp_channel(), layers="dense"),
        expert_channel(**_EXPERT),
    ),
    expert_kind=whole_expert(**_EXPERT, router="mlp.gate.weight"),
    models="Qwen3 with experts (30B-A3B, 235B-A22B)",
)
