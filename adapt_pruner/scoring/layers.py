"""Layer importance: how much each decoder layer changes the residual stream."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner import kernels
from adapt_pruner.allocation import Floats

Metric = Literal["cosine", "euclidean", "manhattan"]


class LayerImportance:
    """Context in which forward passes accumulate the layer importance of algorithm.md section 3.

    cosine: minus the mean cosine similarity of a layer's input and output; euclidean and manhattan: their
    mean distance. Larger means that the layer changes its input more. Means are over all tokens seen.
    """

    def __init__(self, layers: Iterable[nn.Module], metric: Metric, backend: str = "auto") -> None:
        self._layers, self._metric, self._backend = list(layers), metric, backend
        self._sums: list[list[Tensor]] = [[] for _ in self._layers]
        self._tokens: list[int] = []

    def __enter__(self) -> LayerImportance:
        self._handles = [
            layer.register_forward_hook(self._hook(i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            h_in = (args[0] if args else kwargs["hidden_states"]).detach()
            h_out = (output[0] if isinstance(output, tuple) else output).detach()
            similarity = kernels.residual_similarity(h_in, h_out, self._metric, backend=self._backend)
            self._sums[index].append(similarity)
            if index == 0:
                self._tokens.append(h_in.shape[:-1].numel())

        return record

    def result(self) -> Floats:
        """[layers], float64, not normalised; one host synchronisation.

        Raises:
            NonFiniteError: the residual stream in front of a layer or behind it holds NaN or infinity, or
                values too large for fp32 sums.
        """
        means = torch.stack([torch.stack(values) for values in self._sums]).double().cpu().numpy()
        wrong = np.argwhere(~np.isfinite(means))
        if len(wrong) > 0:
            layer, part = wrong[0]
            raise kernels.NonFiniteError(
                f"layer {layer}: the {self._metric} between its input and output is {means[layer, part]}: "
                "expected finite activations whose sums do not overflow float32"
            )
        weights = np.asarray(self._tokens, dtype=np.float64)
        mean = means @ (weights / weights.sum())
        return -mean if self._metric == "cosine" else mean
