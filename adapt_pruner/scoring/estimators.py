"""Estimators: how important each unit is, one fp32 score each, larger means keep.

An estimator is a context to run the passes in; what it yields gives the scores afterwards, for each set of
member tensors in the order of the sets. The ones of the Taylor family are in gradients.py, those that look at
activations in activations.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner import kernels
from adapt_pruner.families import LayerWidths, by_expert
from adapt_pruner.kernels import ActivationStats, UnitSet
from adapt_pruner.scoring.activations import WeightColumns, activation_importance, standardised
from adapt_pruner.scoring.gradients import (
    Importance,
    UnitTensors,
    fisher_importance,
    gradients_to,
    materialised_importance,
)
from adapt_pruner.scoring.gram import Grams
from adapt_pruner.scoring.obs import removal_errors

GqaCredit = Literal["owner", "modulo"]
Loss = Literal["batch", "micro_batch", "sequence"]


@dataclass(frozen=True)
class Subject:
    """What an estimator looks at.

    Attributes:
        model: evaluated, on its device.
        parameters: of the model, by name.
        sets: members of the units to score; a set is a unit kind of a layer, or a part of one.
        columns: for each set, how many columns of its output-side matrix a unit has.
        sequences: in the calibration batch.
        one_pass: whether all of them go through together.
        seed: differs from iteration to iteration.
        grams: second moments of inputs, by the name of the weight, once the passes are through; empty if the
            estimator does not ask for them and nobody else did.
        ridge: what they get on top of their diagonal.
        backend: kernels to use.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    sets: Sequence[UnitTensors]
    columns: Sequence[int]
    sequences: int
    one_pass: bool
    seed: tuple[int, ...]
    grams: Grams
    ridge: float
    backend: str


Observe = Callable[[Subject], contextlib.AbstractContextManager[Importance]]


@dataclass(frozen=True)
class Estimator:
    """How units are scored.

    Attributes:
        name: of `--estimator`.
        observe: from a subject to the context described above.
        loss: None where no backward pass is needed; else what the loss of a backward pass is the mean over:
            all labels of the calibration batch, those of the micro-batch, or those of a sequence, which then
            goes through alone.
        drawn_labels: whether that loss is of labels drawn from what the model predicts, not of the text.
        fusible: whether the gradients of weights need not exist (`--gradients fused`).
        biases: whether biases count.
        grams: whether it needs the second moments of inputs, and with a loss those of gradients of outputs.
        of_columns: whether it scores the columns of output-side matrices (`down_proj`, `o_proj`) alone.
        summary: the quantity, in a line.
        source: where it is described.
    """

    name: str
    observe: Observe
    summary: str
    source: str
    loss: Loss | None = None
    drawn_labels: bool = False
    fusible: bool = False
    biases: bool = True
    grams: bool = False
    of_columns: bool = False


def weights_alone(score: Callable[[Subject], list[Tensor]]) -> Observe:
    """An observer of a data-free estimator, from a function that gives the scores of every set."""

    @contextlib.contextmanager
    def observe(subject: Subject) -> Iterator[Importance]:
        yield lambda: score(subject)

    return observe


def _taylor(mode: str) -> Observe:
    def observe(subject: Subject) -> contextlib.AbstractContextManager[Importance]:
        return materialised_importance(
            subject.parameters, subject.sets, one_pass=subject.one_pass, backend=subject.backend, mode=mode
        )

    return observe


def _fisher(mode: str) -> Observe:
    def observe(subject: Subject) -> contextlib.AbstractContextManager[Importance]:
        return fisher_importance(
            subject.parameters,
            subject.sets,
            sequences=subject.sequences,
            backend=subject.backend,
            mode=mode,
        )

    return observe


def _magnitude(mode: str) -> Observe:
    def score(subject: Subject) -> list[Tensor]:
        sets = [
            UnitSet(
                [t.view(subject.parameters[t.name].detach()) for t in members],
                [],
                [t.dim for t in members],
                [t.group_size for t in members],
                names=[t.name for t in members],
            )
            for members in subject.sets
        ]
        return kernels.unit_importances(sets, mode=mode, backend=subject.backend)

    return weights_alone(score)


def _random(subject: Subject) -> list[Tensor]:
    generator = np.random.default_rng(subject.seed)
    first = [members[0] for members in subject.sets]
    units = [t.view(subject.parameters[t.name]).shape[t.dim] // t.group_size for t in first]
    return [torch.from_numpy(generator.random(count, dtype=np.float32)) for count in units]


def _wanda(subject: Subject) -> contextlib.AbstractContextManager[Importance]:
    return activation_importance(
        subject.model,
        subject.parameters,
        subject.sets,
        lambda weight, stats, columns: weight("magnitude_l1").double() * stats.norm,
        subject.columns,
        subject.backend,
    )


def _fluctuation(subject: Subject) -> contextlib.AbstractContextManager[Importance]:
    def column_score(weight: WeightColumns, stats: ActivationStats, columns: int) -> Tensor:
        # An expert that fewer than two tokens go through has no variance: its columns are all alike.
        fluctuation = weight("magnitude_l2").double() * stats.variance.nan_to_num(nan=0.0)
        return standardised(fluctuation.square() if columns > 1 else fluctuation) / columns

    return activation_importance(
        subject.model, subject.parameters, subject.sets, column_score, subject.columns, subject.backend
    )


def _obs(subject: Subject) -> list[Tensor]:
    errors = removal_errors(subject.parameters, subject.sets, subject.grams, ridge=subject.ridge)
    return [values.float() for values in errors]


@contextlib.contextmanager
def _obs_fisher(subject: Subject) -> Iterator[Importance]:
    """Backward passes through the activations alone: no weight gets a gradient."""
    with gradients_to(lambda name, gradient: None, subject.parameters, ()):
        yield lambda: _obs(subject)


_LLM_PRUNER, _FLAP = "arXiv 2305.11627 section 3.2", "arXiv 2312.11983 section 3"
TAYLOR_FIRST = Estimator(
    "taylor_first",
    _taylor("first"),
    "sum of |w * dL/dw|, the first-order change of the loss of the whole batch",
    "arXiv 2502.03460 section 3.2",
    loss="batch",
    fusible=True,
)
TAYLOR_REFERENCE = Estimator(
    "taylor_reference",
    _taylor("first"),
    "taylor_first as published: biases do not count, gradients are sums over micro-batch means",
    "published implementation of arXiv 2502.03460",
    loss="micro_batch",
    biases=False,
)
TAYLOR_VECTORIZE = Estimator(
    "taylor_vectorize",
    _taylor("vectorize"),
    "sum over rows and columns of |sum of w * dL/dw|",
    _LLM_PRUNER,
    loss="batch",
)
TAYLOR_SECOND = Estimator(
    "taylor_second",
    _fisher("second"),
    "sum of |w * h * w|, h the mean squared gradient of the sequences (Fisher diagonal)",
    _LLM_PRUNER,
    loss="sequence",
)
TAYLOR_MIXED = Estimator(
    "taylor_mixed",
    _fisher("mixed"),
    "sum of |w * dL/dw - w * h * w / 2|, first and second order together",
    _LLM_PRUNER,
    loss="sequence",
)
MAGNITUDE_L1 = Estimator(
    "magnitude_l1", _magnitude("magnitude_l1"), "sum of |w|", "arXiv 1608.08710 section 3.1"
)
MAGNITUDE_L2 = Estimator("magnitude_l2", _magnitude("magnitude_l2"), "sum of w^2", _LLM_PRUNER)
WANDA = Estimator(
    "wanda",
    _wanda,
    "sum over output columns of |w| * norm of their input",
    "arXiv 2306.11695 section 3, structured as in arXiv 2312.11983",
    of_columns=True,
)
FLUCTUATION = Estimator(
    "fluctuation",
    _fluctuation,
    "mean over output columns of sum of w^2 * variance of the input (that squared for heads), standardised",
    _FLAP,
    of_columns=True,
)
OBS = Estimator(
    "obs",
    weights_alone(_obs),
    "squared error that removing the unit leaves in the outputs after the best linear compensation",
    "optimal brain surgeon (Hassibi and Stork 1993) for whole columns",
    grams=True,
)
OBS_FISHER = Estimator(
    "obs_fisher",
    _obs_fisher,
    "rise of the loss by that error, from the Fisher matrix of the outputs",
    "arXiv 2312.17244 section 3, for whole columns",
    loss="batch",
    drawn_labels=True,
    grams=True,
)
RANDOM = Estimator("random", weights_alone(_random), "uniform random numbers", "baseline of arXiv 2305.11627")

ESTIMATORS: tuple[Estimator, ...] = (
    TAYLOR_FIRST,
    TAYLOR_VECTORIZE,
    TAYLOR_SECOND,
    TAYLOR_MIXED,
    TAYLOR_REFERENCE,
    MAGNITUDE_L1,
    MAGNITUDE_L2,
    WANDA,
    FLUCTUATION,
    OBS,
    OBS_FISHER,
    RANDOM,
)


def find_estimator(name: str) -> Estimator:
    """The estimator of a name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    for estimator in ESTIMATORS:
        if estimator.name == name:
            return estimator
    raise ValueError(f"estimator is {name!r}, expected one of {[e.name for e in ESTIMATORS]}")


@dataclass(frozen=True)
class Crediting:
    """How the members of the unit kinds are scored: in which sets, and how their scores come together.

    Under grouped-query attention query head Q belongs to kv_group Q // heads_per_group, its owner. "modulo"
    credits q and o to group Q % kv_groups instead, as LLM-Pruner and the published Adapt-Pruner do, though
    they remove the owner's; it is for comparison with them.

    Attributes:
        sets: members to be scored together; where each expert has its own units, a set for each.
        columns: for each set, how many columns of its output-side matrix a unit of the kind has.
        owners: for each set, the number of the unit kind of a layer that it belongs to.
    """

    sets: tuple[UnitTensors, ...]
    columns: tuple[int, ...]
    owners: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        kinds: Sequence[tuple[LayerWidths, UnitTensors]],
        *,
        credit: GqaCredit,
        biases: bool,
    ) -> Crediting:
        """From the members of every unit kind of every layer, in order."""
        sets: list[UnitTensors] = []
        columns: list[int] = []
        owners: list[int] = []
        for owner, (widths, members) in enumerate(kinds):
            counted = tuple(t for t in members if biases or not t.name.endswith(".bias"))
            parts = list(by_expert(counted).values())
            of_a_unit = max((t.group_size for t in counted if t.dim == 1), default=1)
            if credit == "modulo" and len({t.group_size for t in counted}) > 1:
                # Of grouped members, query heads alone: their scores are folded later.
                head = widths.head_dim
                heads = tuple(replace(t, group_size=head) for t in counted if t.group_size > head)
                parts = [tuple(t for t in counted if t.group_size == head), heads]
            for part in parts:
                sets.append(part)
                columns.append(of_a_unit)
                owners.append(owner)
        return cls(tuple(sets), tuple(columns), tuple(owners))

    def add_up(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """One tensor [units] per unit kind and layer, from those of the sets."""
        parts: dict[int, list[Tensor]] = {}
        for owner, score in zip(self.owners, scores, strict=True):
            parts.setdefault(owner, []).append(score)
        of_experts = {
            owner
            for owner, members in zip(self.owners, self.sets, strict=True)
            if members[0].expert is not None
        }
        totals = []
        for owner, (first, *others) in parts.items():
            if owner in of_experts:
                totals.append(torch.cat([first, *others]))
            else:
                totals.append(sum((part.view(-1, len(first)).sum(0) for part in others), start=first))
        return totals
