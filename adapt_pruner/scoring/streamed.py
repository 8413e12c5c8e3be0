"""Importance of units and layers with one decoder layer's weights and gradients in memory at a time.

A forward sweep over the layers takes the whole calibration batch through each, keeps what goes in, and has
the layer importance; a backward sweep runs each layer again, from the last one on, with the gradient of the
loss with respect to what came out. The sums are those of `score`, which has the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.scoring.boundaries import Boundaries, open_boundaries
from adapt_pruner.scoring.estimators import RANDOM, TAYLOR_FIRST, Estimator, GqaCredit, Subject
from adapt_pruner.scoring.gradients import Gradients, UnitTensors
from adapt_pruner.scoring.layers import LayerImportance, Metric
from adapt_pruner.scoring.layerwise import Clock, LayerwiseModel, run_layer
from adapt_pruner.scoring.taylor import Scores, observing, plan_crediting, to_host


@dataclass(frozen=True)
class Sweeps:
    """What two sweeps over the layers took.

    Attributes:
        seconds: by what they were spent on: waiting for weights ("read"), "embed", "forward", "head" with the
            loss, "backward".
        boundaries_in_memory, boundaries_on_disk: how many times the residual stream was kept where.
        boundary_bytes: moved to and from the disk.
    """

    seconds: dict[str, float]
    boundaries_in_memory: int
    boundaries_on_disk: int
    boundary_bytes: int


def streamable(estimator: Estimator) -> bool:
    """Whether an estimator looks at one layer at a time: gradients of the loss of the text, inputs, weights.

    Labels that are drawn and second moments are not followed layer by layer, and random numbers go on from
    one layer to the next.
    """
    return not (estimator.grams or estimator.drawn_labels or estimator is RANDOM)


@dataclass(frozen=True)
class _Layer:
    """What scoring one layer needs beside the layer: its sets, and the settings that are the same for all."""

    sets: Sequence[UnitTensors]
    columns: Sequence[int]
    settings: Mapping[str, Any]
    batch: Tensor
    micro_batch_size: int
    gradients: Gradients
    estimator: Estimator

    def observing(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> Any:
        subject = Subject(model, parameters, self.sets, self.columns, grams={}, **self.settings)
        return observing(self.estimator, subject, self.batch, self.micro_batch_size, self.gradients)


def score_streamed(
    model: LayerwiseModel,
    family: Family,
    widths: tuple[LayerWidths, ...],
    batch: Tensor,
    *,
    micro_batch_size: int,
    memory: int,
    directory: Path,
    metric: Metric = "cosine",
    gradients: Gradients = "auto",
    estimator: Estimator = TAYLOR_FIRST,
    gqa_credit: GqaCredit = "owner",
    seed: tuple[int, ...] = (0,),
    earlier: Scores | None = None,
    share: float = 1.0,
    backend: str = "auto",
) -> tuple[Scores, Sweeps]:
    """`score` of a model that is never whole: the same numbers up to rounding.

    Args:
        model: with the parts that are read as they are needed.
        batch: [sequences, length] int64 token ids on the model's device.
        memory: bytes of memory for what goes into each layer; the rest goes to a file.
        directory: where that file is.
        estimator: one that is `streamable`.
        micro_batch_size, metric, gradients, gqa_credit, seed, earlier, share, backend: as in `score`.
    Raises:
        NonFiniteError: a weight, an activation or a gradient holds NaN or infinity.
        CheckpointError: a file ends early, or a weight that is read for the first time is not finite.
        ValueError: the loss is not finite, or the gradients cannot be fused.
        OSError: no room for the file.
    Source: arXiv 2502.03460 section 3.2; algorithm.md sections 2 and 3.
    """
    assert streamable(estimator)
    skeleton, layers = model.skeleton, range(len(model.layers))
    size = 1 if estimator.loss == "sequence" else micro_batch_size
    clock = Clock(model.device)
    kinds = [family.kinds_in(layer_widths) for layer_widths in widths]
    crediting = plan_crediting(family, widths, dict(skeleton.named_parameters()), estimator, gqa_credit)
    shared = {
        "sequences": len(batch), "one_pass": len(batch) <= micro_batch_size, "seed": seed, "ridge": 0.0,
        "backend": backend,
    }  # fmt: skip
    numbers = [_sets_of(layer, family, crediting.sets) for layer in layers]
    parts = [
        _Layer(
            [crediting.sets[i] for i in own],
            [crediting.columns[i] for i in own],
            shared, batch, micro_batch_size, gradients, estimator,
        )
        for own in numbers
    ]  # fmt: skip
    scores: dict[int, Tensor] = {}

    hidden_size, dtype = model.hidden_size, skeleton.dtype
    shape = (*batch.shape, hidden_size)
    with open_boundaries(
        len(layers) + 1, shape, dtype, model.device, memory=memory, directory=directory
    ) as boundaries:
        arguments: dict[range, list[dict[str, Any]]] = {}
        with clock.measure("embed"):
            for rows, hidden, of_layers in model.embed(batch, size):
                boundaries.write(0, rows, hidden)
                arguments[rows] = of_layers
            del hidden
        layer_importance = LayerImportance(model.layers, metric, backend)
        with layer_importance, torch.no_grad():
            for layer in model.sweep(layers, clock):
                with clock.measure("forward"):
                    observed = parts[layer] if estimator.loss is None else None
                    found = _forward(model, layer, boundaries, arguments, observed)
                    scores.update(zip(numbers[layer], found, strict=False))
        layer_scores = layer_importance.result()
        with clock.measure("head"):
            loss = _head(model, boundaries, batch, list(arguments), estimator)
        if estimator.loss is not None:
            for layer in model.sweep(layers[::-1], clock):
                with clock.measure("backward"):
                    found = _backward(model, layer, boundaries, arguments, parts[layer])
                    scores.update(zip(numbers[layer], found, strict=True))
        sweeps = Sweeps(
            {what: round(seconds, 3) for what, seconds in clock.seconds.items()},
            boundaries.in_memory,
            boundaries.on_disk,
            boundaries.bytes_moved,
        )
    remaining = iter(to_host(crediting.add_up([scores[i] for i in range(len(crediting.sets))])))
    result = Scores(
        loss,
        layer_scores,
        tuple({kind.name: next(remaining) for kind in layer_kinds} for layer_kinds in kinds),
    )
    return result if earlier is None else result.averaged_with(earlier, share), sweeps


def _sets_of(layer: int, family: Family, sets: Sequence[UnitTensors]) -> list[int]:
    """Which sets are of a layer."""
    prefix = family.layer_prefix.format(layer=layer) + "."
    return [i for i, members in enumerate(sets) if members[0].name.startswith(prefix)]


def _forward(
    model: LayerwiseModel,
    layer: int,
    boundaries: Boundaries,
    arguments: Mapping[range, list[dict[str, Any]]],
    scored: _Layer | None,
) -> list[Tensor]:
    """Takes the batch through a layer; the scores of its sets, if they are had without a backward pass."""

    def pass_through() -> None:
        for rows, of_layers in arguments.items():
            hidden = boundaries.read(layer, rows)
            boundaries.write(layer + 1, rows, run_layer(model.layers[layer], hidden, of_layers[layer]))

    if scored is None:
        pass_through()
        return []
    with scored.observing(model.skeleton, model.parameters(layer)) as importance:
        pass_through()
        scores: list[Tensor] = importance()
    return scores


def _head(
    model: LayerwiseModel,
    boundaries: Boundaries,
    batch: Tensor,
    micro_batches: Sequence[range],
    estimator: Estimator,
) -> float:
    """The loss of the batch; its gradient takes the place of what came out of the last layer."""
    last = len(model.layers)
    total, num_labels = 0.0, batch.shape[0] * (batch.shape[1] - 1)
    with model.head() as loss_of:
        for rows in micro_batches:
            of_loss = 1.0 if estimator.loss in (None, "batch") else len(rows) / len(batch)
            loss, gradient = loss_of(
                boundaries.read(last, rows),
                batch[rows.start : rows.stop],
                round(num_labels * of_loss),
                estimator.loss is not None,
            )
            total += of_loss * loss.item()
            if gradient is not None:
                boundaries.write(last, rows, gradient)
    if not torch.isfinite(torch.tensor(total)):
        raise ValueError(
            f"the calibration loss is {total}: weights or activations overflow in {model.skeleton.dtype}"
        )
    return total


def _backward(
    model: LayerwiseModel,
    layer: int,
    boundaries: Boundaries,
    arguments: Mapping[range, list[dict[str, Any]]],
    scored: _Layer,
) -> list[Tensor]:
    """Scores of the sets of a layer; the gradient of what goes in takes the place of that."""
    with scored.observing(model.skeleton, model.parameters(layer)) as importance:
        for rows, of_layers in arguments.items():
            hidden = boundaries.read(layer, rows).detach().requires_grad_(layer > 0)
            with torch.enable_grad():
                output = run_layer(model.layers[layer], hidden, of_layers[layer])
            output.backward(boundaries.read(layer + 1, rows))
            del output
            if hidden.grad is not None:
                boundaries.write(layer, rows, hidden.grad)
        scores: list[Tensor] = importance()
    return scores
