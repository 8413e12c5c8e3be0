"""How much of the recovery data each stage trains on."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

SplitName = Literal["linear", "uniform", "cosine"]


def stage_shares(kind: SplitName, stages: int) -> tuple[float, ...]:
    """The share of the recovery data that each stage gets; later stages never less than earlier ones.

    Args:
        kind: "linear": stage k of K a share proportional to k; "uniform": all the same; "cosine":
            proportional to cos((k - 1) pi / 2K) - cos(k pi / 2K).
        stages: K, at least 1.
    Returns:
        [stages], positive, with sum 1.
    Raises:
        ValueError: an unknown kind, or no stages.
    Source: arXiv 2502.03460.
    """
    if kind not in get_args(SplitName):
        raise ValueError(f"unknown split {kind!r}; expected one of {', '.join(get_args(SplitName))}")
    if stages < 1:
        raise ValueError(f"stages is {stages}; expected at least 1")
    weights = {
        "linear": lambda k: float(k),
        "uniform": lambda k: 1.0,
        "cosine": lambda k: math.cos((k - 1) * math.pi / (2 * stages)) - math.cos(k * math.pi / (2 * stages)),
    }
    parts = [weights[kind](k) for k in range(1, stages + 1)]
    return tuple(part / math.fsum(parts) for part in parts)


def split_examples(num_examples: int, stages: int, kind: SplitName, batch: int) -> tuple[range, ...]:
    """The examples that each stage trains on: one after the other, none twice, in whole batches.

    Every batch that the examples make is used, and every stage gets at least one. Beyond that, shares are
    those of `stage_shares`, rounded to batches by largest remainder, where later stages win a tie.

    Args:
        num_examples: how many there are.
        stages, kind: as of `stage_shares`.
        batch: examples per optimizer step, over all devices and accumulated micro-batches.
    Returns:
        [stages] ranges of indices; the first starts at 0, and each length is a multiple of `batch`.
    Raises:
        ValueError: an argument is out of range, or there are fewer batches than stages.
    """
    shares = stage_shares(kind, stages)
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    batches = num_examples // batch
    if batches < stages:
        raise ValueError(
            f"{num_examples} examples are {batches} batches of {batch}; {stages} stages need at least "
            f"{stages * batch} examples, a batch each"
        )
    ends = [0]
    for count in _apportion(shares, batches):
        ends.append(ends[-1] + count * batch)
    return tuple(range(start, end) for start, end in pairwise(ends))


def _apportion(shares: tuple[float, ...], total: int) -> list[int]:
    """Whole numbers of at least 1 with this sum, in proportion to shares that never fall."""
    small = 0  # of the first so many, the share of what there is for it and the later ones is less than 1
    while shares[small] / math.fsum(shares[small:]) * (total - small) < 1:
        small += 1
    rest = math.fsum(shares[small:])
    # Rounded, so that equal remainders are equal on every machine.
    quotas = [1.0] * small + [round(share / rest * (total - small), 9) for share in shares[small:]]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(
        range(len(quotas)), key=lambda k: (round(quotas[k] - counts[k], 9), k), reverse=True
    )
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts
