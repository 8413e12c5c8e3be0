"""Importance of units and layers from one pass over the calibration batch, with a backward pass if asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Floats
from adapt_pruner.config import RIDGE
from adapt_pruner.families import Family, LayerWidths
from adapt_pruner.plan import Indices
from adapt_pruner.scoring.estimators import TAYLOR_FIRST, Crediting, Estimator, GqaCredit, Subject
from adapt_pruner.scoring.gradients import Gradients, Importance, fused_importance, uses_fused
from adapt_pruner.scoring.gram import Grams, InputGram, InputGrams, InputMeans, Means, kept_columns
from adapt_pruner.scoring.layers import LayerImportance, Metric
from adapt_pruner.scoring.losses import drawn_loss, generator_of, text_loss


@dataclass(frozen=True)
class Scores:
    """What one calibration batch tells.

    Attributes:
        loss: mean causal-LM loss, nats per label token.
        layer_importance: [layers], not normalised.
        unit_importance: per layer and unit kind, [units] float64 copies of the fp32 scores.
        grams, means: second moments at every down_proj and o_proj, and means of their inputs, where they were
            asked for.
    """

    loss: float
    layer_importance: Floats
    unit_importance: tuple[dict[str, Floats], ...]
    grams: Grams | None = None
    means: Means | None = None

    def kept(
        self,
        model: nn.Module,
        family: Family,
        widths: Sequence[LayerWidths],
        keep: Sequence[Mapping[str, Indices]],
    ) -> Scores:
        """Of the units that stay.

        Args:
            model, widths: the scored one, before or after the others went; its widths before.
            keep: per layer and unit kind, sorted int64 indices of the scored units.
        """
        importance = tuple(
            {kind: values[layer_keep[kind]] for kind, values in layer.items()}
            for layer, layer_keep in zip(self.unit_importance, keep, strict=True)
        )
        grams = {}
        if self.grams:
            names = [name for name, _ in model.named_parameters()]
            for layer, (layer_widths, layer_keep) in enumerate(zip(widths, keep, strict=True)):
                columns = kept_columns(family, layer, layer_widths, layer_keep, names)
                grams.update({name: self.grams[name].kept(kept) for name, kept in columns.items()})
        return replace(self, unit_importance=importance, grams=grams or None, means=None)

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it under a name each, for a file; of grams that were `kept` no bit is lost."""
        tensors = {
            "scores.loss": torch.tensor(self.loss, dtype=torch.float64),
            "scores.layers": torch.from_numpy(self.layer_importance),
        }
        for layer, kinds in enumerate(self.unit_importance):
            tensors |= {f"scores.{layer}.{kind}": torch.from_numpy(v) for kind, v in kinds.items()}
        for name, gram in (self.grams or {}).items():
            tensors[f"gram.{name}"] = gram.products.float()
            if gram.gradients is not None:
                tensors[f"gram_gradients.{name}"] = gram.gradients.float()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Scores:
        """Inverse of `tensors`; other names are passed over."""
        layers = tensors["scores.layers"].numpy()
        importance: tuple[dict[str, Floats], ...] = tuple({} for _ in layers)
        grams: Grams = {}
        for key in sorted(tensors):
            prefix, _, name = key.partition(".")
            layer, _, kind = name.partition(".")
            if prefix == "scores" and kind:
                importance[int(layer)][kind] = tensors[key].numpy()
            elif prefix == "gram":
                gradients = tensors.get(f"gram_gradients.{name}")
                grams[name] = InputGram(
                    name,
                    tensors[key].double().to(device),
                    None if gradients is None else gradients.double().to(device),
                )
        return cls(float(tensors["scores.loss"]), layers, importance, grams or None)

    def averaged_with(self, earlier: Scores, share: float) -> Scores:
        """`share` of these and the rest of earlier ones of the same units; loss and grams stay."""

        def average(now: Floats, before: Floats) -> Floats:
            return share * now + (1 - share) * before

        return replace(
            self,
            layer_importance=average(self.layer_importance, earlier.layer_importance),
            unit_importance=tuple(
                {kind: average(values, before[kind]) for kind, values in layer.items()}
                for layer, before in zip(self.unit_importance, earlier.unit_importance, strict=True)
            ),
        )


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
    means: bool = False,
    ridge: float = RIDGE,
    earlier: Scores | None = None,
    share: float = 1.0,
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
        seed: of random estimators and of labels that are drawn.
        grams, means: collect the second moments, or the means, of inputs, for compensation.
        ridge: of the estimators obs and obs_fisher.
        earlier: scores of earlier batches, of the units there are now, to average with: second moments where
            the estimator ranks by them, importance itself elsewhere.
        share: what this batch counts in such an average.
    Raises:
        NonFiniteError: a weight, an activation or a gradient holds NaN or infinity.
        ValueError: the loss is not finite, or the gradients cannot be fused.
    Source: arXiv 2502.03460 section 3.2; algorithm.md sections 2 and 3.
    """
    parameters = dict(model.named_parameters())
    kinds = [family.kinds_in(layer_widths) for layer_widths in widths]
    crediting = plan_crediting(family, widths, parameters, estimator, gqa_credit)
    collecting = None
    if grams or estimator.grams:
        fisher = estimator.grams and estimator.loss is not None
        collecting = InputGrams(model, family, widths, gradients=fisher)
    averaging = InputMeans(model, family, widths, backend) if means else None
    scoring = observing(
        estimator,
        Subject(
            model,
            parameters,
            crediting.sets,
            crediting.columns,
            sequences=batch.shape[0],
            one_pass=batch.shape[0] <= micro_batch_size,
            seed=seed,
            grams=collecting.seen if collecting else {},
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
    generator = generator_of(seed, batch.device)
    # The loss is that of the labels alone: what balances the load of experts is not part of it.
    plain = {"output_router_logits": False} if any(layer.num_experts for layer in widths) else {}
    with (
        _evaluating(model),
        scoring as unit_importance,
        collecting or contextlib.nullcontext() as collected,
        averaging or contextlib.nullcontext() as averages,
        LayerImportance(layers, metric, backend) as layer_importance,
        torch.set_grad_enabled(estimator.loss is not None),
    ):
        for sequences in batch.split(1 if estimator.loss == "sequence" else micro_batch_size):
            # Passing the label count makes the micro-batch losses add up to the mean over the whole batch.
            of_loss = 1.0 if estimator.loss in (None, "batch") else sequences.shape[0] / batch.shape[0]
            labels = round(num_labels * of_loss)
            if estimator.drawn_labels:
                objective, part = drawn_loss(model, sequences, labels, generator, **plain)
            else:
                objective = part = text_loss(model, sequences, labels, **plain)
            loss += of_loss * part.detach().double().cpu()
            if not torch.isfinite(loss):
                layer_importance.result()  # names the layer, if it is one
                raise ValueError(
                    f"the calibration loss is {loss.item()}: weights or activations overflow in {model.dtype}"
                )
            if estimator.loss is not None:
                objective.backward()
        layer_scores = layer_importance.result()
        if earlier is not None:
            for name, gram in (collected or {}).items():
                gram.average_with((earlier.grams or {})[name], share)
        unit_scores = to_host(crediting.add_up(unit_importance()))
    remaining = iter(unit_scores)
    scores = Scores(
        loss.item(),
        layer_scores,
        tuple({kind.name: next(remaining) for kind in layer_kinds} for layer_kinds in kinds),
        collected,
        averages,
    )
    if earlier is None:
        return scores
    averaged = scores.averaged_with(earlier, share)
    return replace(averaged, unit_importance=scores.unit_importance) if estimator.grams else averaged


def plan_crediting(
    family: Family,
    widths: Sequence[LayerWidths],
    parameters: Mapping[str, Tensor],
    estimator: Estimator,
    credit: GqaCredit,
) -> Crediting:
    """How the scores of all tensors add up to those of the units of each kind, layer by layer."""
    return Crediting.plan(
        [
            (layer_widths, family.unit_tensors(kind, layer, layer_widths, parameters))
            for layer, layer_widths in enumerate(widths)
            for kind in family.kinds_in(layer_widths)
        ],
        credit=credit,
        biases=estimator.biases,
    )


def observing(
    estimator: Estimator, subject: Subject, batch: Tensor, micro_batch_size: int, gradients: Gradients
) -> contextlib.AbstractContextManager[Importance]:
    """The context of an estimator, to run the passes of a batch in.

    Raises:
        ValueError: `gradients` is "fused", and this estimator, model or batch cannot be.
    """
    if not estimator.fusible:
        if gradients == "fused":
            raise ValueError(f"gradients is 'fused': the estimator {estimator.name} cannot be scored so")
    elif uses_fused(gradients, subject.model, subject.sets, batch, micro_batch_size):
        return fused_importance(subject.model, subject.parameters, subject.sets, backend=subject.backend)
    return estimator.observe(subject)


def to_host(scores: Sequence[Tensor]) -> list[Floats]:
    """Float64 copies, by one transfer."""
    if not scores:
        return []
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
