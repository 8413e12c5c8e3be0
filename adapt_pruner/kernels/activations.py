"""Running statistics of activations, column by column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_pruner.kernels import reference
from adapt_pruner.kernels.ops import activation_stats


@dataclass(frozen=True)
class ActivationStats:
    """Mean and centred second moment of each column of the activations seen so far; updated in place.

    NaN and infinity stay: look at `m2` before it ranks anything.

    Attributes:
        mean: [columns], float64.
        m2: [columns], float64, sum of the squared distances from the mean.
        count: 0-dim, int64, rows seen.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, columns: int, device: torch.device | str = "cpu") -> ActivationStats:
        """Of no rows yet."""
        mean, m2 = torch.zeros(2, columns, dtype=torch.float64, device=device).unbind()
        return cls(mean, m2, torch.zeros((), dtype=torch.int64, device=device))

    def update(self, x: Tensor, *, backend: str = "auto") -> None:
        """Adds the rows of x, [..., columns]; see `activation_stats`."""
        activation_stats(x, self.mean, self.m2, self.count, backend=backend)

    def merge(self, other: ActivationStats) -> None:
        """Adds what `other` has seen, of another batch or rank: as if seen here, up to rounding.

        Raises:
            ValueError: the numbers of columns differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"expected {self.mean.shape[0]} columns, got {other.mean.shape[0]}")
        reference.merge_activation_stats(self.mean, self.m2, self.count, other.mean, other.m2, other.count)

    @property
    def variance(self) -> Tensor:
        """[columns], float64, unbiased; NaN for fewer than two rows."""
        return self.m2 / (self.count - 1).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """[columns], float64: Euclidean norm of each column over all rows."""
        return (self.m2 + self.count * self.mean.square()).sqrt()
