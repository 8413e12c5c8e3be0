"""Learning rates over all optimizer steps of a recovery, which may be trained in stages."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

ScheduleName = Literal["wsd", "cosine"]


def lr_factor(
    step: int,
    kind: ScheduleName,
    total_steps: int,
    *,
    min_ratio: float,
    warmup: float = 0.05,
    decay: float = 0.10,
) -> float:
    """What the learning rate of an optimizer step is multiplied by.

    With W = round(warmup * total_steps) and D = round(decay * total_steps), but at least 1:

    - Step k of the first W has (k + 1) / W. The first is never zero, the last of them has 1.
    - "wsd": then 1, and the last D steps go down evenly. Step j of them has 1 - (1 - min_ratio) (j + 1) / D.
    - "cosine": the other n = total_steps - W steps go down along half a cosine. Step j of them has
      min_ratio + (1 - min_ratio) (1 + cos(pi (j + 1) / n)) / 2.

    The last step has exactly min_ratio, even if it is the only one; W gives way for that where the steps are
    few. Later steps have min_ratio too.

    Args:
        step: from 0, over all stages.
        kind: "wsd" (warm-up, stable, decay) or "cosine".
        total_steps: of all stages, at least 1.
        min_ratio: the factor at the end, in [0, 1].
        warmup: share of the steps, in [0, 1].
        decay: share of the steps, in [0, 1], with warmup at most 1; only of "wsd".
    Raises:
        ValueError: an argument is out of range.
    Source: WSD: arXiv 2404.06395; cosine: arXiv 1608.03983.
    """
    _check(kind, total_steps, min_ratio, warmup, decay)
    if step < 0:
        raise ValueError(f"step is {step}; expected not negative")
    falling = max(1, round(decay * total_steps))
    rising = min(round(warmup * total_steps), total_steps - (falling if kind == "wsd" else 1))
    if step < rising:
        return (step + 1) / rising
    if kind == "cosine":
        falling = total_steps - rising
    done = min(max(0.0, (step + 1 - total_steps + falling) / falling), 1.0)
    left = 1 - done if kind == "wsd" else (1 + math.cos(math.pi * done)) / 2
    return left + (1 - left) * min_ratio  # exact at both ends


def make_schedule(
    optimizer: Optimizer,
    kind: ScheduleName,
    total_steps: int,
    *,
    min_ratio: float,
    warmup: float = 0.05,
    decay: float = 0.10,
    first_step: int = 0,
) -> LambdaLR:
    """A scheduler that sets the learning rates of an optimizer to those given to it times `lr_factor`.

    Stages in a row have the learning rates of one run over all their steps, whether they share an optimizer
    or each has a new one.

    Args:
        optimizer: its groups' learning rates are those at the peak, unless it had a scheduler before: then it
            still knows them.
        kind, total_steps, min_ratio, warmup, decay: as of `lr_factor`.
        first_step: the steps that earlier stages have made.
    Raises:
        ValueError: an argument is out of range.
    """
    _check(kind, total_steps, min_ratio, warmup, decay)
    if not 0 <= first_step < total_steps:
        raise ValueError(
            f"first_step is {first_step}; expected 0 to {total_steps - 1}, of {total_steps} steps"
        )

    def factor(step: int) -> float:
        return lr_factor(
            first_step + step, kind, total_steps, min_ratio=min_ratio, warmup=warmup, decay=decay
        )

    return LambdaLR(optimizer, factor)


def _check(kind: str, total_steps: int, min_ratio: float, warmup: float, decay: float) -> None:
    if kind not in get_args(ScheduleName):
        raise ValueError(f"unknown schedule {kind!r}; expected one of {', '.join(get_args(ScheduleName))}")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; expected at least 1")
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio is {min_ratio}; expected 0 to 1")
    if not (warmup >= 0 and decay >= 0 and warmup + (decay if kind == "wsd" else 0) <= 1):
        raise ValueError(f"warmup is {warmup} and decay is {decay}; expected shares with a sum of at most 1")
