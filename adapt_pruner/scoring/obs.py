"""Importance after compensation: what removing a unit costs once the units that stay have made up for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Floats
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.scoring.gram import Grams, InputGram, InputGrams, cholesky
from adapt_pruner.scoring.layers import LayerImportance, Metric
from adapt_pruner.scoring.taylor import Scores


def obs_importance(
    model: nn.Module,
    family: Family,
    widths: Sequence[LayerWidths],
    grams: Grams,
    *,
    ridge: float = 0.3,
) -> tuple[dict[str, Floats], ...]:
    """The squared error that removing each unit alone leaves after the best linear compensation.

    Args:
        grams: of the inputs of every down_proj and o_proj, from `InputGrams`.
        ridge: what is added to the diagonal of the second moments, as a fraction of it.
    Returns:
        Per layer and unit kind, [units], float64, summed over tokens and outputs.
    Raises:
        NonFiniteError: an input is not finite. ValueError: second moments that are singular.
    Source: the optimal brain surgeon (Hassibi and Stork 1993) for whole columns, with one output each.
    """
    parameters = dict(model.named_parameters())
    result = []
    for layer, layer_widths in enumerate(widths):
        scores: dict[str, Floats] = {}
        inverses: dict[str, Tensor] = {}  # unit kinds may share a matrix
        for kind in family.unit_kinds:
            total = torch.zeros(kind.count(layer_widths), dtype=torch.float64)
            for tensor in family.unit_tensors(kind, layer, layer_widths, parameters):
                if tensor.dim != 1:
                    continue
                gram = grams[tensor.name]
                if tensor.name not in inverses:
                    inverses[tensor.name] = _inverse(gram, ridge)
                weight = parameters[tensor.name].detach()
                total += _removal_errors(weight, inverses[tensor.name], tensor.group_size, gram.name).cpu()
            scores[kind.name] = np.asarray(total.numpy(), dtype=np.float64)
        result.append(scores)
    return tuple(result)


def _inverse(gram: InputGram, ridge: float) -> Tensor:
    return torch.cholesky_inverse(cholesky(gram.regularised(ridge), gram.name))


def _removal_errors(weight: Tensor, inverse: Tensor, group_size: int, name: str) -> Tensor:
    """[groups], float64: trace(W_G ((C^-1)_GG)^-1 W_G^T) of each group G of consecutive columns."""
    groups = weight.shape[1] // group_size
    members = weight.double().T.reshape(groups, group_size, -1)  # [groups, columns, out]
    if group_size == 1:
        return members.square().sum((1, 2)) / inverse.diagonal()
    block = torch.arange(weight.shape[1], device=weight.device).view(groups, group_size)
    blocks = inverse[block[:, :, None], block[:, None, :]]
    # With (C^-1)_GG = L L^T the trace is the squared norm of L^-1 W_G^T.
    solved = torch.linalg.solve_triangular(cholesky(blocks, name), members, upper=False)
    return solved.square().sum((1, 2))


def score_obs(
    model: nn.Module,
    family: Family,
    widths: tuple[LayerWidths, ...],
    batch: Tensor,
    *,
    micro_batch_size: int,
    metric: Metric = "cosine",
    ridge: float = 0.3,
    backend: str = "auto",
) -> Scores:
    """`score` with `obs_importance` in place of Taylor importance: forward passes alone, no gradient.

    Args and errors as in `score` and `obs_importance`. The result carries the Gram matrices.
    """
    layers = model.get_submodule(family.layers_module)
    assert isinstance(layers, nn.ModuleList)
    assert not model.training
    num_labels = batch.shape[0] * (batch.shape[1] - 1)
    loss = 0.0
    with (
        torch.no_grad(),
        InputGrams(model, family, widths, backend) as grams,
        LayerImportance(layers, metric, backend) as layer_importance,
    ):
        for sequences in batch.split(micro_batch_size):
            loss += model(
                input_ids=sequences, labels=sequences, num_items_in_batch=num_labels, use_cache=False
            ).loss.item()
    layer_scores = layer_importance.result()  # names the layer whose output is not finite, if one is
    if not np.isfinite(loss):
        dtype = next(model.parameters()).dtype
        raise ValueError(f"the calibration loss is {loss}: weights or activations overflow in {dtype}")
    return Scores(loss, layer_scores, obs_importance(model, family, widths, grams, ridge=ridge), grams)
