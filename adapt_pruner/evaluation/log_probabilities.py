"""Log-probabilities of chosen tokens under a causal language model, in bounded memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adapt_pruner.evaluation.shared_rows import batches, shared_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of at most this many (position, vocabulary entry) pairs exist at a time: 256 MiB in fp32.
_LOGITS_AT_ONCE = 1 << 26


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients for the block; every module gets its training flag back.

    Not inference mode: what a sharded model gathers under it, training could not write to afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def token_log_probabilities(
    model: PreTrainedModel,
    input_ids: Tensor,
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Log-probability of each target token as the successor of a position of the input.

    Only the asked positions go through the output embedding, each once whatever the number of its targets, in
    chunks, so that a large vocabulary costs little memory.

    Args:
        model: decoder whose logits are its output embedding of the last hidden state (soft-capped where the
            configuration has `final_logit_softcapping`); see `check_logits`.
        input_ids: [batch, length], int64; padding on the right only, which no asked position can see.
        rows, columns, targets: [n], int64: log P(targets[i] | what column columns[i] of row rows[i] sees).
        positions, seen: as in `Batch`; for a model that `longest_shared` allows it for.
    Returns:
        [n], fp32, on the device of the model.
    """
    device = model.device
    states = _hidden_states(model, input_ids.to(device), positions, seen)
    asked, which = torch.unique(rows * input_ids.shape[1] + columns, return_inverse=True)
    states = states.flatten(0, 1)[asked.to(device)]
    which, targets = which.to(device), targets.to(device)
    result = torch.zeros(len(targets), device=device)
    chunk = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    for start in range(0, len(states), chunk):
        logits = _logits(model, states[start : start + chunk])
        (here,) = torch.nonzero((which >= start) & (which < start + chunk), as_tuple=True)
        place = which[here] - start
        result[here] = logits[place, targets[here]] - logits.logsumexp(-1)[place]
    return result


def check_logits(model: PreTrainedModel) -> None:
    """Make sure that `token_log_probabilities` computes what the model itself computes.

    Raises:
        ValueError: the model's logits are not just its output embedding of the last hidden state.
    """
    probe = torch.arange(4, device=model.device)[None]
    with evaluating(model):
        expected = model(input_ids=probe, use_cache=False).logits.float()
        seen = _logits(model, _hidden_states(model, probe))
    if not _equal(model, seen, expected):
        difference = float((seen - expected).abs().max())
        raise ValueError(
            f"{type(model).__name__} cannot be evaluated: its logits are not its output embedding of the "
            f"last hidden state, but differ by up to {difference:.3g}"
        )


def longest_shared(model: PreTrainedModel) -> int:
    """Tokens of the longest sequences that the model can read in rows with branches; 0 if it cannot.

    Rows with branches need attention that takes a mask as it is given, and states that depend on nothing but
    what the mask shows and the positions. Layers with a sliding window ignore it then, so that no sequence
    may be longer than it.
    """
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if (
        not getattr(model, "_supports_attention_backend", False)
        or config._attn_implementation not in ("sdpa", "eager")
        or kinds - {"full_attention", "sliding_attention"}
    ):
        return 0
    sequences = [np.array([0, 1, 2]), np.array([0, 1, 3])]
    (row,) = shared_rows(sequences, 3)
    (batch,) = batches([row], len(row.tokens))
    with evaluating(model):
        (states,) = _hidden_states(model, batch.tokens.to(model.device), batch.positions, batch.seen)
        apart = _hidden_states(model, torch.from_numpy(np.stack(sequences)).to(model.device))
    together = torch.stack([states[torch.from_numpy(path).to(model.device)] for path in row.paths])
    if not _equal(model, together, apart):
        return 0
    return getattr(config, "sliding_window", None) or sys.maxsize


def _equal(model: PreTrainedModel, seen: Tensor, expected: Tensor) -> bool:
    """Whether two results of a model are one but for rounding."""
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return torch.allclose(seen, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def _hidden_states(
    model: PreTrainedModel, input_ids: Tensor, positions: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """[batch, length, hidden], before the output embedding."""
    decoder: Any = model.base_model
    given: dict[str, Tensor] = {}
    if seen is not None:
        assert positions is not None
        # Numbers to add, which eager attention and sdpa both take.
        hidden = torch.full(seen.shape, torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device)
        given["attention_mask"] = hidden.masked_fill_(seen.to(model.device), 0)[:, None]
        given["position_ids"] = positions.to(model.device)
    return decoder(input_ids=input_ids, use_cache=False, **given).last_hidden_state


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head: Any = model.get_output_embeddings()
    logits = head(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
