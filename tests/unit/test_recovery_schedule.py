"""Learning rates of recovery: every corner, and stages in a row."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_wsd_schedule
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from adapt_pruner.recovery.schedule import lr_factor, make_schedule

KINDS = ("wsd", "cosine")


def factors(kind: str, total: int, **settings) -> list[float]:
    return [lr_factor(step, kind, total, **{"min_ratio": 0.1, **settings}) for step in range(total)]


def make_optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """The learning rate that each optimizer step is made with."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_corners_of_wsd() -> None:
    values = factors("wsd", 100)
    assert values[:5] == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1]
    assert values[5:90] == [1] * 85
    assert values[90:] == pytest.approx(
        [0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1], abs=1e-15
    )
    assert values[-1] == 0.1


def test_corners_of_cosine() -> None:
    values = factors("cosine", 100)
    assert values[:5] == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1]
    expected = [0.1 + 0.9 * math.cos(math.pi * n / 95 / 2) ** 2 for n in range(1, 96)]
    assert values[5:] == pytest.approx(expected, abs=1e-12)
    assert values[-1] == 0.1


@pytest.mark.parametrize(
    ("kind", "total", "expected"),
    [
        ("wsd", 1, [0.1]),
        ("cosine", 1, [0.1]),
        ("wsd", 2, [1, 0.1]),
        ("cosine", 2, [0.55, 0.1]),
        ("wsd", 10, [1] * 9 + [0.1]),
        ("cosine", 10, [0.1 + 0.45 * (1 + math.cos(math.pi * n / 10)) for n in range(1, 11)]),
    ],
)
def test_few_steps(kind: str, total: int, expected: list[float]) -> None:
    assert factors(kind, total) == pytest.approx(expected, abs=1e-12)


def test_where_parts_meet_that_are_rounded() -> None:
    assert factors("wsd", 3, warmup=0.5, decay=0.5) == pytest.approx([1, 0.55, 0.1])
    assert factors("wsd", 4, warmup=1.0, decay=0.0) == pytest.approx([1 / 3, 2 / 3, 1, 0.1])
    assert factors("cosine", 4, warmup=1.0) == pytest.approx([1 / 3, 2 / 3, 1, 0.1])
    assert factors("wsd", 4, warmup=0.0, decay=1.0, min_ratio=0) == [0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1 / 3, 1.0])
def test_the_ends_are_exact_at_any_length(kind: str, min_ratio: float) -> None:
    for total in (*range(1, 60), 997):
        values = factors(kind, total, min_ratio=min_ratio)
        assert values[-1] == min_ratio
        assert values[0] > 0 or total == 1
        top = max(values)
        assert top == 1 or kind == "cosine" or total == 1
        assert all(min(1 / 50, min_ratio) <= value <= 1 for value in values)
        falling = values[values.index(top) :]
        assert falling == sorted(falling, reverse=True)
        assert lr_factor(total, kind, total, min_ratio=min_ratio) == min_ratio  # asked for by the last step()


def test_agrees_with_those_of_transformers() -> None:
    """Its WSD counts steps from 1, ours from 0; one of its cosines starts as ours does."""
    ours = factors("wsd", 60, min_ratio=0.0, warmup=0.2, decay=0.3)
    theirs = get_wsd_schedule(make_optimizer(), 12, 18, 60, decay_type="linear")
    assert rates(theirs, 61)[1:] == pytest.approx(ours, abs=1e-12)

    ours = factors("cosine", 60, warmup=0.2)
    theirs = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(make_optimizer(), 12, 60, min_lr_rate=0.1)
    assert rates(theirs, 60) == pytest.approx(ours, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("same_optimizer", [True, False])
def test_stages_in_a_row_are_one_run(kind: str, same_optimizer: bool) -> None:
    total, ends = 80, [0, 3, 10, 50, 80]
    whole = rates(make_schedule(make_optimizer(2e-5), kind, total, min_ratio=0.1), total)
    assert whole == [2e-5 * factor for factor in factors(kind, total)]
    optimizer, staged = make_optimizer(2e-5), []
    for start, end in pairwise(ends):
        if not same_optimizer:
            optimizer = make_optimizer(2e-5)
        staged += rates(make_schedule(optimizer, kind, total, min_ratio=0.1, first_step=start), end - start)
    assert staged == whole


def test_a_stage_resumes_from_its_state() -> None:
    optimizer = make_optimizer(2e-5)
    scheduler = make_schedule(optimizer, "wsd", 40, min_ratio=0.1, first_step=20)
    rates(scheduler, 18)
    states = optimizer.state_dict(), scheduler.state_dict()
    expected = rates(scheduler, 2)
    optimizer = make_optimizer(2e-5)
    scheduler = make_schedule(optimizer, "wsd", 40, min_ratio=0.1, first_step=20)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert rates(scheduler, 2) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "linear"}, "unknown schedule 'linear'; expected one of wsd, cosine"),
        ({"total_steps": 0}, "total_steps is 0; expected at least 1"),
        ({"min_ratio": 1.5}, "min_ratio is 1.5; expected 0 to 1"),
        (
            {"warmup": 0.5, "decay": 0.6},
            "warmup is 0.5 and decay is 0.6; expected shares with a sum of at most",
        ),
        ({"warmup": -0.1}, "warmup is -0.1 and decay is 0.1"),
        ({"first_step": 10}, "first_step is 10; expected 0 to 9, of 10 steps"),
        ({"first_step": -1}, "first_step is -1"),
    ],
)
def test_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(make_optimizer(), **{"kind": "wsd", "total_steps": 10, "min_ratio": 0.1, **changes})


def test_a_step_is_not_negative() -> None:
    with pytest.raises(ValueError, match="step is -1; expected not negative"):
        lr_factor(-1, "wsd", 10, min_ratio=0.1)
