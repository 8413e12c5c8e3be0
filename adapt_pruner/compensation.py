"""Compensation without training: a bias, or the weights that stay, make up for the removed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.kernels import NonFiniteError
from adapt_pruner.plan import Indices
from adapt_pruner.scoring.gram import Grams, InputGram, Means, cholesky, column_weights, kept_columns


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
    result = {}
    for name, (weight, kept) in _losing_columns(model, family, layer, widths, keep).items():
        value = least_squares(weight, grams[name], kept, ridge=ridge).to(weight.dtype)
        if not torch.isfinite(value).all():
            raise ValueError(
                f"the compensated {name} is not finite in {weight.dtype}: expected a larger ridge"
            )
        result[name] = value.contiguous()
    return result


def _losing_columns(
    model: nn.Module, family: Family, layer: int, widths: LayerWidths, keep: Mapping[str, Indices]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights of a layer that lose columns, by name, each with the sorted indices of those that stay."""
    prefix = family.layer_prefix.format(layer=layer)
    weights = {f"{prefix}.{n}": p.detach() for n, p in model.get_submodule(prefix).named_parameters()}
    return {
        name: (weights[name], kept.to(weights[name].device))
        for name, kept in kept_columns(family, layer, widths, keep, weights).items()
        if len(kept) < weights[name].shape[1]
    }


def compensated_biases(
    model: nn.Module,
    family: Family,
    layer: int,
    widths: LayerWidths,
    keep: Mapping[str, Indices],
    means: Means,
) -> dict[str, Tensor]:
    """The biases of down_proj and o_proj of one layer as they will be once it has lost its units.

    What a removed column adds to the outputs on average, its mean input times its weights, goes into the bias
    that is there, so that the mean outputs over the calibration batch stay as they are.

    Args:
        widths: the layer's widths now.
        keep: per unit kind, sorted int64 indices among the units there are now.
        means: of a calibration batch of the model as it is now.
    Returns:
        By name, [out] in the dtype of the bias; those of weights that lose no column are not in it.
    Raises:
        NonFiniteError: a mean is not finite. ValueError: a bias that its dtype cannot hold.
    Source: arXiv 2312.11983 section 3.
    """
    result = {}
    for name, (weight, kept) in _losing_columns(model, family, layer, widths, keep).items():
        mean = means[name].mean.clone()
        if not torch.isfinite(mean).all():
            raise NonFiniteError(f"the input of {name}: expected finite activations")
        mean[kept] = 0.0
        bias_name = bias_of(name)
        bias = model.get_parameter(bias_name).detach()
        value = (bias.double() + weight.double() @ mean).to(bias.dtype)
        if not torch.isfinite(value).all():
            raise ValueError(f"the compensated {bias_name} is not finite in {bias.dtype}")
        result[bias_name] = value
    return result


def bias_of(weight: str) -> str:
    """Name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def missing_output_biases(
    family: Family, widths: Sequence[LayerWidths], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Biases of down_proj and o_proj that a model would need for compensation and does not have.

    Args:
        shapes: shape of every tensor of the model, by name.
    Returns:
        By name, the number of values.
    """
    return {
        bias_of(name): shapes[name][0]
        for layer, layer_widths in enumerate(widths)
        for name in column_weights(family, layer, layer_widths, shapes)
        if bias_of(name) not in shapes
    }


def add_output_biases(model: Any, family: Family, widths: Sequence[LayerWidths]) -> None:
    """Gives every down_proj and o_proj that has no bias one of zeros, which the model's config then names."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in missing_output_biases(family, widths, shapes):
        linear = model.get_submodule(name.removesuffix(".bias"))
        weight = linear.weight.detach()
        linear.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
    prefix = family.layer_prefix.format(layer=0) + "."
    first = missing_output_biases(family, widths[:1], shapes)
    if first:
        before = getattr(model.config, "output_biases", None) or []
        added = [name.removeprefix(prefix).removesuffix(".bias") for name in first]
        model.config.output_biases = sorted({*before, *added})


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
