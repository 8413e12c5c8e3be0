"""The matrices that pruning touches in the decoder layers of real models.

Source: config.json of each model on its hub page (hidden_size, intermediate_size, num_attention_heads,
num_key_value_heads, head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer: sizes of the residual stream, the MLP and attention."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def shapes(self) -> dict[Shape, None]:
        """[out, in] of the distinct linear layers: down, gate and up, q, o, k and v; ordered."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            (self.hidden, self.intermediate): None,
            (self.intermediate, self.hidden): None,
            (queries, self.hidden): None,
            (self.hidden, queries): None,
            (keys, self.hidden): None,
        }


MODELS = {
    "SmolLM2-135M": LayerSizes(576, 1536, 9, 3, 64),
    "MobileLLM-125M": LayerSizes(576, 1536, 9, 3, 64),
    "MobileLLM-1B": LayerSizes(1280, 3584, 20, 5, 64),
    "Qwen2.5-0.5B": LayerSizes(896, 4864, 14, 2, 64),
    "Qwen2.5-7B": LayerSizes(3584, 18944, 28, 4, 128),
    "Llama-3.2-1B": LayerSizes(2048, 8192, 32, 8, 64),
    "Llama-3.1-8B": LayerSizes(4096, 14336, 32, 8, 128),
    "Llama-3.1-70B": LayerSizes(8192, 28672, 64, 8, 128),
    "Llama-3.1-405B": LayerSizes(16384, 53248, 128, 8, 128),
}

# The down projections of SmolLM2-135M and Llama-3.1-8B: a run of minutes on a laptop.
DEFAULT_SHAPES: tuple[Shape, ...] = ((576, 1536), (4096, 14336))
