"""Decoder models whose layers have their own widths, for transformers.

One self-contained file: the `adapt_pruner` package registers these classes with the Auto classes, and
`save_pretrained` copies the file into the checkpoint, so that a process without the package loads it with
`trust_remote_code=True`.

The widths live in transformers' own key `per_layer_config`, which holds what differs between layers:

    {"0": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}, ...}

The global values beside it are the maxima over all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)


class PerLayerConfigMixin:
    """What a stock decoder config needs so that its layers may have different widths."""

    _auto_class: ClassVar[str | None] = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        # hidden_size // num_attention_heads no longer gives head_dim once heads are gone.
        if getattr(self, "head_dim", None) is None:
            head_dim = kwargs.pop("head_dim", None)
            self.head_dim = head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        # Remote loaders look up the base model too (vLLM builds it through AutoModel), which saving alone
        # does not write.
        stem, family = __name__.rpartition(".")[2], type(self).__name__.removesuffix("Config")
        self.auto_map = {
            "AutoConfig": f"{stem}.{family}Config",
            "AutoModel": f"{stem}.{family}Model",
            "AutoModelForCausalLM": f"{stem}.{family}ForCausalLM",
        }

    def validate_architecture(self) -> None:
        """Replaces the stock check that hidden_size is a multiple of the heads, which pruned layers break."""
        for i, layer in enumerate(self.per_layer_config):
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if kv_heads < 1 or heads < 1 or heads % kv_heads:
                raise ValueError(
                    f"layer {i}: {heads} attention heads are not a multiple of {kv_heads} KV heads"
                )
            if layer.intermediate_size < 1:
                raise ValueError(
                    f"layer {i}: intermediate_size is {layer.intermediate_size}, expected 1 or more"
                )

    def to_dict(self) -> dict[str, Any]:
        """The stock dictionary, with the rotary settings under their older names too.

        Readers that predate `rope_parameters` would otherwise take a base of 10000 without a word.
        """
        output = super().to_dict()
        rope = dict(output.get("rope_parameters") or {})
        if "rope_theta" in rope:
            output["rope_theta"] = rope.pop("rope_theta")
            output["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return output


@contextlib.contextmanager
def _largest_widths(config: PreTrainedConfig) -> Iterator[None]:
    """Shows a stock constructor the maxima alone: it reads global widths, which are ambiguous otherwise."""
    per_layer_config = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = per_layer_config


class PerLayerModelMixin:
    """Builds the stock model at the largest widths, then rebuilds the layers that are narrower.

    Under `from_pretrained` this happens on the meta device and allocates nothing.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        with _largest_widths(config):
            super().__init__(config)
        if config.is_heterogeneous:
            for i, layer in enumerate(self.layers):
                layer_config = config.per_layer_config[i]
                narrow = type(layer)(layer_config, i)
                # One live config for all modules, or set_attn_implementation would not reach them.
                for module in narrow.modules():
                    if getattr(module, "config", None) is layer_config:
                        module.config = config
                self.layers[i] = narrow
        self.post_init()


class PerLayerCausalLMMixin:
    """Swaps the stock base model for the one with per-layer widths."""

    _auto_class = "AutoModelForCausalLM"
    _base_model_class: ClassVar[type]

    def __init__(self, config: PreTrainedConfig) -> None:
        with _largest_widths(config):
            super().__init__(config)
        self.model = self._base_model_class(config)
        self.post_init()


# `strict` binds the validators of the class it decorates; without it the parent's would still run.
@strict
class AdaptLlamaConfig(PerLayerConfigMixin, LlamaConfig):
    model_type = "adapt_llama"


class AdaptLlamaModel(PerLayerModelMixin, LlamaModel):
    config_class = AdaptLlamaConfig


class AdaptLlamaForCausalLM(PerLayerCausalLMMixin, LlamaForCausalLM):
    config_class = AdaptLlamaConfig
    _base_model_class = AdaptLlamaModel


@strict
class AdaptMistralConfig(PerLayerConfigMixin, MistralConfig):
    model_type = "adapt_mistral"


class AdaptMistralModel(PerLayerModelMixin, MistralModel):
    config_class = AdaptMistralConfig


class AdaptMistralForCausalLM(PerLayerCausalLMMixin, MistralForCausalLM):
    config_class = AdaptMistralConfig
    _base_model_class = AdaptMistralModel


@strict
class AdaptQwen2Config(PerLayerConfigMixin, Qwen2Config):
    model_type = "adapt_qwen2"


class AdaptQwen2Model(PerLayerModelMixin, Qwen2Model):
    config_class = AdaptQwen2Config


class AdaptQwen2ForCausalLM(PerLayerCausalLMMixin, Qwen2ForCausalLM):
    config_class = AdaptQwen2Config
    _base_model_class = AdaptQwen2Model


MODELS = (
    (AdaptLlamaConfig, AdaptLlamaModel, AdaptLlamaForCausalLM),
    (AdaptMistralConfig, AdaptMistralModel, AdaptMistralForCausalLM),
    (AdaptQwen2Config, AdaptQwen2Model, AdaptQwen2ForCausalLM),
)
