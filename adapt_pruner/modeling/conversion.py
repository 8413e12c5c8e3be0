"""From a pruned stock model to the model class that can be saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapt_pruner.families import LayerWidths, is_uniform
from adapt_pruner.modeling.modeling_adapt import EXPERT_CHANNELS
from adapt_pruner.modeling.registration import register

# Written anew by whatever config class is chosen.
_DROPPED_KEYS = (
    "per_layer_config",
    "auto_map",
    "architectures",
    "model_type",
    "transformers_version",
    "share_embedding",
    "layer_sharing",
)
_SAVED_AS = {"mobilellm": "llama"}  # what transformers has no class for


def pruned_config(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Config of the model with the given widths.

    Layers of equal widths give the stock config class (no custom code to load it) where it can run them,
    others the `adapt_*` class with `per_layer_config`. Everything else is taken over from `config`.
    """
    register()
    values = {k: v for k, v in config.to_dict().items() if k not in _DROPPED_KEYS}
    values["head_dim"] = widths[0].head_dim
    layers = [_layer_values(layer, values) for layer in widths]
    for layer in layers:
        for key in layer:
            values[key] = max(other[key] for other in layers if key in other)
    stock_type = _SAVED_AS.get(config.model_type, config.model_type.removeprefix("adapt_"))
    # Stock experts do not run with every number of channels.
    if is_uniform(widths) and all(
        layer.intermediate_size % EXPERT_CHANNELS == 0 for layer in widths if layer.num_experts
    ):
        try:
            return _with_architecture(AutoConfig.for_model(stock_type, **values))
        except StrictDataclassError:
            # Stock Llama insists on hidden_size being a multiple of the heads; the adapt class does not.
            pass
    values["per_layer_config"] = dict(enumerate(layers))
    return _with_architecture(AutoConfig.for_model(f"adapt_{stock_type}", **values))


def _layer_values(widths: LayerWidths, config: Mapping[str, Any]) -> dict[str, int]:
    """The widths of a layer under the names that this config has for them."""
    values = {
        "num_attention_heads": widths.num_attention_heads,
        "num_key_value_heads": widths.num_key_value_heads,
    }
    if not widths.num_experts:
        return values | {"intermediate_size": widths.intermediate_size}
    channels = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    return values | {
        channels: widths.intermediate_size,
        "num_local_experts": widths.num_experts,
        "num_experts_per_tok": widths.experts_per_token,
    }


def _with_architecture(config: PreTrainedConfig) -> PreTrainedConfig:
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [model_class.__name__]
    return config


def convert_pruned_model(model: PreTrainedModel, widths: Sequence[LayerWidths]) -> PreTrainedModel:
    """The same weights in the class that describes the widths; no weight is copied.

    Args:
        model: a stock or `adapt_*` causal LM whose modules already have the given widths.
    """
    config = pruned_config(model.config, widths)
    config.dtype = model.dtype
    with torch.device("meta"):
        converted = AutoModelForCausalLM.from_config(config)
    converted.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # rotary frequencies are not in the state dict
        owner, _, leaf = name.rpartition(".")
        setattr(converted.get_submodule(owner), leaf, buffer)
    converted.tie_weights()
    converted.generation_config = model.generation_config
    converted.set_attn_implementation(model.config._attn_implementation)
    return converted.train(model.training)
