"""Compensation: the weights that stay make up for the removed ones, by least squares and without training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.plan import Indices
from adapt_pruner.scoring.gram import Grams, InputGram, cholesky, column_weights


def least_squares(weight: Tensor, gram: InputGram, kept: Tensor, *, ridge: float) -> Tensor:
    """Weight of the kept columns whose outputs come closest to those of all columns.

    It minimises ||X W^T - X_S W'^T||^2 + ||(W_S - W') R||^2 with R^2 = ridge * diag(X^T X): the ridge holds
    the result near the weights there are, not near zero, so that directions the batch does not show keep
    them. That is W' = W K[:, S] K[S, S]^-1 with K = X^T X + R^2, solved in float64.

    Args:
        weight: [out, in], any float dtype.
        gram: of its inputs X, on the same device.
        kept: [columns], int64, sorted indices of the columns S that stay.
        ridge: what is added to the diagonal, as a fraction of it; at least 0.
    Returns:
        [out, columns], float64.
    Raises:
        NonFiniteError: an input is not finite. ValueError: the second moments of X_S are singular.
    """
    moments = gram.regularised(ridge)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    # The same as W_S + W_R K[R, S] K[S, S]^-1: only what is removed has to be solved for.
    factor = cholesky(moments[kept][:, kept], gram.name)
    wide = weight.double()
    lost = moments[kept][:, removed] @ wide[:, removed].T
    return wide[:, kept] + torch.cholesky_solve(lost, factor).T


def compensated_weights(
    model: nn.Module,
    family: Family,
    layer: int,
    widths: LayerWidths,
    keep: Mapping[str, Indices],
    grams: Grams,
    *,
    ridge: float,
) -> dict[str, Tensor]:
    """The down_proj and o_proj of one layer as they will be once the layer has lost its units.

    Args:
        widths: the layer's widths now.
        keep: per unit kind, sorted int64 indices among the units there are now.
        grams: of a calibration batch of the model as it is now.
    Returns:
        By name, [out, kept columns] in the dtype of the weight; those that lose no column are not in it.
    Raises:
        as `least_squares`; ValueError: a solution that the weight's dtype cannot hold.
    """
    prefix = family.layer_prefix.format(layer=layer)
    weights = {f"{prefix}.{n}": p.detach() for n, p in model.get_submodule(prefix).named_parameters()}
    columns = {name: np.arange(n) for name, n in column_weights(family, layer, widths, weights).items()}
    for kind in family.kinds_in(widths):
        for tensor in family.unit_tensors(kind, layer, widths, weights):
            if tensor.dim == 1:
                units = columns[tensor.name].reshape(-1, tensor.group_size)
                columns[tensor.name] = units[keep[kind.name]].ravel()
        widths = kind.resized(widths, len(keep[kind.name]))
    result = {}
    for name, kept in columns.items():
        weight = weights[name]
        if len(kept) == weight.shape[1]:
            continue
        indices = torch.from_numpy(kept).to(weight.device)
        value = least_squares(weight, grams[name], indices, ridge=ridge).to(weight.dtype)
        if not torch.isfinite(value).all():
            raise ValueError(
                f"the compensated {name} is not finite in {weight.dtype}: expected a larger ridge"
            )
        result[name] = value.contiguous()
    return result


def replace_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters of the same names, shapes and dtypes.

    Raises:
        ValueError: a shape or dtype differs.
    """
    for name, value in weights.items():
        parameter = model.get_parameter(name)
        if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{name}: {value.dtype} {tuple(value.shape)}, expected {parameter.dtype} "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(value)
