"""From a pruned stock model to the model class that can be saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from adapt_pruner.checkpoint import Checkpoint
from adapt_pruner.families import LayerWidths
from adapt_pruner.modeling.pruned_config import pruned_values, values_of_layers
from adapt_pruner.modeling.registration import register


def pruned_config(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Config of the model with the given widths: what `pruned_values` says, loaded."""
    register()
    values = pruned_values(config.to_dict(), widths)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def keep_config_layers(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Makes a config, in place, that of a model with some of its layers.

    Args:
        kept: their numbers, ascending.
    """
    if len(kept) == config.num_hidden_layers:
        return
    before = config.to_dict()
    after = values_of_layers(before, kept)
    config.per_layer_config = None  # of the layers before
    for key in before.keys() - after.keys():
        config.__dict__.pop(key, None)
    for key, value in after.items():
        if key not in before or value != before[key]:
            setattr(config, key, value)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM in evaluation mode whose parameters have no memory; its buffers have theirs."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def generation_config_of(checkpoint: Checkpoint) -> GenerationConfig:
    """What `from_pretrained` gives a model of this directory."""
    if (checkpoint.directory / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(checkpoint.directory)
    return GenerationConfig.from_model_config(checkpoint.config)


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
