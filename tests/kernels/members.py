"""Random members of unit kinds, as tests of every backend need them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.kernels import (
    METRICS,
    MODES,
    ActivationStats,
    reference,
    residual_similarity,
    unit_importance,
)

# name -> dtype of weights, dtype of gradients and Fisher diagonals
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16_fp32": (torch.float16, torch.float32),
    "bf16_fp32": (torch.bfloat16, torch.float32),
}


@dataclass
class Members:
    """Tensors that touch the same units: rows, columns and biases with their own group sizes."""

    weights: list[Tensor]
    dims: list[int]
    group_sizes: list[int]
    grads: list[Tensor] = field(default_factory=list)
    fishers: list[Tensor] = field(default_factory=list)

    @property
    def units(self) -> int:
        return self.weights[0].shape[self.dims[0]] // self.group_sizes[0]

    def arguments(self, mode: str) -> dict[str, Any]:
        """Keyword arguments of unit_importance, with the companions that the mode reads."""
        return {
            "weights": self.weights,
            "grads": self.grads if mode in ("first", "vectorize", "mixed") else [],
            "fishers": self.fishers if mode in ("second", "mixed") else [],
            "dims": self.dims,
            "group_sizes": self.group_sizes,
            "mode": mode,
        }

    def oracle(self, mode: str) -> Tensor:
        arguments = self.arguments(mode)
        for name in ("weights", "grads", "fishers"):
            arguments[name] = [t.double() for t in arguments[name]]
        return reference.unit_importance(**arguments)


def make_members(
    units: int, width: int, dtypes: str = "fp32", group_size: int = 1, row_padding: int = 0, seed: int = 0
) -> Members:
    """Rows [units * group_size, width], columns [width, units * 2 * group_size] and a bias of the rows."""
    generator = torch.Generator().manual_seed(seed)
    dtype, companion_dtype = DTYPES[dtypes]
    shapes = [(units * group_size, width), (width, units * 2 * group_size), (units * group_size,)]

    def random(shape: tuple[int, ...], into: torch.dtype) -> Tensor:
        full = torch.randn(*shape[:-1], shape[-1] + row_padding, generator=generator).to(into)
        return full[..., : shape[-1]]

    return Members(
        weights=[random(shape, dtype) for shape in shapes],
        dims=[0, 1, 0],
        group_sizes=[group_size, 2 * group_size, group_size],
        grads=[random(shape, companion_dtype) for shape in shapes],
        fishers=[random(shape, companion_dtype).abs() for shape in shapes],
    )


def assert_importance_within_budget(result: Tensor, members: Members, mode: str) -> None:
    """At most twice the error of plain fp32 PyTorch, and 1e-6 of what was added up."""
    oracle = members.oracle(mode)
    plain = reference.unit_importance(**members.arguments(mode))
    # signed sums cancel: their error is a fraction of the sum of the absolute values
    scale = members.oracle("first" if mode == "vectorize" else mode)
    assert result.dtype == torch.float32
    assert result.shape == oracle.shape
    error = ((result.double() - oracle).abs() / scale).max().item()
    plain_error = ((plain.double() - oracle).abs() / scale).max().item()
    assert error <= min(2 * plain_error + 2**-23, 1e-6), (error, plain_error)


def digest_of_native_results() -> str:
    """A hash over the bits that every kernel returns, to compare between processes."""
    digest = hashlib.sha256()
    for dtypes in DTYPES:
        members = make_members(33, 2085, dtypes, group_size=2)
        for mode in MODES:
            scores = unit_importance(**members.arguments(mode), backend="cpu")
            digest.update(scores.numpy().tobytes())
        weight = members.weights[0]
        for metric in METRICS:
            similarity = residual_similarity(weight, -weight.roll(1), metric, backend="cpu")
            digest.update(similarity.numpy().tobytes())
        stats = ActivationStats.zeros(weight.shape[1])
        for rows in (weight, weight[:5]):
            stats.update(rows, backend="cpu")
        digest.update(stats.mean.numpy().tobytes() + stats.m2.numpy().tobytes())
    return digest.hexdigest()
