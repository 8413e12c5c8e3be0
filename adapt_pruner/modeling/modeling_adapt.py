"""Decoder models whose layers have their own widths, for transformers.

One self-contained file: the `adapt_pruner` package registers these classes with the Auto classes, and
`save_pretrained` copies the file into the checkpoint, so that a process without the package loads it with
`trust_remote_code=True`.

The widths live in transformers' own key `per_layer_config`, which holds what differs between layers:

    {"0": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}, ...}

The global values beside it are the maxima over all layers. `output_biases` names linear modules of a layer,
such as "mlp.down_proj", that have a bias in every layer though the stock architecture has none there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# Channels of experts for which the grouped matrix product of stock models works in every dtype: it wants rows
# of a multiple of 16 bytes.
EXPERT_CHANNELS = 8

# Experts are one tensor in a module and one each in a checkpoint, as in the stock models.
for _stock_type in ("mixtral", "qwen3_moe"):
    register_checkpoint_conversion_mapping(
        f"adapt_{_stock_type}", get_checkpoint_conversion_mapping(_stock_type), overwrite=True
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
        stem, family = type(self).__module__.rpartition(".")[2], type(self).__name__.removesuffix("Config")
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
            for key in ("intermediate_size", "moe_intermediate_size", "num_local_experts"):
                if getattr(layer, key, 1) < 1:
                    raise ValueError(f"layer {i}: {key} is {getattr(layer, key)}, expected 1 or more")
            experts = getattr(layer, "num_local_experts", None)
            if experts is not None and not 1 <= layer.num_experts_per_tok <= experts:
                raise ValueError(
                    f"layer {i}: num_experts_per_tok is {layer.num_experts_per_tok}, expected 1 to {experts}"
                )

    def validate_rope(self) -> None:
        with _readable_maxima(self):
            super().validate_rope()

    def to_dict(self) -> dict[str, Any]:
        """The stock dictionary, with the rotary settings under their older names too.

        Readers that predate `rope_parameters` would otherwise take a base of 10000 without a word.
        """
        output = super().to_dict()
        rope = output.get("rope_parameters") or {}
        if "sliding_attention" in rope:  # Gemma 3: one for each kind of layer
            output["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope.get("full_attention") or rope)
        if "rope_theta" in rope:
            output["rope_theta"] = rope.pop("rope_theta")
            output["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if "partial_rotary_factor" in rope:
            output["partial_rotary_factor"] = rope["partial_rotary_factor"]
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


@contextlib.contextmanager
def _readable_maxima(config: PreTrainedConfig) -> Iterator[None]:
    """Lets stock checks read the maxima, where they do so for a head_dim that is given anyway."""
    if config.allow_global_per_layer_attribute_access:
        yield
        return
    config.allow_global_per_layer_attribute_access = True
    try:
        yield
    finally:
        del config.__dict__["allow_global_per_layer_attribute_access"]  # or it would be saved


class LayerConfigView:
    """The live config of a model with the widths of one layer, for modules that read widths as they run, or
    with other values of its own."""

    def __init__(self, config: Any, **widths: Any) -> None:
        self._config = config._config if isinstance(config, LayerConfigView) else config
        self._widths = widths

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_widths") or name.startswith("__"):  # not there yet while being copied
            raise AttributeError(name)
        return self._widths[name] if name in self._widths else getattr(self._config, name)


class PerLayerModelMixin:
    """Builds the stock model at the largest widths, then rebuilds the layers that are narrower.

    Under `from_pretrained` this happens on the meta device and allocates nothing.
    """

    _config_widths: ClassVar[bool] = False  # whether modules read widths from their config as they run

    def __init__(self, config: PreTrainedConfig) -> None:
        with _largest_widths(config):
            super().__init__(config)
        if config.is_heterogeneous:
            for i, layer in enumerate(self.layers):
                layer_config = config.per_layer_config[i]
                narrow = type(layer)(layer_config, i)
                shared: Any = config
                if self._config_widths:
                    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
                    shared = LayerConfigView(config, **{name: getattr(layer_config, name) for name in names})
                # One live config for all modules, or set_attn_implementation would not reach them.
                for module in narrow.modules():
                    if getattr(module, "config", None) is layer_config:
                        module.config = shared
                self.layers[i] = narrow
            if hasattr(self, "rotary_emb"):
                # Frequencies that follow the length of the text read it for a head_dim that is given anyway.
                heads = max(layer_config.num_attention_heads for layer_config in config.per_layer_config)
                self.rotary_emb.config = LayerConfigView(config, num_attention_heads=heads)
        for layer in self.layers:
            for name in getattr(config, "output_biases", None) or ():
                linear = layer.get_submodule(name)
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        self.post_init()


def experts_of_any_width(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What experts give for their tokens, one expert after the other: [tokens, hidden].

    Args:
        hidden_states: [tokens, hidden]. top_k_index, top_k_weights: [tokens, experts per token].
    """
    tokens, choices = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=experts.num_experts).tolist()
    outputs = [
        torch.nn.functional.linear(experts._apply_gate(torch.nn.functional.linear(x, gate_up)), down)
        for x, gate_up, down in zip(
            hidden_states[order // choices].split(counts),
            experts.gate_up_proj.unbind(),
            experts.down_proj.unbind(),
            strict=True,
        )
    ]
    weighted = torch.cat(outputs)[order.argsort()] * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, choices, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("any_width", experts_of_any_width)


def choose_experts_function(layer: Any) -> None:
    """Lets the experts of a decoder layer, if it has any, run whatever their number of channels."""
    experts = getattr(layer.mlp, "experts", None)
    if experts is None:
        return
    config = experts.config._config if isinstance(experts.config, LayerConfigView) else experts.config
    if experts.intermediate_dim % EXPERT_CHANNELS:
        config = LayerConfigView(config, _experts_implementation="any_width")
    experts.config = config


class PerLayerExpertsModelMixin(PerLayerModelMixin):
    """A model whose layers may differ in their number of experts and in the channels of those."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            choose_experts_function(layer)
        routers = [layer.mlp.gate for layer in self.layers if hasattr(layer.mlp, "gate")]
        most = max((router.num_experts for router in routers), default=0)
        for router in routers:
            if router.num_experts < most:
                router.register_forward_hook(partial(_pad_router_logits, most))


def _pad_router_logits(count: int, router: Any, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
    """Router logits of as many experts in every layer, as the stock loss that balances their load wants them.

    Experts that are not there have probability 0. The experts that a token goes through are chosen already.
    """
    logits = output[0]
    padding = (0, count - logits.shape[-1])
    return torch.nn.functional.pad(logits, padding, value=float("-inf")), *output[1:]


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


@strict
class AdaptQwen3Config(PerLayerConfigMixin, Qwen3Config):
    model_type = "adapt_qwen3"


class AdaptQwen3Model(PerLayerModelMixin, Qwen3Model):
    config_class = AdaptQwen3Config


class AdaptQwen3ForCausalLM(PerLayerCausalLMMixin, Qwen3ForCausalLM):
    config_class = AdaptQwen3Config
    _base_model_class = AdaptQwen3Model


@strict
class AdaptGemma2Config(PerLayerConfigMixin, Gemma2Config):
    model_type = "adapt_gemma2"


class AdaptGemma2Model(PerLayerModelMixin, Gemma2Model):
    config_class = AdaptGemma2Config


class AdaptGemma2ForCausalLM(PerLayerCausalLMMixin, Gemma2ForCausalLM):
    config_class = AdaptGemma2Config
    _base_model_class = AdaptGemma2Model


@strict
class AdaptGemma3TextConfig(PerLayerConfigMixin, Gemma3TextConfig):
    model_type = "adapt_gemma3_text"


class AdaptGemma3TextModel(PerLayerModelMixin, Gemma3TextModel):
    config_class = AdaptGemma3TextConfig


class AdaptGemma3TextForCausalLM(PerLayerCausalLMMixin, Gemma3ForCausalLM):
    config_class = AdaptGemma3TextConfig
    _base_model_class = AdaptGemma3TextModel


@strict
class AdaptPhi3Config(PerLayerConfigMixin, Phi3Config):
    model_type = "adapt_phi3"

    def validate_rope(self) -> None:
        """The stock check with head_dim, which hidden_size // num_attention_heads no longer gives."""
        with _readable_maxima(self):
            super(Phi3Config, self).validate_rope()
        rope = self.rope_parameters
        expected = int(self.head_dim * rope["partial_rotary_factor"]) // 2
        for name in ("short_factor", "long_factor"):
            if rope.get(name) is not None and len(rope[name]) != expected:
                raise ValueError(f"rope_parameters: {name} has {len(rope[name])} values, expected {expected}")


class AdaptPhi3Model(PerLayerModelMixin, Phi3Model):
    config_class = AdaptPhi3Config
    _config_widths = True


class AdaptPhi3ForCausalLM(PerLayerCausalLMMixin, Phi3ForCausalLM):
    config_class = AdaptPhi3Config
    _base_model_class = AdaptPhi3Model


@strict
class AdaptMixtralConfig(PerLayerConfigMixin, MixtralConfig):
    model_type = "adapt_mixtral"


class AdaptMixtralModel(PerLayerExpertsModelMixin, MixtralModel):
    config_class = AdaptMixtralConfig


class AdaptMixtralForCausalLM(PerLayerCausalLMMixin, MixtralForCausalLM):
    config_class = AdaptMixtralConfig
    _base_model_class = AdaptMixtralModel


@strict
class AdaptQwen3MoeConfig(PerLayerConfigMixin, Qwen3MoeConfig):
    model_type = "adapt_qwen3_moe"


class AdaptQwen3MoeModel(PerLayerExpertsModelMixin, Qwen3MoeModel):
    config_class = AdaptQwen3MoeConfig


class AdaptQwen3MoeForCausalLM(PerLayerCausalLMMixin, Qwen3MoeForCausalLM):
    config_class = AdaptQwen3MoeConfig
    _base_model_class = AdaptQwen3MoeModel


MODELS = (
    (AdaptLlamaConfig, AdaptLlamaModel, AdaptLlamaForCausalLM),
    (AdaptMistralConfig, AdaptMistralModel, AdaptMistralForCausalLM),
    (AdaptQwen2Config, AdaptQwen2Model, AdaptQwen2ForCausalLM),
    (AdaptQwen3Config, AdaptQwen3Model, AdaptQwen3ForCausalLM),
    (AdaptGemma2Config, AdaptGemma2Model, AdaptGemma2ForCausalLM),
    (AdaptGemma3TextConfig, AdaptGemma3TextModel, AdaptGemma3TextForCausalLM),
    (AdaptPhi3Config, AdaptPhi3Model, AdaptPhi3ForCausalLM),
    (AdaptMixtralConfig, AdaptMixtralModel, AdaptMixtralForCausalLM),
    (AdaptQwen3MoeConfig, AdaptQwen3MoeModel, AdaptQwen3MoeForCausalLM),
)
