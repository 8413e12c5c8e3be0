"""Losses of a calibration pass: of the labels of the text, or of labels drawn from the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def text_loss(model: nn.Module, sequences: Tensor, labels: int, **kwargs: Any) -> Tensor:
    """Loss of the next tokens of the text, summed and divided by a number of labels; a scalar, nats.

    Only the loss is kept of the output: its logits would outlive their use by a backward pass.

    Args:
        sequences: [sequences, length] int64.
        kwargs: for the model.
    """
    loss: Tensor = model(
        input_ids=sequences, labels=sequences, num_items_in_batch=labels, use_cache=False, **kwargs
    ).loss
    return loss


def generator_of(seed: tuple[int, ...], device: torch.device) -> torch.Generator:
    """A generator for `drawn_loss`."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]))


def drawn_loss(
    model: nn.Module, sequences: Tensor, labels: int, generator: torch.Generator, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Loss of next tokens that are drawn from what the model predicts; that of the text, without gradients.

    The second moments of the gradients of such a loss are the Fisher matrix. Those with the labels of the
    text ("empirical Fisher") are not: they grow where the model is wrong, whatever its outputs do to it.

    Args:
        generator: on the model's device. Sequences draw one after the other, so that the draws do not depend
            on how many go through together.
    Returns:
        Two scalars as of `text_loss`.
    Source: Kunstner et al., arXiv 1905.12558.
    """
    logits = model(input_ids=sequences, use_cache=False, **kwargs).logits[:, :-1].float()
    drawn = [torch.multinomial(each.detach().softmax(-1), 1, generator=generator) for each in logits]
    flat = logits.flatten(0, 1)
    of_drawn, of_text = (
        functional.cross_entropy(values, targets.flatten(), reduction="sum") / labels
        for values, targets in ((flat, torch.cat(drawn)), (flat.detach(), sequences[:, 1:]))
    )
    return of_drawn, of_text
