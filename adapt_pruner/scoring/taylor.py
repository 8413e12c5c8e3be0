"""First-order Taylor importance from one forward and one backward pass over the calibration batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapt_pruner import kernels
from adapt_pruner.allocation import Floats
from adapt_pruner.families import Family, LayerWidths, UnitTensor
from adapt_pruner.scoring.layers import LayerImportance, Metric


@dataclass(frozen=True)
class Scores:
    """What one calibration batch tells.

    Attributes:
        loss: mean causal-LM loss, nats per label token.
        layer_importance: [layers], not normalised.
        unit_importance: per layer and unit kind, [units] float64 copies of the fp32 scores.
    """

    loss: float
    layer_importance: Floats
    unit_importance: tuple[dict[str, Floats], ...]


def score(
    model: nn.Module,
    family: Family,
    widths: tuple[LayerWidths, ...],
    batch: Tensor,
    *,
    micro_batch_size: int,
    metric: Metric = "cosine",
    backend: str = "auto",
) -> Scores:
    """Importance of every unit and layer from the gradient of the mean loss over the whole batch.

    The result does not depend on the micro-batch size beyond rounding: gradients are summed over all
    micro-batches before the absolute value is taken, in fp32. Only prunable weights get a gradient.

    Args:
        batch: [sequences, length] int64 token ids on the model's device; every position but the first of
            each sequence is a label.
        micro_batch_size: sequences per forward and backward pass.
    Raises:
        ValueError: the loss or a score is not finite.
    Source: arXiv 2502.03460 section 3.2; algorithm.md sections 2 and 3.
    """
    parameters = dict(model.named_parameters())
    units = [
        {kind.name: family.unit_tensors(kind, i, w, parameters) for kind in family.unit_kinds}
        for i, w in enumerate(widths)
    ]
    prunable = {t.name: parameters[t.name] for layer in units for tensors in layer.values() for t in tensors}
    layers = model.get_submodule(family.layers_module)
    assert isinstance(layers, nn.ModuleList)
    num_labels = batch.shape[0] * (batch.shape[1] - 1)
    loss = torch.zeros((), dtype=torch.float64)
    one_pass = batch.shape[0] <= micro_batch_size
    with (
        _evaluating(model),
        _fp32_gradients(parameters, prunable, one_pass) as gradients,
        LayerImportance(layers, metric, backend) as layer_importance,
    ):
        for sequences in batch.split(micro_batch_size):
            # Passing the label count makes the micro-batch losses add up to the mean over the whole batch.
            # Only the loss is kept of the output: its logits would outlive their use by a backward pass.
            part = model(
                input_ids=sequences, labels=sequences, num_items_in_batch=num_labels, use_cache=False
            ).loss
            part.backward()
            loss += part.detach().double().cpu()
        if not torch.isfinite(loss):
            raise ValueError(
                f"the calibration loss is {loss.item()}: weights or activations overflow in {model.dtype}"
            )
        unit_importance = tuple(
            {kind: _importance(tensors, parameters, gradients, backend) for kind, tensors in layer.items()}
            for layer in units
        )
    return Scores(loss.item(), layer_importance.result(), unit_importance)


def _importance(
    tensors: tuple[UnitTensor, ...],
    parameters: dict[str, nn.Parameter],
    gradients: dict[str, Tensor],
    backend: str,
) -> Floats:
    scores = kernels.unit_importance(
        [parameters[t.name].detach() for t in tensors],
        [gradients.pop(t.name) for t in tensors],
        [t.dim for t in tensors],
        [t.group_size for t in tensors],
        backend=backend,
    )
    result: Floats = scores.double().cpu().numpy()
    return result


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout while scoring."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _fp32_gradients(
    parameters: dict[str, nn.Parameter], prunable: dict[str, nn.Parameter], one_pass: bool
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the prunable weights alone, by name, summed over backward passes in fp32.

    Embeddings, head and norms need none, which saves a fifth of the arithmetic on a small model with a
    large vocabulary. A lower-precision model whose batch goes through in one pass keeps its own dtype:
    nothing is summed then.
    """
    gradients: dict[str, Tensor] = {}
    required = {name: p.requires_grad for name, p in parameters.items()}

    def collect(name: str) -> object:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            if name in gradients:
                gradients[name].add_(grad)
            else:
                gradients[name] = grad if one_pass else grad.float()

        return hook

    for name, parameter in parameters.items():
        parameter.requires_grad_(name in prunable)
    handles = [p.register_post_accumulate_grad_hook(collect(name)) for name, p in prunable.items()]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
