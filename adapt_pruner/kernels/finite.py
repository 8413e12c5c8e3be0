"""NaN and infinity in what is scored: found by their traces in the scores, reported by name and index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinity where importance is computed, so that nothing can be ranked."""


def check_scores(
    scores: Tensor,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    fishers: Sequence[Tensor] = (),
    names: Sequence[str] = (),
) -> None:
    """Raises NonFiniteError if a score of `unit_importance` is NaN or infinite, and says where it comes from.

    Only the scores are read unless one is not finite. Waits for the device.
    """
    named = [(names[i] if names else f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    for what, tensors in (("gradient", grads), ("Fisher diagonal", fishers)):
        named += [(f"{what} of {named[i][0]}", tensor) for i, tensor in enumerate(tensors)]
    _check(scores, named, f"the sum over {', '.join(name for name, _ in named)}")


def check_linear_scores(scores: Tensor, x: Tensor, dy: Tensor, weight: Tensor, name: str) -> None:
    """`check_scores` for `linear_importance`."""
    named = [(name, weight), (f"input of {name}", x), (f"output gradient of {name}", dy)]
    _check(
        scores, named, f"the gradient of {name} overflows {str(x.dtype).removeprefix('torch.')}, or the sum"
    )


def _check(scores: Tensor, named: list[tuple[str, Tensor]], overflowing: str) -> None:
    finite = torch.isfinite(scores)
    if bool(finite.all()):
        return
    for name, tensor in named:
        wrong = torch.isfinite(tensor).logical_not_()
        count = int(wrong.sum())
        if count > 0:
            position = wrong.flatten().to(torch.uint8).argmax()  # of the first one
            index = [int(i) for i in torch.unravel_index(position, tensor.shape)]
            raise NonFiniteError(
                f"{name}{index} is {tensor[tuple(index)].item()}: expected finite values, "
                f"got {count} of {tensor.numel()} NaN or infinite"
            )
    unit = int(finite.logical_not().to(torch.uint8).argmax())
    raise NonFiniteError(
        f"the score of unit {unit} is {scores[unit].item()}: {overflowing} overflows float32"
    )
