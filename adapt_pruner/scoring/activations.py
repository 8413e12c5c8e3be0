"""Importance of units from the activations that their output columns multiply; no backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_pruner import kernels
from adapt_pruner.families import UnitTensor
from adapt_pruner.kernels import ActivationStats
from adapt_pruner.scoring.gradients import Importance, UnitTensors

WeightColumns = Callable[[str], Tensor]  # a mode of unit_importance -> [columns], summed over rows
# Weight, statistics of its input and the number of columns of a unit -> [columns] float64.
ColumnScore = Callable[[WeightColumns, ActivationStats, int], Tensor]


@contextlib.contextmanager
def activation_importance(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    sets: Sequence[UnitTensors],
    column_score: ColumnScore,
    columns: Sequence[int],
    backend: str,
) -> Iterator[Importance]:
    """Scores units by the columns of their output-side matrix (`down_proj`, `o_proj`), summed over each unit.

    A set without such a matrix scores zero. The input of an expert is that of the tokens that go through it.

    Args:
        columns: for each set, how many of them a unit has.
    Raises:
        NonFiniteError: an input holds NaN or infinity.
        ValueError: an output-side matrix is not the weight of an nn.Linear, nor that of experts.
    """
    stats: dict[tuple[str, int | None], ActivationStats] = {}

    def watch(tensor: UnitTensor) -> Any:
        if tensor.expert is not None:
            return watch_expert(tensor, tensor.expert)
        module = model.get_submodule(tensor.name.removesuffix(".weight"))
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{tensor.name} is of a {type(module).__name__}, expected an nn.Linear")
        weight = module.weight
        seen = stats[tensor.name, None] = ActivationStats.zeros(weight.shape[1], weight.device)

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.update(args[0].detach(), backend=backend)

        return module.register_forward_pre_hook(record)

    def watch_expert(tensor: UnitTensor, expert: int) -> Any:
        experts: Any = model.get_submodule(tensor.name.rpartition(".")[0])
        down = experts.down_proj[expert]
        seen = stats[tensor.name, expert] = ActivationStats.zeros(down.shape[1], down.device)

        def record(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, chosen = args[0].detach(), args[1]
            rows = hidden[chosen.eq(expert).any(-1)]
            if len(rows):
                both = functional.linear(rows, module.gate_up_proj[expert].detach())
                seen.update(module._apply_gate(both), backend=backend)

        return experts.register_forward_pre_hook(record)

    def scores_of(tensor: UnitTensor, count: int) -> Tensor:
        weight = tensor.view(parameters[tensor.name].detach())
        seen = stats[tensor.name, tensor.expert]
        if not bool(torch.isfinite(seen.mean).all() & torch.isfinite(seen.m2).all()):
            raise kernels.NonFiniteError(f"input of {tensor.name}: expected finite activations")

        def weight_columns(mode: str) -> Tensor:
            return kernels.unit_importance(
                [weight], [], [1], [1], names=[tensor.name], mode=mode, backend=backend
            )

        return column_score(weight_columns, seen, count)

    def importance() -> list[Tensor]:
        scores = []
        for members, count in zip(sets, columns, strict=True):
            first = members[0].view(parameters[members[0].name])
            units = first.shape[members[0].dim] // members[0].group_size
            total = torch.zeros(units, dtype=torch.float64, device=first.device)
            for tensor in members:
                if (tensor.name, tensor.expert) in stats:
                    total += scores_of(tensor, count).view(units, -1).sum(1)
            scores.append(total.float())
        return scores

    with contextlib.ExitStack() as hooks:
        for tensor in (t for members in sets for t in members if t.dim == 1):
            hooks.callback(watch(tensor).remove)
        yield importance


def standardised(values: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1; all equal gives all zeros."""
    centred = values - values.mean()
    deviation = centred.square().sum().div(max(1, len(values) - 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))
