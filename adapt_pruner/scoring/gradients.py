"""Importance of units from a backward pass, with the gradients of prunable weights or without them.

Both ways are contexts to run the passes in; what they yield gives the scores afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapt_pruner import kernels
from adapt_pruner.families import UnitTensor
from adapt_pruner.kernels import UnitSet

Gradients = Literal["auto", "fused", "materialised"]
UnitTensors = tuple[UnitTensor, ...]  # the members of one unit kind in one layer
_CONVERTED_AT_ONCE = 2**20  # elements
Importance = Callable[[], list[Tensor]]  # for each unit kind of each layer, [units]


def uses_fused(
    gradients: Gradients, model: nn.Module, sets: Sequence[UnitTensors], batch: Tensor, micro_batch_size: int
) -> bool:
    """Whether a batch is scored without gradients of weights.

    "auto" says so on a CUDA device with Triton alone. On the CPU it costs time: the matrix products of the
    BLAS library are a little slower tile by tile, and a gradient is only read once more where it exists.

    Raises:
        ValueError: `gradients` is "fused", and this model or batch cannot be.
    """
    if gradients == "materialised":
        return False
    problem = _fused_problem(model, sets, batch.shape[0], micro_batch_size)
    if gradients == "fused" and problem is not None:
        raise ValueError(f"gradients is 'fused': {problem}")
    pays = batch.device.type == "cuda" and kernels.backend_status()["triton"] is None
    return gradients == "fused" or (pays and problem is None)


def _fused_problem(
    model: nn.Module, sets: Sequence[UnitTensors], sequences: int, micro_batch_size: int
) -> str | None:
    """Why the gradients of this model and batch have to be materialised, or None."""
    if sequences > micro_batch_size:
        return (
            "it needs the whole calibration batch in one pass, because importance is the absolute value of "
            f"the summed gradient: expected a micro_batch_size of at least {sequences} (num_sequences), "
            f"got {micro_batch_size}"
        )
    for tensor in (tensor for members in sets for tensor in members):
        owner, _, leaf = tensor.name.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, nn.Linear) or leaf not in ("weight", "bias"):
            kind = type(module).__name__
            return f"it needs weights and biases of nn.Linear: {tensor.name} is the {leaf} of a {kind}"
    return None


@contextlib.contextmanager
def materialised_importance(
    parameters: dict[str, nn.Parameter],
    sets: Sequence[UnitTensors],
    *,
    one_pass: bool,
    backend: str,
    mode: str = "first",
) -> Iterator[Importance]:
    """Keeps the gradients of the prunable tensors alone, summed over backward passes in fp32.

    A lower-precision model whose batch goes through in one pass keeps its own dtype: nothing is summed then.
    """
    names = [t.name for members in sets for t in members]
    gradients: dict[str, Tensor] = {}
    with gradients_to(adder(gradients, one_pass=one_pass), parameters, names):

        def importance() -> list[Tensor]:
            # From the last layer on, as the backward pass went: the NaN that came first is the one reported.
            backward = [_unit_set(members, parameters, gradients) for members in reversed(sets)]
            return kernels.unit_importances(backward, mode=mode, backend=backend)[::-1]

        yield importance


@contextlib.contextmanager
def fisher_importance(
    parameters: dict[str, nn.Parameter],
    sets: Sequence[UnitTensors],
    *,
    sequences: int,
    backend: str,
    mode: str,
) -> Iterator[Importance]:
    """Keeps the mean squared gradient over one backward pass per sequence, and the mean gradient for `mixed`.

    Each pass is that of the mean loss of one sequence. Everything is summed in fp32.
    """
    names = [t.name for members in sets for t in members]
    gradients: dict[str, Tensor] = {}
    fishers: dict[str, Tensor] = {}
    add_square, add = adder(fishers, one_pass=False), adder(gradients, one_pass=False)

    def receive(name: str, gradient: Tensor) -> None:
        add_square(name, gradient.float().square())
        if mode == "mixed":
            add(name, gradient)

    with gradients_to(receive, parameters, names):

        def importance() -> list[Tensor]:
            for total in (*gradients.values(), *fishers.values()):
                total.div_(sequences)
            backward = [_unit_set(members, parameters, gradients, fishers) for members in reversed(sets)]
            return kernels.unit_importances(backward, mode=mode, backend=backend)[::-1]

        yield importance


@contextlib.contextmanager
def fused_importance(
    model: nn.Module, parameters: dict[str, nn.Parameter], sets: Sequence[UnitTensors], *, backend: str
) -> Iterator[Importance]:
    """Scores every prunable linear layer in the one backward pass, from its input and output gradient.

    The gradient of a weight never exists; that of a bias, which is small, does.
    """
    biases = [t for members in sets for t in members if t.name.endswith(".bias")]
    weights: dict[str, list[UnitTensor]] = {}  # a fused tensor is several members
    for tensor in (t for members in sets for t in members if t.name.endswith(".weight")):
        weights.setdefault(tensor.name, []).append(tensor)
    inputs: dict[str, Tensor] = {}
    scores: dict[UnitTensor, Tensor] = {}

    def hook(name: str, members: Sequence[UnitTensor]) -> Any:
        def keep_input(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in inputs:  # its gradient is the sum of both
                raise ValueError(f"gradients is 'fused': {name} is used twice in a pass")
            inputs[name] = args[0].detach()
            if not output.requires_grad:  # nothing in front of the first of these layers has a gradient
                output.requires_grad_()
            output.register_hook(score_weight)

        def score_weight(output_gradient: Tensor) -> None:
            x, weight = inputs.pop(name).to(output_gradient.dtype), parameters[name].detach()  # autocast
            for tensor in members:
                scores[tensor] = kernels.linear_importance(
                    tensor.features(x, 1),
                    tensor.features(output_gradient, 0),
                    tensor.view(weight),
                    tensor.dim,
                    tensor.group_size,
                    name=name,
                    backend=backend,
                )

        return keep_input

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook(name, members))
        for name, members in weights.items()
    ]
    try:
        gradients: dict[str, Tensor] = {}
        with gradients_to(adder(gradients, one_pass=True), parameters, [t.name for t in biases]):

            def importance() -> list[Tensor]:
                if biases:
                    bias_sets = [_unit_set((t,), parameters, gradients) for t in biases]
                    bias_scores = kernels.unit_importances(bias_sets, backend=backend)
                    scores.update(zip(biases, bias_scores, strict=True))
                return [_sum_in_order([scores[t] for t in members]) for members in sets]

            yield importance
    finally:
        for handle in handles:
            handle.remove()


def _unit_set(
    members: UnitTensors,
    parameters: dict[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    fishers: Mapping[str, Tensor] = MappingProxyType({}),
) -> UnitSet:
    return UnitSet(
        [t.view(parameters[t.name].detach()) for t in members],
        [t.view(gradients[t.name]) for t in members if gradients],
        [t.dim for t in members],
        [t.group_size for t in members],
        [t.view(fishers[t.name]) for t in members if fishers],
        names=[t.name for t in members],
    )


def _sum_in_order(scores: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(scores[0], dtype=torch.float64)
    for values in scores:
        total += values
    return total.float()


def adder(sums: dict[str, Tensor], *, one_pass: bool) -> Callable[[str, Tensor], None]:
    """Adds gradients up in fp32, or keeps the only one as it is."""

    def add(name: str, gradient: Tensor) -> None:
        if name in sums:
            _add_to(sums[name], gradient)
        else:
            sums[name] = gradient if one_pass else gradient.float()

    return add


def _add_to(total: Tensor, gradient: Tensor) -> None:
    """`add_`, in which torch on the CPU would first convert all of a gradient of another dtype."""
    at_once = len(total)
    if total.device.type == "cpu" and total.dtype != gradient.dtype:
        at_once = max(1, len(total) * _CONVERTED_AT_ONCE // total.numel())
    for part, more in zip(total.split(at_once), gradient.split(at_once), strict=True):
        part.add_(more)


@contextlib.contextmanager
def gradients_to(
    receive: Callable[[str, Tensor], None], parameters: dict[str, nn.Parameter], names: Collection[str]
) -> Iterator[None]:
    """Hands over the gradient of each named parameter in every backward pass, and keeps none.

    No other parameter gets any. Embeddings, head and norms need none, which saves a fifth of the arithmetic
    on a small model with a large vocabulary. Gradients that are there already stay as they are.
    """
    wanted, required = dict.fromkeys(names), {name: p.requires_grad for name, p in parameters.items()}
    there_already = {name: p.grad for name, p in parameters.items()}

    def collect(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            receive(name, gradient)

        return hook

    for name, parameter in parameters.items():
        parameter.grad = None
        parameter.requires_grad_(name in wanted)
    handles = [parameters[name].register_post_accumulate_grad_hook(collect(name)) for name in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
            parameter.grad = there_already[name]
