"""The config.json of a pruned model as plain values: no transformers, which live configs are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_pruner.families import LayerWidths, is_uniform

# Channels of experts for which the grouped matrix product of stock models works in every dtype: it wants rows
# of a multiple of 16 bytes. The same number is in modeling_adapt.py, which has to stand alone.
EXPERT_CHANNELS = 8

_PER_LAYER_KEYS = ("layer_types", "mlp_layer_types")  # lists of one value per layer
# Written anew, or of no meaning in whatever class is chosen.
_DROPPED_KEYS = ("per_layer_config", "auto_map", "architectures", "share_embedding", "layer_sharing")
_SAVED_AS = {"mobilellm": "llama"}  # what transformers has no class for


@dataclass(frozen=True)
class Classes:
    """The classes of a model type.

    Attributes:
        for_causal_lm: name of the stock class.
        stem: how the names of our classes begin.
        source: the file they are in, which is copied into checkpoints.
        any_heads: the stock config takes numbers of heads that hidden_size is no multiple of.
    """

    for_causal_lm: str
    stem: str
    source: Path
    any_heads: bool = False


def _own(for_causal_lm: str, stem: str, *, any_heads: bool = False) -> Classes:
    return Classes(for_causal_lm, f"Adapt{stem}", Path(__file__).with_name("modeling_adapt.py"), any_heads)


# By stock model type. `register_family` adds to it.
CLASSES: dict[str, Classes] = {
    "llama": _own("LlamaForCausalLM", "Llama"),
    "mistral": _own("MistralForCausalLM", "Mistral", any_heads=True),
    "qwen2": _own("Qwen2ForCausalLM", "Qwen2", any_heads=True),
    "qwen3": _own("Qwen3ForCausalLM", "Qwen3", any_heads=True),
    "gemma2": _own("Gemma2ForCausalLM", "Gemma2"),
    "gemma3_text": _own("Gemma3ForCausalLM", "Gemma3Text"),
    "phi3": _own("Phi3ForCausalLM", "Phi3", any_heads=True),
    "mixtral": _own("MixtralForCausalLM", "Mixtral", any_heads=True),
    "qwen3_moe": _own("Qwen3MoeForCausalLM", "Qwen3Moe", any_heads=True),
}


def pruned_values(config: Mapping[str, Any], widths: Sequence[LayerWidths]) -> dict[str, Any]:
    """The contents of the config.json of the model with the given widths.

    Layers of equal widths give the stock model type (no custom code to load it) where it can run them, others
    and those with `output_biases` the `adapt_*` one with `per_layer_config`. Everything else is that of
    `config`.

    Args:
        config: contents of a config.json, or `PreTrainedConfig.to_dict()`.
    """
    values = {key: value for key, value in config.items() if key not in _DROPPED_KEYS}
    if config["model_type"] == "mobilellm" and config.get("share_embedding", True):
        values["tie_word_embeddings"] = True
    values["head_dim"] = widths[0].head_dim
    layers = [_layer_values(layer, values) for layer in widths]
    largest = {key: max(layer[key] for layer in layers if key in layer) for layer in layers for key in layer}
    stock_type = _SAVED_AS.get(config["model_type"], config["model_type"].removeprefix("adapt_"))
    classes = CLASSES[stock_type]
    # Older configs of Qwen3-MoE have another name for it, which classes know as an alias.
    names = {} if "num_local_experts" in values else {"num_local_experts": "num_experts"}
    values |= {names.get(key, key): value for key, value in largest.items()}
    if is_uniform(widths) and _stock_runs(classes, widths, values):
        return {**values, "model_type": stock_type, "architectures": [classes.for_causal_lm]}
    different = {
        number: narrow
        for number, layer in enumerate(layers)
        if (narrow := {key: value for key, value in layer.items() if value != largest[key]})
    }
    digits = len(str(max(different, default=0)))  # or 10 would come before 2
    module = classes.source.stem
    return {
        **values,
        **_older_rope_keys(values),
        "model_type": f"adapt_{stock_type}",
        "architectures": [f"{classes.stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{classes.stem}Config",
            "AutoModel": f"{module}.{classes.stem}Model",
            "AutoModelForCausalLM": f"{module}.{classes.stem}ForCausalLM",
        },
        "per_layer_config": {f"{number:0{digits}}": narrow for number, narrow in different.items()},
    }


def values_of_layers(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The contents of the config.json of a model with some of its layers.

    Args:
        kept: their numbers, ascending.
    """
    values = dict(config)
    if len(kept) == values["num_hidden_layers"]:
        return values
    # Gemma: every how many layers attention is full, which no longer holds; layer_types say it.
    pattern = values.pop("sliding_window_pattern", 6)
    stock_type = values["model_type"].removeprefix("adapt_")
    if stock_type in ("gemma2", "gemma3_text") and values.get("layer_types") is None:
        every = 2 if stock_type == "gemma2" else pattern
        values["layer_types"] = [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(values["num_hidden_layers"])
        ]
    for key in _PER_LAYER_KEYS:
        if values.get(key) is not None:
            values[key] = [values[key][layer] for layer in kept]
    if values.get("max_window_layers") is not None:  # Qwen: windows begin with this layer
        values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in kept)
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers") or ()
    if step is not None or dense:  # Qwen: which layers have no experts
        values["mlp_only_layers"] = [
            i for i, layer in enumerate(kept) if layer in dense or (layer + 1) % (step or 1)
        ]
        values["decoder_sparse_step"] = 1
    values["num_hidden_layers"] = len(kept)
    if values.get("per_layer_config"):
        own = {int(layer): narrow for layer, narrow in values["per_layer_config"].items()}
        values["per_layer_config"] = {i: own[layer] for i, layer in enumerate(kept) if layer in own}
    return values


def source_of_classes(values: Mapping[str, Any]) -> Path | None:
    """The file with the classes that a config.json of `pruned_values` names; None where they are stock."""
    if "auto_map" not in values:
        return None
    return CLASSES[values["model_type"].removeprefix("adapt_")].source


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


def _stock_runs(classes: Classes, widths: Sequence[LayerWidths], values: Mapping[str, Any]) -> bool:
    """Whether the stock classes take these widths, the same in all layers, and compute with them."""
    if values.get("output_biases"):
        return False
    if any(layer.num_experts and layer.intermediate_size % EXPERT_CHANNELS for layer in widths):
        return False
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if not classes.any_heads and hidden % heads:
        return False
    # Phi-3 insists on as many factors as hidden_size // heads, not head_dim, makes rotary frequencies.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    factors = [rope[name] for name in ("short_factor", "long_factor") if rope.get(name) is not None]
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    return all(len(values) == int(hidden // heads * share) // 2 for values in factors)


def _older_rope_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings under their older names, as the `adapt_*` configs write them.

    Readers that predate `rope_parameters` would otherwise take a base of 10000 without a word.
    """
    rope = values.get("rope_parameters") or {}
    older: dict[str, Any] = {}
    if "sliding_attention" in rope:  # Gemma 3: one for each kind of layer
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = dict(rope.get("full_attention") or rope)
    if "rope_theta" in rope:
        older["rope_theta"] = rope.pop("rope_theta")
        older["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return older
