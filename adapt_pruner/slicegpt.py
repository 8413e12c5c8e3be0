"""SliceGPT: hidden states in their principal coordinates, the least of which are deleted.

RMSNorm without weights does not change under a rotation, so each place in the residual stream may have its
own orthogonal basis: the matrices that write to it are rotated into the basis, those that read from it out of
it, and a skip connection goes through the product of two bases. The basis is that of the principal components
of the calibration activations, largest first. Deleting its last vectors deletes rows or columns of all these.

Positions are numbered as in `modeling/modeling_sliced.py`: 0 behind the embedding, 2 l + 1 behind the
attention of layer l, 2 l + 2 behind its MLP; the last is read by the head.
Source: arXiv 2401.15024.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapt_pruner.checkpoint import TensorInfo
from adapt_pruner.modeling import register
from adapt_pruner.modeling.modeling_sliced import OUTPUTS, SlicedRMSNorm

# Those whose blocks read from the residual stream through an RMSNorm, and write to it without another.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
_FOLDED = ("input_layernorm", "post_attention_layernorm", "norm")
_ROWS = 8192  # of a matrix that are multiplied in fp64 at a time
# Written anew by the config class of the sliced model.
_DROPPED_KEYS = ("auto_map", "architectures", "model_type", "transformers_version", "tie_word_embeddings")


def require_sliceable(model_type: str) -> None:
    """Raises ValueError for an architecture that a rotation of its hidden states would change."""
    if model_type in MODEL_TYPES:
        return
    if model_type.startswith("gemma"):
        reason = (
            "it has norms between its blocks and the residual stream, which a rotation does not commute with"
        )
    else:
        reason = "only stock models of some families can be"
    raise ValueError(
        f"model_type is {model_type!r}, which slicegpt cannot slice: {reason}; expected one of {MODEL_TYPES}"
    )


@dataclass(frozen=True)
class SliceBudget:
    """Parameters of a sliced model as a function of the width of each position.

    Attributes:
        hidden_size: width of every position before slicing.
        fixed: parameters that no width changes: biases and norms inside of blocks.
        per_dimension: of each position, parameters of the blocks that one dimension more adds, but for the
            rotations.
        vocabulary: rows of the embedding, and of the head, which is a matrix of its own.
    """

    hidden_size: int
    fixed: int
    per_dimension: tuple[int, ...]
    vocabulary: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], layers: int) -> SliceBudget:
        """From the headers of a checkpoint.

        Raises:
            ValueError: a tensor that is none of a model with RMSNorms before its blocks.
        """
        vocabulary, hidden_size = tensors["model.embed_tokens.weight"].shape
        fixed, per_dimension = 0, [0] * (2 * layers + 1)
        for name, info in tensors.items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                continue
            *path, module, kind = name.split(".")
            if (module in _FOLDED and kind == "weight") or module == "rotary_emb":  # frequencies in old files
                continue
            if len(path) != 4 or path[3] not in ("self_attn", "mlp"):
                raise ValueError(f"slicegpt does not know what to do with tensor {name} {info.shape}")
            before = 2 * int(path[2]) + (path[3] == "mlp")
            if module in OUTPUTS:  # [hidden, columns], and a bias of hidden
                per_dimension[before + 1] += info.numel // hidden_size
            elif len(info.shape) == 2:
                per_dimension[before] += info.shape[0]
            else:
                fixed += info.numel
        return cls(hidden_size, fixed, tuple(per_dimension), vocabulary)

    def parameters(self, widths: Sequence[int], *, embeddings: bool = True) -> int:
        """Of a model with these widths, with or without embedding and head."""
        linear = sum(cost * width for cost, width in zip(self.per_dimension, widths, strict=True))
        rotations = sum(a * b for a, b in pairwise(widths))
        tables = self.vocabulary * (widths[0] + widths[-1]) if embeddings else 0
        return self.fixed + linear + rotations + tables

    def land(self, target: int, *, embeddings: bool = True) -> tuple[int, ...]:
        """The widest positions with at most `target` parameters.

        All have the same width, or one dimension more from the front on as long as it fits: no position that
        has not got it could take it without exceeding the target.

        Raises:
            ValueError: the target is below what one dimension at each position leaves.
        """

        def uniform(width: int) -> int:
            return self.parameters((width,) * len(self.per_dimension), embeddings=embeddings)

        width = bisect.bisect_right(range(1, self.hidden_size + 1), target, key=uniform)
        if width == 0:
            raise ValueError(
                f"{target:,} parameters are below the {uniform(1):,} of hidden states of width 1"
            )
        widths = [width] * len(self.per_dimension)
        for position in range(len(widths)) if width < self.hidden_size else ():
            widths[position] += 1
            if self.parameters(widths, embeddings=embeddings) > target:
                widths[position] -= 1
        return tuple(widths)


@dataclass(frozen=True)
class SlicedModel:
    """A sliced model, what was seen on the way, and its loss on the calibration text in nats per token.

    Attributes:
        eigenvalues: of each position [hidden_size], fp64, in descending order: mean squares of the
            activations along its principal directions, behind the slicing of all positions before it.
    """

    model: PreTrainedModel
    eigenvalues: tuple[Tensor, ...]
    loss: float


def sliced_config(config: PreTrainedConfig, widths: Sequence[int]) -> PreTrainedConfig:
    """Config of the model with the given width of each position; everything else is taken over."""
    register()
    values = {k: v for k, v in config.to_dict().items() if k not in _DROPPED_KEYS}
    sliced = AutoConfig.for_model(
        f"sliced_{config.model_type}", **values, tie_word_embeddings=False, sliced_widths=list(widths)
    )
    model_class: Any = AutoModelForCausalLM._model_mapping[type(sliced)]
    sliced.architectures = [model_class.__name__]
    return sliced


def principal_axes(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Principal components of activations, not centred, summed and decomposed in fp64.

    Args:
        batches: each [sequences, length, hidden_size].
    Returns:
        eigenvalues of the mean of x x^T, [hidden_size], descending, and the eigenvectors as columns,
        [hidden_size, hidden_size]. The entry of each vector that is largest in absolute value is positive.
    Raises:
        ValueError: an activation is NaN or infinite.
    """
    hidden_size, tokens = batches[0].shape[-1], sum(batch.shape[:-1].numel() for batch in batches)
    products = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=batches[0].device)
    for batch in batches:
        rows = batch.reshape(-1, hidden_size).double()
        products += rows.T @ rows
    if not torch.isfinite(products).all():
        raise ValueError("calibration activations are NaN or infinite")
    values, vectors = torch.linalg.eigh(products / tokens)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


@torch.no_grad()
def slice_model(
    model: PreTrainedModel, widths: Sequence[int], batch: Tensor, *, micro_batch_size: int
) -> SlicedModel:
    """Rotates a model to the principal components of its hidden states and keeps the first of each position.

    Position by position: the components of one are those of activations that went through the sliced ones
    before it. Weights are multiplied in fp64 and rounded once to their dtype.

    Args:
        model: stock causal LM of `MODEL_TYPES`; used up by this.
        widths: how many components to keep, of each position.
        batch: [sequences, length] token ids on the device of the model.
        micro_batch_size: sequences at a time.
    Raises:
        ValueError: activations that are not finite; the message names the position.
    Source: arXiv 2401.15024 section 3.
    """
    core: Any = model.model
    config: Any = model.config
    norm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
    batches = batch.split(micro_batch_size)
    layer_arguments = _layer_arguments(core, batch[:1])

    eigenvalues: list[Tensor] = []
    weights: dict[str, Tensor] = {}

    def basis_of(signals: Sequence[Tensor]) -> Tensor:
        try:
            values, axes = principal_axes(signals)
        except ValueError as error:
            raise ValueError(f"position {len(eigenvalues)} of the residual stream: {error}") from None
        eigenvalues.append(values)
        return axes[:, : widths[len(eigenvalues) - 1]]

    signals: Sequence[Tensor] = [core.embed_tokens(ids) for ids in batches]
    basis = basis_of(signals)
    weights["model.embed_tokens.weight"] = _product(core.embed_tokens.weight, basis)
    hidden = _coordinates(signals, basis)

    def through(block: nn.Module, scale: Tensor, run: Callable[[Tensor], Tensor], shortcut: str) -> None:
        """Slices a block between the current position and the next, which becomes the current one."""
        nonlocal basis, hidden
        for linear in _linears(block, outputs=False):
            linear.weight = nn.Parameter(_product(linear.weight, basis, scale))
        back = basis.T.to(hidden[0].dtype)
        signals = [states @ back + run(norm(states)) for states in hidden]
        following = basis_of(signals)
        for linear in _linears(block, outputs=True):
            linear.weight = nn.Parameter(_product(linear.weight.T, following).T.contiguous())
            if linear.bias is not None:
                linear.bias = nn.Parameter(_product(linear.bias[None], following)[0])
        weights[shortcut] = (following.T @ basis).to(linear.weight.dtype)
        hidden, basis = _coordinates(signals, following), following

    for i, (layer, arguments) in enumerate(zip(core.layers, layer_arguments, strict=True)):

        def attend(states: Tensor, layer: Any = layer, arguments: Any = arguments) -> Tensor:
            attended: Tensor = layer.self_attn(hidden_states=states, **arguments)[0]
            return attended

        prefix = f"model.layers.{i}"
        through(layer.self_attn, layer.input_layernorm.weight, attend, f"{prefix}.attention_shortcut.weight")
        through(layer.mlp, layer.post_attention_layernorm.weight, layer.mlp, f"{prefix}.mlp_shortcut.weight")

    weights["lm_head.weight"] = head = _product(model.lm_head.weight, basis, core.norm.weight)
    loss = 0.0
    for ids, states in zip(batches, hidden, strict=True):
        logits = norm(states[:, :-1]) @ head.T
        loss += cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] not in _FOLDED:
            weights.setdefault(name, parameter)
    sliced = _assembled(model, sliced_config(model.config, widths), weights)
    return SlicedModel(sliced, tuple(eigenvalues), loss / batch[:, 1:].numel())


def _layer_arguments(core: Any, ids: Tensor) -> list[dict[str, Any]]:
    """What each layer is given beside hidden states: masks and rotary angles of sequences of this length."""
    seen: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in core.layers]
    try:
        core(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _linears(block: nn.Module, *, outputs: bool) -> list[nn.Linear]:
    """The matrices of a block that read from the residual stream, or those that write to it."""
    return [
        module
        for name, module in block.named_children()
        if isinstance(module, nn.Linear) and (name in OUTPUTS) == outputs
    ]


def _product(weight: Tensor, basis: Tensor, scale: Tensor | None = None) -> Tensor:
    """weight * scale @ basis in fp64, [rows, width], in the dtype of the weight."""
    right = basis if scale is None else scale.double()[:, None] * basis
    return torch.cat([(rows.double() @ right).to(weight.dtype) for rows in weight.split(_ROWS)])


def _coordinates(signals: Sequence[Tensor], basis: Tensor) -> list[Tensor]:
    axes = basis.to(signals[0].dtype)
    return [signal @ axes for signal in signals]


def _assembled(
    model: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The sliced model of these weights, with the buffers and generation defaults of the stock one."""
    config.dtype = model.dtype
    with torch.device("meta"):
        sliced: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    sliced.load_state_dict(weights, assign=True)
    for name, buffer in model.named_buffers():  # rotary frequencies are not in the state dict
        owner, _, leaf = name.rpartition(".")
        setattr(sliced.get_submodule(owner), leaf, buffer)
    sliced.generation_config = model.generation_config
    sliced.set_attn_implementation(model.config._attn_implementation)
    return sliced.eval()
