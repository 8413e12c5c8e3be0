"""Second moments of the inputs of the matrices that units leave by: every down_proj and o_proj."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.kernels import ActivationStats, NonFiniteError


@dataclass(frozen=True)
class InputGram:
    """What a calibration batch sent through one matrix; updated in place.

    Attributes:
        name: of the weight whose input this is.
        products: [in, in], float64, X^T X over all rows (tokens), not centred.
        stats: mean and variance of each input column.
    """

    name: str
    products: Tensor
    stats: ActivationStats

    @classmethod
    def zeros(cls, name: str, columns: int, device: torch.device) -> InputGram:
        """Of no rows yet."""
        products = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        return cls(name, products, ActivationStats.zeros(columns, device))

    def update(self, x: Tensor, *, backend: str = "auto") -> None:
        """Adds the rows of x, [..., in]: products of one call in fp32, their sum over calls in float64."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.stats.update(rows, backend=backend)
        rows = rows.float()
        self.products.add_(rows.T @ rows)

    def regularised(self, ridge: float) -> Tensor:
        """[in, in], float64: products with ridge times each diagonal value on top, a new tensor.

        That divides all correlations of columns by 1 + ridge, which fewer tokens than columns overstate. One
        level for all columns, such as the mean, would be set by a few large ones. A column of zeros counts as
        one of a millionth of the mean; where all are, the result is the identity.

        Raises:
            NonFiniteError: an input was NaN or infinite, or too large for products in fp32.
        """
        diagonal = self.products.diagonal()
        if not torch.isfinite(diagonal).all():
            columns = int((~torch.isfinite(diagonal)).sum())
            raise NonFiniteError(
                f"the input of {self.name}: {columns} of {len(diagonal)} columns hold NaN or infinity, or "
                "values too large for sums of squares in float32"
            )
        scale = float(diagonal.mean())
        result = self.products.clone()
        result.diagonal().add_(ridge * diagonal.clamp_min(1e-6 * scale) if scale > 0 else 1.0)
        return result


Grams = dict[str, InputGram]  # by the name of the weight


def cholesky(matrix: Tensor, name: str) -> Tensor:
    """Lower Cholesky factor of [n, n] or [batch, n, n].

    Raises:
        ValueError: not positive definite; `name` is the weight whose input it belongs to.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise ValueError(
            f"the second moments of the input of {name} are singular ({matrix.shape[-1]} columns): expected "
            "a larger ridge, or more calibration tokens"
        )
    return factor


def column_weights(
    family: Family, layer: int, widths: LayerWidths, available: Collection[str]
) -> dict[str, int]:
    """Weights of a layer that lose columns when units go, by name: columns now."""
    return {
        tensor.name: kind.count(widths) * tensor.group_size
        for kind in family.kinds_in(widths)
        for tensor in family.unit_tensors(kind, layer, widths, available)
        if tensor.dim == 1
    }


class InputGrams:
    """Context in which forward passes accumulate the `InputGram` of every down_proj and o_proj.

    A batch may go through in any number of passes. Memory: 8 bytes per pair of columns, on the model's
    device: 0.65 GB for SmolLM2-135M, 53 GB for Llama-3.1-8B; and of one pass at a time the input of one
    matrix in fp32 and its products in fp32.
    """

    def __init__(
        self, model: nn.Module, family: Family, widths: Sequence[LayerWidths], backend: str = "auto"
    ) -> None:
        self._model, self._backend = model, backend
        parameters = dict(model.named_parameters())
        self.grams: Grams = {
            name: InputGram.zeros(name, columns, parameters[name].device)
            for layer, layer_widths in enumerate(widths)
            for name, columns in column_weights(family, layer, layer_widths, parameters).items()
        }

    def __enter__(self) -> Grams:
        self._handles = [
            self._model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                self._hook(gram)
            )
            for name, gram in self.grams.items()
        ]
        return self.grams

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, gram: InputGram) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            gram.update(args[0], backend=self._backend)

        return record
