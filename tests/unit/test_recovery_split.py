"""How recovery data is split into stages."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from adapt_pruner.recovery.split import split_examples, stage_shares

KINDS = ("linear", "uniform", "cosine")


def test_shares_of_each_kind() -> None:
    assert stage_shares("linear", 4) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-15)
    assert stage_shares("uniform", 4) == (0.25,) * 4
    root = math.sqrt(3) / 2  # cos 30 degrees; cos 60 degrees is a half
    assert stage_shares("cosine", 3) == pytest.approx([1 - root, root - 0.5, 0.5], abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_positive_add_up_and_never_fall(kind: str) -> None:
    assert stage_shares(kind, 1) == (1.0,)
    for stages in range(2, 40):
        shares = stage_shares(kind, stages)
        assert len(shares) == stages
        assert math.fsum(shares) == pytest.approx(1, abs=1e-15)
        assert min(shares) > 0
        assert list(shares) == sorted(shares)


def test_known_splits() -> None:
    assert split_examples(1000, 4, "linear", 10) == (
        range(100),
        range(100, 300),
        range(300, 600),
        range(600, 1000),
    )
    # 7 batches: 7/3 each, equal remainders, and the last has the one that is over.
    assert [len(part) for part in split_examples(7 * 8 + 5, 3, "uniform", 8)] == [16, 16, 24]
    # 7 batches: 7/6, 14/6 and 21/6; the largest remainder is the last's.
    assert [len(part) for part in split_examples(7, 3, "linear", 1)] == [1, 2, 4]
    # 6 batches: 0.80, 2.20 and 3.00; the first has one, and the others share five as 2.11 and 2.89.
    assert [len(part) for part in split_examples(6, 3, "cosine", 1)] == [1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_contiguous_whole_batches_near_their_quota(kind: str) -> None:
    for stages in (1, 2, 3, 5, 10, 20):
        for batches in (*range(stages, stages + 30), 100, 999, 12345):
            batch = 1 + batches % 7
            parts = split_examples(batches * batch + batch - 1, stages, kind, batch)
            assert [i for part in parts for i in part] == list(range(batches * batch))
            counts = [len(part) // batch for part in parts]
            assert all(len(part) % batch == 0 for part in parts)
            assert min(counts) >= 1
            assert counts == sorted(counts)
            shares = stage_shares(kind, stages)
            if shares[0] * batches >= 1:
                assert all(abs(n - share * batches) < 1 for n, share in zip(counts, shares, strict=True))


def test_as_many_batches_as_stages() -> None:
    for kind in KINDS:
        for stages in range(1, 30):
            assert split_examples(4 * stages, stages, kind, 4) == tuple(
                range(4 * k, 4 * k + 4) for k in range(stages)
            )


def test_linear_quotas_are_those_of_fractions() -> None:
    for batches in range(21, 300):  # from where the first of 6 stages has a whole batch
        quotas = [Fraction(k * batches, 21) for k in range(1, 7)]
        counts = [math.floor(quota) for quota in quotas]
        order = sorted(range(6), key=lambda k: (quotas[k] - counts[k], k), reverse=True)
        for k in order[: batches - sum(counts)]:
            counts[k] += 1
        assert [len(part) for part in split_examples(batches, 6, "linear", 1)] == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 3, "square", 1), "unknown split 'square'; expected one of linear, uniform, cosine"),
        ((100, 0, "linear", 1), "stages is 0; expected at least 1"),
        ((100, 3, "linear", 0), "batch is 0; expected at least 1"),
        (
            (100, 4, "linear", 32),
            "100 examples are 3 batches of 32; 4 stages need at least 128 examples, a batch each",
        ),
    ],
)
def test_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_examples(*arguments)
