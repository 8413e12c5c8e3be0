"""Decoder models whose hidden states have their own width at every position, for transformers.

One self-contained file, like `modeling_adapt.py`: registered by the package and copied into checkpoints, so
that a process without the package loads it with `trust_remote_code=True`.

A position is a place in the residual stream: behind the embedding (0), behind the attention of layer l
(2 l + 1) and behind its MLP (2 l + 2). `sliced_widths` has the width of each. The hidden states at two
positions are coordinates in different bases, so a skip connection goes through a matrix, the `*_shortcut`.
Norms have no weights, those are part of the matrices behind them, and embedding and head are never tied.
Source: SliceGPT, arXiv 2401.15024.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
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
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

# The matrices of a block that write to the residual stream; its others read from it.
OUTPUTS = ("o_proj", "down_proj")


class SlicedConfigMixin:
    """A stock decoder config with `sliced_widths`; `hidden_size` stays that of the original model."""

    _auto_class: ClassVar[str | None] = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.sliced_widths is None:
            self.sliced_widths = [self.hidden_size] * (2 * self.num_hidden_layers + 1)
        stem, family = type(self).__module__.rpartition(".")[2], type(self).__name__.removesuffix("Config")
        self.auto_map = {
            "AutoConfig": f"{stem}.{family}Config",
            "AutoModel": f"{stem}.{family}Model",
            "AutoModelForCausalLM": f"{stem}.{family}ForCausalLM",
        }

    def validate_sliced_widths(self) -> None:
        """One width for each position, from 1 to hidden_size, and a head of its own."""
        widths, positions = self.sliced_widths, 2 * self.num_hidden_layers + 1
        if len(widths) != positions or not all(1 <= width <= self.hidden_size for width in widths):
            raise ValueError(
                f"sliced_widths is {widths}, expected {positions} widths from 1 to {self.hidden_size}"
            )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is True, expected False: the head has another basis")


class SlicedRMSNorm(nn.Module):
    """x / sqrt(sum x^2 / hidden_size + eps) in fp32 or better.

    The divisor is the original width whatever the width of x: a rotation leaves the sum of squares as it is,
    and what is sliced off has the least part in it.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        values = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        square = values.square().sum(-1, keepdim=True) / self.hidden_size
        return (values * torch.rsqrt(square + self.eps)).to(hidden_states.dtype)


def _resize(block: nn.Module, inputs: int, outputs: int) -> None:
    """Gives attention or MLP other widths of what it reads and writes."""
    for name, linear in block.named_children():
        if isinstance(linear, nn.Linear):
            features = (linear.in_features, outputs) if name in OUTPUTS else (inputs, linear.out_features)
            setattr(block, name, nn.Linear(*features, bias=linear.bias is not None))


class SlicedLayerMixin:
    """A stock decoder layer between three positions."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        before, middle, after = config.sliced_widths[2 * layer_idx : 2 * layer_idx + 3]
        _resize(self.self_attn, before, middle)
        _resize(self.mlp, middle, after)
        self.input_layernorm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention_shortcut = nn.Linear(before, middle, bias=False)
        self.mlp_shortcut = nn.Linear(middle, after, bias=False)
        self.dropout = nn.Dropout(getattr(config, "resid_pdrop", 0.0))  # Phi-3 has one

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + self.dropout(attended)
        expanded = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.mlp_shortcut(hidden_states) + self.dropout(expanded)


class SlicedModelMixin:
    """Builds the stock model, then what has another width.

    Under `from_pretrained` this happens on the meta device and allocates nothing.
    """

    _layer_class: ClassVar[type]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.sliced_widths[0], config.pad_token_id)
        self.layers = nn.ModuleList(self._layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


class SlicedCausalLMMixin:
    """Swaps the stock base model and head for the sliced ones."""

    _auto_class = "AutoModelForCausalLM"
    _base_model_class: ClassVar[type]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self._base_model_class(config)
        self.lm_head = nn.Linear(config.sliced_widths[-1], config.vocab_size, bias=False)
        self.post_init()


@strict
class SlicedLlamaConfig(SlicedConfigMixin, LlamaConfig):
    model_type = "sliced_llama"
    sliced_widths: list[int] | None = None


class SlicedLlamaDecoderLayer(SlicedLayerMixin, LlamaDecoderLayer):
    pass


class SlicedLlamaModel(SlicedModelMixin, LlamaModel):
    config_class = SlicedLlamaConfig
    _layer_class = SlicedLlamaDecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["SlicedLlamaDecoderLayer"]


class SlicedLlamaForCausalLM(SlicedCausalLMMixin, LlamaForCausalLM):
    config_class = SlicedLlamaConfig
    _base_model_class = SlicedLlamaModel


@strict
class SlicedMistralConfig(SlicedConfigMixin, MistralConfig):
    model_type = "sliced_mistral"
    sliced_widths: list[int] | None = None


class SlicedMistralDecoderLayer(SlicedLayerMixin, MistralDecoderLayer):
    pass


class SlicedMistralModel(SlicedModelMixin, MistralModel):
    config_class = SlicedMistralConfig
    _layer_class = SlicedMistralDecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["SlicedMistralDecoderLayer"]


class SlicedMistralForCausalLM(SlicedCausalLMMixin, MistralForCausalLM):
    config_class = SlicedMistralConfig
    _base_model_class = SlicedMistralModel


@strict
class SlicedQwen2Config(SlicedConfigMixin, Qwen2Config):
    model_type = "sliced_qwen2"
    sliced_widths: list[int] | None = None


class SlicedQwen2DecoderLayer(SlicedLayerMixin, Qwen2DecoderLayer):
    pass


class SlicedQwen2Model(SlicedModelMixin, Qwen2Model):
    config_class = SlicedQwen2Config
    _layer_class = SlicedQwen2DecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["SlicedQwen2DecoderLayer"]


class SlicedQwen2ForCausalLM(SlicedCausalLMMixin, Qwen2ForCausalLM):
    config_class = SlicedQwen2Config
    _base_model_class = SlicedQwen2Model


@strict
class SlicedQwen3Config(SlicedConfigMixin, Qwen3Config):
    model_type = "sliced_qwen3"
    sliced_widths: list[int] | None = None


class SlicedQwen3DecoderLayer(SlicedLayerMixin, Qwen3DecoderLayer):
    pass


class SlicedQwen3Model(SlicedModelMixin, Qwen3Model):
    config_class = SlicedQwen3Config
    _layer_class = SlicedQwen3DecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["SlicedQwen3DecoderLayer"]


class SlicedQwen3ForCausalLM(SlicedCausalLMMixin, Qwen3ForCausalLM):
    config_class = SlicedQwen3Config
    _base_model_class = SlicedQwen3Model


@strict
class SlicedPhi3Config(SlicedConfigMixin, Phi3Config):
    model_type = "sliced_phi3"
    sliced_widths: list[int] | None = None


class SlicedPhi3DecoderLayer(SlicedLayerMixin, Phi3DecoderLayer):
    pass


class SlicedPhi3Model(SlicedModelMixin, Phi3Model):
    config_class = SlicedPhi3Config
    _layer_class = SlicedPhi3DecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["SlicedPhi3DecoderLayer"]


class SlicedPhi3ForCausalLM(SlicedCausalLMMixin, Phi3ForCausalLM):
    config_class = SlicedPhi3Config
    _base_model_class = SlicedPhi3Model


MODELS = (
    (SlicedLlamaConfig, SlicedLlamaModel, SlicedLlamaForCausalLM),
    (SlicedMistralConfig, SlicedMistralModel, SlicedMistralForCausalLM),
    (SlicedQwen2Config, SlicedQwen2Model, SlicedQwen2ForCausalLM),
    (SlicedQwen3Config, SlicedQwen3Model, SlicedQwen3ForCausalLM),
    (SlicedPhi3Config, SlicedPhi3Model, SlicedPhi3ForCausalLM),
)
