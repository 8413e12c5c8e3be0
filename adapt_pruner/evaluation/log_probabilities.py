"""Log-probabilities of chosen tokens under a causal language model, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of at most this many (position, vocabulary entry) pairs exist at a time: 256 MiB in fp32.
_LOGITS_AT_ONCE = 1 << 26


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation and inference mode for the block; every module gets its training flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def token_log_probabilities(
    model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> Tensor:
    """Log-probability of each target token as the successor of a position of the input.

    Only the asked positions go through the output embedding, in chunks, so that a large vocabulary costs
    little memory.

    Args:
        model: decoder whose logits are its output embedding of the last hidden state (soft-capped where the
            configuration has `final_logit_softcapping`); see `check_logits`.
        input_ids: [batch, length], int64; padding on the right only, which no asked position can see.
        rows, columns, targets: [n], int64: log P(targets[i] | input_ids[rows[i], :columns[i] + 1]).
    Returns:
        [n], fp32, on the device of the model.
    """
    device = model.device
    hidden = _hidden_states(model, input_ids.to(device))[rows.to(device), columns.to(device)]
    targets = targets.to(device)
    chunk = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    pieces = [
        -functional.cross_entropy(_logits(model, part), wanted, reduction="none")
        for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, device=device)


def check_logits(model: PreTrainedModel) -> None:
    """Make sure that `token_log_probabilities` computes what the model itself computes.

    Raises:
        ValueError: the model's logits are not just its output embedding of the last hidden state.
    """
    probe = torch.arange(4, device=model.device)[None]
    with evaluating(model):
        expected = model(input_ids=probe, use_cache=False).logits.float()
        seen = _logits(model, _hidden_states(model, probe))
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if not torch.allclose(seen, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        difference = float((seen - expected).abs().max())
        raise ValueError(
            f"{type(model).__name__} cannot be evaluated: its logits are not its output embedding of the "
            f"last hidden state, but differ by up to {difference:.3g}"
        )


def _hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    decoder: Any = model.base_model
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head: Any = model.get_output_embeddings()
    logits = head(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
