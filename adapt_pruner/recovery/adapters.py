"""Low-rank adapters (LoRA) on the linear layers of a decoder, by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_peft() -> None:
    """Raises ValueError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError('lora_rank needs peft: pip install "adapt_pruner[lora]"') from error


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: int) -> Any:
    """The model with adapters on every linear layer but the head; only these are trained.

    Args:
        rank: of the adapters, at least 1.
        alpha: their outputs are scaled by alpha / rank.
    Source: arXiv 2106.09685.
    """
    import peft

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    return peft.get_peft_model(model, settings)


def merge_adapters(model: Any) -> PreTrainedModel:
    """The model without adapters, which its weights have taken in."""
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
