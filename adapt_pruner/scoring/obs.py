"""Importance after compensation: what removing a unit costs once the units that stay have made up for it.

The cost is the squared error of the outputs, or where the second moments of their gradients are known, the
loss that this error adds, by a Kronecker-factored Fisher matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Floats
from adapt_pruner.config import RIDGE
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.kernels import NonFiniteError
from adapt_pruner.scoring.gradients import UnitTensors
from adapt_pruner.scoring.gram import Grams, InputGram, cholesky

DAMPING = 0.1  # on the diagonal of second moments of gradients, as a fraction of its mean


def obs_importance(
    model: nn.Module,
    family: Family,
    widths: Sequence[LayerWidths],
    grams: Grams,
    *,
    ridge: float = RIDGE,
) -> tuple[dict[str, Floats], ...]:
    """What removing each unit alone costs after the best linear compensation.

    With gradients in the Gram matrices that is an estimate of how much the mean loss rises, in nats; without,
    the squared error of the outputs, summed over tokens.

    Args:
        grams: of every down_proj and o_proj, from `InputGrams`.
        ridge: what is added to the diagonal of the second moments, as a fraction of it.
    Returns:
        Per layer and unit kind, [units], float64.
    Raises:
        NonFiniteError: an input or gradient is not finite. ValueError: second moments that are singular.
    Source: the optimal brain surgeon (Hassibi and Stork 1993) for whole columns; the Kronecker-factored
    Fisher matrix as in arXiv 2312.17244.
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
            weight = parameters[tensor.name].detach().double()
            if gram.gradients is not None:
                weight = _loss_metric(gram) @ weight
            total += _removal_errors(weight, inverses[tensor.name], tensor.group_size, gram.name)
        result.append(total)
    return result


def _inverse(gram: InputGram, ridge: float) -> Tensor:
    return torch.cholesky_inverse(cholesky(gram.regularised(ridge), gram.name))


def _loss_metric(gram: InputGram) -> Tensor:
    """[out, out], float64: R such that |R e|^2, summed over tokens, estimates what errors e of the outputs
    add to the mean loss.

    R^T R is half the sum over tokens of g g^T, g the gradient of the mean loss: the Fisher matrix of the
    outputs, as if it did not depend on the inputs.
    """
    assert gram.gradients is not None
    diagonal = gram.gradients.diagonal()
    if not torch.isfinite(diagonal).all():
        raise NonFiniteError(f"the gradient of the output of {gram.name} holds NaN or infinity")
    mean = float(diagonal.mean())
    damped = gram.gradients.clone()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return cholesky(damped, gram.name).T / math.sqrt(2)


def _removal_errors(weight: Tensor, inverse: Tensor, group_size: int, name: str) -> Tensor:
    """[groups], float64: trace(W_G ((C^-1)_GG)^-1 W_G^T) of each group G of consecutive columns."""
    groups = weight.shape[1] // group_size
    members = weight.T.reshape(groups, group_size, -1)  # [groups, columns, out]
    if group_size == 1:
        return members.square().sum((1, 2)) / inverse.diagonal()
    block = torch.arange(weight.shape[1], device=weight.device).view(groups, group_size)
    blocks = inverse[block[:, :, None], block[:, None, :]]
    # With (C^-1)_GG = L L^T the trace is the squared norm of L^-1 W_G^T.
    solved = torch.linalg.solve_triangular(cholesky(blocks, name), members, upper=False)
    return solved.square().sum((1, 2))
