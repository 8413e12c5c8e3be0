"""Importance after compensation: what removing a unit costs once the units that stay have made up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Floats
from adapt_pruner.config import RIDGE
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.scoring.gradients import UnitTensors
from adapt_pruner.scoring.gram import Grams, InputGram, cholesky


def obs_importance(
    model: nn.Module,
    family: Family,
    widths: Sequence[LayerWidths],
    grams: Grams,
    *,
    ridge: float = RIDGE,
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
    sets = [
        family.unit_tensors(kind, layer, layer_widths, parameters)
        for layer, layer_widths in enumerate(widths)
        for kind in family.kinds_in(layer_widths)
    ]
    scores = iter(removal_errors(parameters, sets, grams, ridge=ridge))
    return tuple(
        {kind.name: np.asarray(next(scores).cpu().numpy()) for kind in family.kinds_in(layer_widths)}
        for layer_widths in widths
    )


def removal_errors(
    parameters: Mapping[str, Tensor], sets: Sequence[UnitTensors], grams: Grams, *, ridge: float
) -> list[Tensor]:
    """`obs_importance` of the units of each set of members, [units] float64, on the model's device."""
    inverses: dict[str, Tensor] = {}  # the last one: unit kinds may share a matrix
    result = []
    for members in sets:
        first = members[0].view(parameters[members[0].name])
        units = first.shape[members[0].dim] // members[0].group_size
        total = torch.zeros(units, dtype=torch.float64, device=first.device)
        for tensor in members:
            if tensor.dim != 1:
                continue
            gram = grams[tensor.name]
            if tensor.name not in inverses:
                inverses = {tensor.name: _inverse(gram, ridge)}
            weight = parameters[tensor.name].detach()
            total += _removal_errors(weight, inverses[tensor.name], tensor.group_size, gram.name)
        result.append(total)
    return result


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
