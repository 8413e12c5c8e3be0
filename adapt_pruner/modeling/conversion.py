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

_PER_LAYER_KEYS = ("layer_types", "mlp_layer_types")  # lists of one value per layer
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
    others and those with `output_biases` the `adapt_*` class with `per_layer_config`. Everything else is that
    of `config`.
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
    runs = all(layer.intermediate_size % EXPERT_CHANNELS == 0 for layer in widths if layer.num_experts)
    if is_uniform(widths) and runs and not values.get("output_biases"):
        try:
            return _with_architecture(AutoConfig.for_model(stock_type, **values))
        except StrictDataclassError:
            # Stock Llama insists on hidden_size being a multiple of the heads; the adapt class does not.
            pass
    values["per_layer_config"] = dict(enumerate(layers))
    return _with_architecture(AutoConfig.for_model(f"adapt_{stock_type}", **values))


def keep_config_layers(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Makes a config, in place, that of a model with some of its layers.

    Args:
        kept: their numbers, ascending.
    """
    if len(kept) == config.num_hidden_layers:
        return
    own = config.to_dict().get("per_layer_config") or {}
    own = {int(layer): values for layer, values in own.items()}
    config.per_layer_config = None
    for key in _PER_LAYER_KEYS:
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[layer] for layer in kept])
    if getattr(config, "max_window_layers", None) is not None:  # Qwen: windows begin with this layer
        config.max_window_layers = sum(layer < config.max_window_layers for layer in kept)
    if getattr(config, "decoder_sparse_step", None) is not None:  # Qwen: which layers have no experts
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        config.mlp_only_layers = [i for i, layer in enumerate(kept) if layer in dense or (layer + 1) % step]
        config.decoder_sparse_step = 1
    # Gemma 3: every how many layers attention is full, which no longer holds; layer_types say it.
    config.__dict__.pop("sliding_window_pattern", None)
    config.num_hidden_layers = len(kept)
    if own:
        config.per_layer_config = {i: own[layer] for i, layer in enumerate(kept) if layer in own}


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


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM in evaluation mode whose parameters have no memory; its buffers have theirs."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


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
    for name, _ in list(converted.named_buffers()):  # rotary frequencies are not in the state dict
        owner, _, leaf = name.rpartition(".")
        setattr(converted.get_submodule(owner), leaf, model.get_buffer(name))
    converted.tie_weights()
    converted.generation_config = model.generation_config
    converted.set_attn_implementation(model.config._attn_implementation)
    return converted.train(model.training)
