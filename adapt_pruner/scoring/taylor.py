"""First-order Taylor importance from one forward and one backward pass over the calibration batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Floats
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.scoring.gradients import (
    Gradients,
    fused_importance,
    materialised_importance,
    uses_fused,
)
from adapt_pruner.scoring.gram import Grams
from adapt_pruner.scoring.layers import LayerImportance, Metric


@dataclass(frozen=True)
class Scores:
    """What one calibration batch tells.

    Attributes:
        loss: mean causal-LM loss, nats per label token.
        layer_importance: [layers], not normalised.
        unit_importance: per layer and unit kind, [units] float64 copies of the fp32 scores.
        grams: second moments of the inputs of every down_proj and o_proj, where they were asked for.
    """

    loss: float
    layer_importance: Floats
    unit_importance: tuple[dict[str, Floats], ...]
    grams: Grams | None = None


def score(
    model: nn.Module,
    family: Family,
    widths: tuple[LayerWidths, ...],
    batch: Tensor,
    *,
    micro_batch_size: int,
    metric: Metric = "cosine",
    gradients: Gradients = "auto",
    backend: str = "auto",
) -> Scores:
    """Importance of every unit and layer from the gradient of the mean loss over the whole batch.

    The result does not depend on the micro-batch size beyond rounding: gradients are summed over all
    micro-batches before the absolute value is taken, in fp32. Only prunable weights get a gradient, and with
    fused gradients only prunable biases.

    Args:
        batch: [sequences, length] int64 token ids on the model's device; every position but the first of
            each sequence is a label.
        micro_batch_size: sequences per forward and backward pass.
        gradients: whether gradients of weights exist; see `PruneConfig`.
    Raises:
        NonFiniteError: a weight, an activation or a gradient holds NaN or infinity.
        ValueError: the loss is not finite, or the gradients cannot be fused.
    Source: arXiv 2502.03460 section 3.2; algorithm.md sections 2 and 3.
    """
    parameters = dict(model.named_parameters())
    kinds = [kind.name for kind in family.unit_kinds]
    sets = [
        family.unit_tensors(kind, layer, layer_widths, parameters)
        for layer, layer_widths in enumerate(widths)
        for kind in family.unit_kinds
    ]
    one_pass = batch.shape[0] <= micro_batch_size
    if uses_fused(gradients, model, sets, batch, micro_batch_size):
        scoring = fused_importance(model, parameters, sets, backend=backend)
    else:
        scoring = materialised_importance(parameters, sets, one_pass=one_pass, backend=backend)
    layers = model.get_submodule(family.layers_module)
    assert isinstance(layers, nn.ModuleList)
    num_labels = batch.shape[0] * (batch.shape[1] - 1)
    loss = torch.zeros((), dtype=torch.float64)
    with (
        _evaluating(model),
        scoring as unit_importance,
        LayerImportance(layers, metric, backend) as layer_importance,
    ):
        for sequences in batch.split(micro_batch_size):
            # Passing the label count makes the micro-batch losses add up to the mean over the whole batch.
            # Only the loss is kept of the output: its logits would outlive their use by a backward pass.
            part = model(
                input_ids=sequences, labels=sequences, num_items_in_batch=num_labels, use_cache=False
            ).loss
            loss += part.detach().double().cpu()
            if not torch.isfinite(loss):
                layer_importance.result()  # names the layer, if it is one
                raise ValueError(
                    f"the calibration loss is {loss.item()}: weights or activations overflow in {model.dtype}"
                )
            part.backward()
        layer_scores = layer_importance.result()
        unit_scores = _to_host(unit_importance())
    per_layer = [unit_scores[i : i + len(kinds)] for i in range(0, len(unit_scores), len(kinds))]
    return Scores(
        loss.item(), layer_scores, tuple(dict(zip(kinds, scores, strict=True)) for scores in per_layer)
    )


def _to_host(scores: Sequence[Tensor]) -> list[Floats]:
    """Float64 copies, by one transfer."""
    ends = np.cumsum([len(values) for values in scores])
    together: Floats = torch.cat(list(scores)).double().cpu().numpy()
    return np.split(together, ends[:-1])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout while scoring."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
