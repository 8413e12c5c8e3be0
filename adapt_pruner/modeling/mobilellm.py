"""MobileLLM, which transformers has no class for: Llama's tensors and computation under another name.

Hub checkpoints bring code of their own; it is not needed, and never run. What is pruned is saved as Llama.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


@strict
class MobileLLMConfig(LlamaConfig):
    """Llama's config under the names of MobileLLM.

    `share_embedding` ties the head to the embedding, as `tie_word_embeddings` does. With `layer_sharing`
    every layer runs twice, which Llama has no form for.
    """

    model_type = "mobilellm"

    share_embedding: bool = True
    layer_sharing: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.tie_word_embeddings = self.tie_word_embeddings or self.share_embedding
        super().__post_init__(**kwargs)


class MobileLLMModel(LlamaModel):
    config_class = MobileLLMConfig


class MobileLLMForCausalLM(LlamaForCausalLM):
    config_class = MobileLLMConfig

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Ties a shared embedding even where a checkpoint stores a head beside it, which is not used."""
        super().tie_weights(*args, **kwargs)
        if self.config.share_embedding:
            self.lm_head.weight = self.model.embed_tokens.weight
