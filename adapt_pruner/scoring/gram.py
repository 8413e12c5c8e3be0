"""Second moments at the matrices that units leave by, every down_proj and o_proj: of inputs, of gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.kernels import ActivationStats, NonFiniteError
from adapt_pruner.plan import Indices


@dataclass(frozen=True)
class InputGram:
    """What a calibration batch sent through one matrix; updated in place.

    Attributes:
        name: of the weight whose input this is.
        products: [in, in], float64, X^T X over all rows (tokens), not centred.
        gradients: [out, out], float64, the same of the gradient of the mean loss with respect to the output
            rows, where it was asked for.
    """

    name: str
    products: Tensor
    gradients: Tensor | None = None

    @classmethod
    def zeros(cls, name: str, columns: int, device: torch.device, *, outputs: int | None = None) -> InputGram:
        """Of no rows yet; with gradients of that many `outputs`, if given."""
        sizes = [columns] if outputs is None else [columns, outputs]
        return cls(name, *(torch.zeros(n, n, dtype=torch.float64, device=device) for n in sizes))

    def update(self, x: Tensor) -> None:
        """Adds the rows of x, [..., in]: products of one call in fp32, their sum over calls in float64."""
        _add_products(self.products, x)

    def update_gradients(self, gradient: Tensor) -> None:
        """Adds the rows of the gradient of the outputs, [..., out], alike."""
        assert self.gradients is not None
        _add_products(self.gradients, gradient)

    def average_with(self, earlier: InputGram, share: float) -> None:
        """Becomes `share` of itself and the rest of `earlier`, which has the same columns."""
        self.products.mul_(share).add_(earlier.products, alpha=1 - share)
        if self.gradients is not None:
            assert earlier.gradients is not None
            self.gradients.mul_(share).add_(earlier.gradients, alpha=1 - share)

    def kept(self, columns: Tensor) -> InputGram:
        """Of the columns that stay, int64 indices; rounded to fp32, as which it is stored."""

        def rounded(products: Tensor) -> Tensor:
            return products.float().double()

        gradients = None if self.gradients is None else rounded(self.gradients)
        return InputGram(self.name, rounded(self.products[columns][:, columns]), gradients)

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


def _add_products(products: Tensor, x: Tensor) -> None:
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    products.add_(rows.T @ rows)


Grams = dict[str, InputGram]  # by the name of the weight
Means = dict[str, ActivationStats]  # by the name of the weight
Moments = TypeVar("Moments", InputGram, ActivationStats)


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


def kept_columns(
    family: Family,
    layer: int,
    widths: LayerWidths,
    keep: Mapping[str, Indices],
    available: Collection[str],
) -> dict[str, Tensor]:
    """Of each weight of a layer that loses columns when units go, by name: indices of those that stay, int64.

    Args:
        widths: the layer's widths now.
        keep: per unit kind, sorted int64 indices among the units there are now.
    """
    columns = {n: np.arange(count) for n, count in column_weights(family, layer, widths, available).items()}
    for kind in family.kinds_in(widths):
        for tensor in family.unit_tensors(kind, layer, widths, available):
            if tensor.dim == 1:
                units = columns[tensor.name].reshape(-1, tensor.group_size)
                columns[tensor.name] = units[keep[kind.name]].ravel()
        widths = kind.resized(widths, len(keep[kind.name]))
    return {name: torch.from_numpy(kept) for name, kept in columns.items()}


class _Watching(Generic[Moments]):
    """Context in which forward passes go through a hook at every down_proj and o_proj.

    A batch may go through in any number of passes.
    """

    def __init__(self, model: nn.Module, seen: dict[str, Moments]) -> None:
        self._model = model
        self.seen: dict[str, Moments] = seen

    def __enter__(self) -> dict[str, Moments]:
        self._handles = [
            self._model.get_submodule(name.removesuffix(".weight")).register_forward_hook(self._hook(moments))
            for name, moments in self.seen.items()
        ]
        return self.seen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, moments: Moments) -> Any:
        return lambda module, args, output: self._see(moments, args[0].detach(), output)

    def _see(self, moments: Moments, x: Tensor, output: Tensor) -> None:
        raise NotImplementedError


class InputGrams(_Watching[InputGram]):
    """Context in which passes accumulate the `InputGram` of every down_proj and o_proj.

    Memory: 8 bytes per pair of columns, on the model's device: 0.65 GB for SmolLM2-135M, 53 GB for
    Llama-3.1-8B; and of one pass at a time the input of one matrix in fp32 and its products in fp32. With
    gradients also 8 bytes per pair of outputs.

    Args:
        gradients: collect those of the outputs in backward passes.
    """

    def __init__(
        self, model: nn.Module, family: Family, widths: Sequence[LayerWidths], *, gradients: bool = False
    ) -> None:
        super().__init__(
            model,
            {
                name: InputGram.zeros(
                    name, columns, weight.device, outputs=weight.shape[0] if gradients else None
                )
                for name, columns, weight in _column_parameters(model, family, widths)
            },
        )

    def _see(self, moments: InputGram, x: Tensor, output: Tensor) -> None:
        moments.update(x)
        if moments.gradients is not None:
            if not output.requires_grad:  # nothing in front of the first of these matrices has a gradient
                output.requires_grad_()
            output.register_hook(moments.update_gradients)


class InputMeans(_Watching[ActivationStats]):
    """Context in which passes accumulate the means of the inputs of every down_proj and o_proj."""

    def __init__(
        self, model: nn.Module, family: Family, widths: Sequence[LayerWidths], backend: str = "auto"
    ) -> None:
        self._backend = backend
        super().__init__(
            model,
            {
                name: ActivationStats.zeros(columns, weight.device)
                for name, columns, weight in _column_parameters(model, family, widths)
            },
        )

    def _see(self, moments: ActivationStats, x: Tensor, output: Tensor) -> None:
        moments.update(x, backend=self._backend)


def _column_parameters(
    model: nn.Module, family: Family, widths: Sequence[LayerWidths]
) -> Iterator[tuple[str, int, Tensor]]:
    """Name, columns and weight of every down_proj and o_proj."""
    parameters = dict(model.named_parameters())
    for layer, layer_widths in enumerate(widths):
        for name, columns in column_weights(family, layer, layer_widths, parameters).items():
            yield name, columns, parameters[name]
