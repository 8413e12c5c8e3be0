"""The loss of a model without some of its units, measured without removing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.plan import Indices


class MaskedLoss:
    """Context in which calling it with the units to keep gives the loss that pruning would lead to.

    What a unit adds to the residual stream passes through its columns of down_proj or o_proj alone, so with
    zeros for their inputs the model computes what it computes without the unit, up to rounding. Compensation
    is not part of it.

    Args:
        batch: [sequences, length] int64 token ids on the model's device; every position but the first of
            each sequence is a label.
        micro_batch_size: sequences per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        widths: Sequence[LayerWidths],
        batch: Tensor,
        *,
        micro_batch_size: int,
    ) -> None:
        self._model, self._family, self._widths = model, family, widths
        self._batch, self._micro_batch_size = batch, micro_batch_size
        self._parameters = dict(model.named_parameters())
        self._masks: dict[str, Tensor] = {}  # by the name of the weight, over its input columns

    def __enter__(self) -> MaskedLoss:
        everything = [
            {kind.name: np.arange(kind.count(layer)) for kind in self._family.unit_kinds}
            for layer in self._widths
        ]
        self._masks = self._masks_of(everything)
        self._handles = [
            self._model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                self._hook(name)
            )
            for name in self._masks
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, keep: Sequence[Mapping[str, Indices]]) -> float:
        """Mean causal-LM loss, nats per label token.

        Args:
            keep: per layer and unit kind, indices among the units there are now.
        """
        self._masks = self._masks_of(keep)
        num_labels = self._batch.shape[0] * (self._batch.shape[1] - 1)
        loss = torch.zeros((), dtype=torch.float64)
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                for sequences in self._batch.split(self._micro_batch_size):
                    part = self._model(
                        input_ids=sequences, labels=sequences, num_items_in_batch=num_labels, use_cache=False
                    ).loss
                    loss += part.double().cpu()
        finally:
            self._model.train(training)
        return loss.item()

    def _masks_of(self, keep: Sequence[Mapping[str, Indices]]) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for layer, (widths, indices) in enumerate(zip(self._widths, keep, strict=True)):
            for kind in self._family.unit_kinds:
                stays = torch.zeros(kind.count(widths))
                stays[torch.from_numpy(indices[kind.name])] = 1
                for tensor in self._family.unit_tensors(kind, layer, widths, self._parameters):
                    if tensor.dim == 1:
                        weight = self._parameters[tensor.name]
                        mask = stays.repeat_interleave(tensor.group_size).to(weight.device, weight.dtype)
                        masks[tensor.name] = masks[tensor.name] * mask if tensor.name in masks else mask
        return masks

    def _hook(self, name: str) -> Any:
        def mask(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0] * self._masks[name], *args[1:])

        return mask
