"""Importance of units and layers from one pass over the calibration batch, with a backward pass if asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Floats
from adapt_pruner.config import RIDGE
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.scoring.estimators import TAYLOR_FIRST, Crediting, Estimator, GqaCredit, Subject
from adapt_pruner.scoring.gradients import Gradients, Importance, fused_importance, uses_fused
from adapt_pruner.scoring.gram import Grams, InputGrams
from adapt_pruner.scoring.layers import LayerImportance, Metric


@dataclass(frozen=True)
class Scores:
    """What one calibration batch tells.

    Attributes:
        loss: mean causal-LM loss, nats per label token.
        layer_importance: [layers], not normalised.
        unit_importance: per layer and unit kind, [units] float64 copies of the fp32 scores.
        grams: second moments of the inputs of every down_proj and o_proj, where they were asked for.
    """

    loss: float
    layer_importance: Floats
    unit_importance: tuple[dict[str, Floats], ...]
    grams: Grams | None = None


def score(
    model: nn.Module,
    family: Family,
    widths: tuple[LayerWidths, ...],
    batch: Tensor,
    *,
    micro_batch_size: int,
    metric: Metric = "cosine",
    gradients: Gradients = "auto",
    estimator: Estimator = TAYLOR_FIRST,
    gqa_credit: GqaCredit = "owner",
    seed: tuple[int, ...] = (0,),
    grams: bool = False,
    ridge: float = RIDGE,
    backend: str = "auto",
) -> Scores:
    """Importance of every unit and layer from one pass over the calibration batch.

    The result does not depend on the micro-batch size beyond rounding, except for `taylor_reference`:
    gradients are summed over all micro-batches before the absolute value is taken, in fp32. Only prunable
    weights get a gradient, with fused gradients only prunable biases, and none where the estimator needs
    none: then nothing is recorded for a backward pass.

    Args:
        batch: [sequences, length] int64 token ids on the model's device; every position but the first of
            each sequence is a label.
        micro_batch_size: sequences per forward and backward pass; one for estimators that ask for it.
        gradients: whether gradients of weights exist; see `PruneConfig`.
        estimator: how units are scored.
        gqa_credit: which kv_group a query head counts for; see `Crediting`.
        seed: of random estimators.
        grams: collect the second moments of inputs, for compensation.
        ridge: of the estimator obs.
    Raises:
        NonFiniteError: a weight, an activation or a gradient holds NaN or infinity.
        ValueError: the loss is not finite, or the gradients cannot be fused.
    Source: arXiv 2502.03460 section 3.2; algorithm.md sections 2 and 3.
    """
    parameters = dict(model.named_parameters())
    kinds = [family.kinds_in(layer_widths) for layer_widths in widths]
    crediting = Crediting.plan(
        [
            (layer_widths, family.unit_tensors(kind, layer, layer_widths, parameters))
            for layer, layer_widths in enumerate(widths)
            for kind in kinds[layer]
        ],
        credit=gqa_credit,
        biases=estimator.biases,
    )
    collecting = InputGrams(model, family, widths, backend) if grams or estimator.grams else None
    scoring = _scoring(
        estimator,
        Subject(
            model,
            parameters,
            crediting.sets,
            crediting.head_dims,
            sequences=batch.shape[0],
            one_pass=batch.shape[0] <= micro_batch_size,
            seed=seed,
            grams=collecting.grams if collecting else {},
            ridge=ridge,
            backend=backend,
        ),
        batch,
        micro_batch_size,
        gradients,
    )
    layers = model.get_submodule(family.layers_module)
    assert isinstance(layers, nn.ModuleList)
    num_labels = batch.shape[0] * (batch.shape[1] - 1)
    loss = torch.zeros((), dtype=torch.float64)
    # The loss is that of the labels alone: what balances the load of experts is not part of it.
    plain = {"output_router_logits": False} if any(layer.num_experts for layer in widths) else {}
    with (
        _evaluating(model),
        scoring as unit_importance,
        collecting or contextlib.nullcontext({}) as collected,
        LayerImportance(layers, metric, backend) as layer_importance,
        torch.set_grad_enabled(estimator.loss is not None),
    ):
        for sequences in batch.split(1 if estimator.loss == "sequence" else micro_batch_size):
            # Passing the label count makes the micro-batch losses add up to the mean over the whole batch.
            # Only the loss is kept of the output: its logits would outlive their use by a backward pass.
            share = 1.0 if estimator.loss in (None, "batch") else sequences.shape[0] / batch.shape[0]
            part = model(
                input_ids=sequences,
                labels=sequences,
                num_items_in_batch=round(num_labels * share),
                use_cache=False,
                **plain,
            ).loss
            loss += share * part.detach().double().cpu()
            if not torch.isfinite(loss):
                layer_importance.result()  # names the layer, if it is one
                raise ValueError(
                    f"the calibration loss is {loss.item()}: weights or activations overflow in {model.dtype}"
                )
            if estimator.loss is not None:
                part.backward()
        layer_scores = layer_importance.result()
        unit_scores = _to_host(crediting.add_up(unit_importance()))
    remaining = iter(unit_scores)
    return Scores(
        loss.item(),
        layer_scores,
        tuple({kind.name: next(remaining) for kind in layer_kinds} for layer_kinds in kinds),
        collected,
    )


def _scoring(
    estimator: Estimator, subject: Subject, batch: Tensor, micro_batch_size: int, gradients: Gradients
) -> contextlib.AbstractContextManager[Importance]:
    """The context of an estimator."""
    if not estimator.fusible:
        if gradients == "fused":
            raise ValueError(f"gradients is 'fused': the estimator {estimator.name} cannot be scored so")
    elif uses_fused(gradients, subject.model, subject.sets, batch, micro_batch_size):
        return fused_importance(subject.model, subject.parameters, subject.sets, backend=subject.backend)
    return estimator.observe(subject)


def _to_host(scores: Sequence[Tensor]) -> list[Floats]:
    """Float64 copies, by one transfer."""
    ends = np.cumsum([len(values) for values in scores])
    together: Floats = torch.cat(list(scores)).double().cpu().numpy()
    return np.split(together, ends[:-1])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout while scoring."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
