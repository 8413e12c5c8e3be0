"""Importance of units and layers of a sharded model: every rank scores its own part of each weight.

A unit's importance is a sum over elements of its weights, so that of the rows which one rank has can be added
to that of the others. Gradients are summed over the ranks before, as `sum_gradients` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adapt_pruner import kernels
from adapt_pruner.families import Family, LayerWidths, UnitTensor
from adapt_pruner.kernels import UnitSet
from adapt_pruner.scoring.estimators import (
    MAGNITUDE_L1,
    MAGNITUDE_L2,
    TAYLOR_FIRST,
    Estimator,
    GqaCredit,
)
from adapt_pruner.scoring.gradients import UnitTensors, adder, gradients_to
from adapt_pruner.scoring.layers import LayerImportance, Metric
from adapt_pruner.scoring.losses import text_loss
from adapt_pruner.scoring.taylor import Scores, plan_crediting, to_host
from adapt_pruner.sharding import named_tensors, own_rows, together, world

# Estimators that are such sums, and what of each element.
SALIENCIES: Mapping[Estimator, str] = {
    TAYLOR_FIRST: "first",
    MAGNITUDE_L1: "magnitude_l1",
    MAGNITUDE_L2: "magnitude_l2",
}


def score_sharded(
    model: nn.Module,
    family: Family,
    widths: tuple[LayerWidths, ...],
    batch: Tensor,
    *,
    micro_batch_size: int,
    metric: Metric = "cosine",
    estimator: Estimator = TAYLOR_FIRST,
    gqa_credit: GqaCredit = "owner",
    earlier: Scores | None = None,
    share: float = 1.0,
    backend: str = "auto",
) -> Scores:
    """`score` of a sharded model, on all ranks: each passes its share of the batch, the result is the same.

    Args:
        model: in evaluation mode; its gradients are sums over the ranks.
        batch: [sequences, length] int64 token ids, the same on every rank.
        micro_batch_size: sequences of each rank per forward and backward pass.
        estimator: one of `SALIENCIES`.
        gqa_credit, earlier, share: as in `score`.
    Raises:
        NonFiniteError: a weight, an activation or a gradient of this rank holds NaN or infinity.
        ValueError: the loss is not finite.
        RuntimeError: one of both on another rank.
    Source: arXiv 2502.03460 section 3.2; algorithm.md sections 2 and 3.
    """
    parameters = cast(dict[str, nn.Parameter], named_tensors(model))
    kinds = [family.kinds_in(layer_widths) for layer_widths in widths]
    crediting = plan_crediting(family, widths, parameters, estimator, gqa_credit)
    shares = batch.tensor_split(world().size)
    own = shares[world().rank]
    micro_batches = own.split(micro_batch_size) if len(own) else ()
    passes = math.ceil(len(shares[0]) / micro_batch_size)  # of the first rank, which has the largest share
    with_gradients = estimator.loss is not None
    gradients: dict[str, Tensor] = {}
    add = adder(gradients, one_pass=passes == 1)
    names = [t.name for members in crediting.sets for t in members] if with_gradients else []
    loss = torch.zeros((), dtype=torch.float64, device=batch.device)
    layers = model.get_submodule(family.layers_module)
    assert isinstance(layers, nn.ModuleList)
    layer_importance = LayerImportance(layers, metric, backend)

    def add_up(objective: Tensor) -> None:
        part = objective.detach().double()
        dist.all_reduce(part)
        loss.add_(part)
        if not torch.isfinite(loss):
            with together():
                _ = layer_importance.result() if len(own) else None  # names the layer, if it is one
            raise ValueError(
                f"the calibration loss is {loss.item()}: weights or activations overflow in {model.dtype}"
            )
        if with_gradients:
            objective.backward()

    # With the labels of the whole batch the losses of all ranks add up to the mean over it.
    loss_of = partial(text_loss, model, labels=batch.shape[0] * (batch.shape[1] - 1))
    with (
        gradients_to(lambda name, value: add(name, _local(value)), parameters, names),
        torch.set_grad_enabled(with_gradients),
    ):
        with layer_importance:
            for sequences in micro_batches:
                add_up(loss_of(sequences))
        for _ in range(passes - len(micro_batches)):  # the others need this rank's part of the weights
            add_up(0.0 * loss_of(batch[:1]))

    tensors = named_tensors(model)  # in parts again
    members = [t for of_set in crediting.sets for t in of_set]
    lengths = [_length(t, tensors) for t in members]
    with together():
        of_layers = np.zeros(len(widths))
        if len(own):
            of_layers = layer_importance.result() * own.numel()
        own_sums = _sums_of_own_rows(members, lengths, tensors, gradients, SALIENCIES[estimator], backend)
    gradients.clear()
    together_sums = torch.cat([torch.tensor([*of_layers, own.numel()]).to(batch.device), *own_sums])
    dist.all_reduce(together_sums)
    layer_sums, tokens, sums = together_sums.split([len(widths), 1, sum(lengths)])
    by_member = iter(sums.split(lengths))
    of_sets = [_of_units(of_set, [next(by_member) for _ in of_set]) for of_set in crediting.sets]
    remaining = iter(to_host(crediting.add_up(of_sets)))
    scores = Scores(
        loss.item(),
        (layer_sums / tokens).cpu().numpy(),
        tuple({kind.name: next(remaining) for kind in layer_kinds} for layer_kinds in kinds),
    )
    return scores if earlier is None else scores.averaged_with(earlier, share)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _length(member: UnitTensor, tensors: Mapping[str, Tensor]) -> int:
    """Rows (or columns) of a member."""
    return member.segment.length if member.segment else tensors[member.name].shape[member.dim]


def _sums_of_own_rows(
    members: Sequence[UnitTensor],
    lengths: Sequence[int],
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    saliency: str,
    backend: str,
) -> list[Tensor]:
    """For each member [rows or columns], float64, its saliency summed over what this rank has of it."""
    sums, parts = [], []
    for member, length in zip(members, lengths, strict=True):
        weight = tensors[member.name]
        values = torch.zeros(length, dtype=torch.float64, device=weight.device)
        sums.append(values)
        own = own_rows(weight.shape[0])
        view = member.view
        if member.dim == 0:
            start = member.segment.start if member.segment else 0
            rows = range(max(own.start, start), min(own.stop, start + length))
            values = values[rows.start - start : rows.stop - start]
            view = partial(torch.narrow, dim=0, start=rows.start - own.start, length=len(rows))
            own = rows
        if own:
            name = member.name
            of_own = [view(gradients[name])] if gradients else []
            part = UnitSet([view(_local(weight).detach())], of_own, [member.dim], [1], names=[name])
            parts.append((values, part))
    if parts:
        # From the last layer on, as the backward pass went: the NaN that came first is the one reported.
        scores = kernels.unit_importances([part for _, part in parts[::-1]], mode=saliency, backend=backend)
        for (values, _), of_part in zip(parts[::-1], scores, strict=True):
            values.copy_(of_part)
    return sums


def _of_units(members: UnitTensors, sums: Sequence[Tensor]) -> Tensor:
    """[units], fp32, of a set, from the sums of the rows or columns of its members."""
    units = [values.view(-1, t.group_size).sum(1) for t, values in zip(members, sums, strict=True)]
    return torch.stack(units).sum(0).float()
