"""Losses of a calibration pass: of the labels of the text, or of labels drawn from the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
        Two scalars as of `text_loss`. Where that of the text is not finite, nothing is drawn: it is both.
    Source: Kunstner et al., arXiv 1905.12558.
    """
    logits = model(input_ids=sequences, use_cache=False, **kwargs).logits[:, :-1].float()
    predicted = logits.log_softmax(-1)
    of_text = -predicted.detach().gather(-1, sequences[:, 1:, None]).sum() / labels
    if not torch.isfinite(of_text):
        return of_text, of_text
    drawn = torch.stack([_draw(each.detach().exp(), generator) for each in predicted])
    return -predicted.gather(-1, drawn[..., None]).sum() / labels, of_text


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """An index of each row by its probabilities: [rows, n] -> [rows] int64."""
    if probabilities.is_cuda:  # where cumsum differs from run to run
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    ends = probabilities.cumsum(-1)
    at = torch.rand(len(ends), 1, generator=generator) * ends[:, -1:]
    return torch.searchsorted(ends, at, right=True)[:, 0].clamp_(max=ends.shape[-1] - 1)
