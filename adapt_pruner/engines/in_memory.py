"""The in-memory engine: the whole model on one device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapt_pruner.budget import Counts, UnitBudget, model_budget
from adapt_pruner.checkpoint import Checkpoint, CheckpointError, copy_side_files, open_checkpoint
from adapt_pruner.compensation import (
    add_output_biases,
    bias_of,
    compensated_biases,
    compensated_weights,
    replace_weights,
)
from adapt_pruner.config import RIDGE
from adapt_pruner.engines.device import resolve_device
from adapt_pruner.families import (
    Granularity,
    MlpGranularity,
    find_family,
    layer_widths,
)
from adapt_pruner.kernels.backends import choose_backend
from adapt_pruner.output import atomic_directory
from adapt_pruner.plan import Indices
from adapt_pruner.scoring import Scores, score
from adapt_pruner.scoring.estimators import TAYLOR_FIRST, Estimator, GqaCredit, weights_alone
from adapt_pruner.scoring.gradients import Gradients
from adapt_pruner.scoring.gram import Grams, Means, column_weights
from adapt_pruner.scoring.layers import Metric
from adapt_pruner.scoring.masking import MaskedLoss
from adapt_pruner.surgery import keep_layers, prune_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_UNITS = Estimator("none", weights_alone(lambda subject: []), "no unit is scored", "-")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    checkpoint: Checkpoint | str | Path, *, device: str = "auto", dtype: str = "auto"
) -> PreTrainedModel:
    """Loads a verified checkpoint as a causal LM in evaluation mode; never runs code from the checkpoint.

    Args:
        dtype: "auto" keeps the dtype of the checkpoint; else "fp32", "bf16" or "fp16".
    Raises:
        CheckpointError: damaged files, tensors that do not fit the config, or weights that are not finite.
        ValueError: unknown device or dtype.
    """
    import adapt_pruner.modeling

    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected auto or one of {sorted(DTYPES)}")
    target = resolve_device(device)
    adapt_pruner.modeling.register()
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        dtype=DTYPES.get(dtype, "auto"),
        output_loading_info=True,
        local_files_only=True,
    )
    model, info = loaded
    problems = {k: sorted(map(str, v)) for k, v in info.items() if k != "error_msgs" and v}
    problems.pop("unexpected_keys", None)
    if problems:
        raise CheckpointError(f"{checkpoint.directory}: tensors do not fit the config: {problems}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise CheckpointError(
                f"{checkpoint.directory}: {count} of {parameter.numel()} values of {name} are NaN or infinite"
            )
        # Off the file mapping: bytes that change under it would change the result, and so would alignment.
        parameter.data = parameter.data.to(target, copy=True)
    placed: PreTrainedModel = model.to(target).eval()
    return placed


class InMemoryEngine:
    """Scores and prunes a model that fits, with its gradients, on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        granularity: Granularity = "kv_group",
        mlp_granularity: MlpGranularity = "channel",
        output_biases: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        family = find_family(checkpoint.config.get("model_type"))
        self.family = family.with_granularity(granularity, mlp_granularity)
        self.widths = layer_widths(checkpoint.config)
        choose_backend(backend, resolve_device(device))  # fails before the weights are read
        self.model = load_model(checkpoint, device=device, dtype=dtype)
        self._backend, self._output_biases = backend, output_biases
        self.measured: dict[str, Any] = {}
        if output_biases:
            add_output_biases(self.model, self.family, self.widths)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_parameters(self) -> int:
        """Parameters now; a tied head counts once."""
        return sum(p.numel() for p in self.model.parameters())

    def budget(self, initial: Counts) -> UnitBudget:
        """Units and their cost in parameters now; `initial` are the units of the original model."""
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        return model_budget(self.family, self.widths, shapes, initial)

    def score(
        self,
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
    ) -> Scores:
        """Unit and layer importance from one pass over `batch`, [sequences, length]; see `scoring.score`."""
        return score(
            self.model,
            self.family,
            self.widths,
            batch.to(self.model.device),
            micro_batch_size=micro_batch_size,
            metric=metric,
            gradients=gradients,
            estimator=estimator,
            gqa_credit=gqa_credit,
            seed=seed,
            grams=grams,
            means=means,
            ridge=ridge,
            earlier=earlier,
            share=share,
            backend=self._backend,
        )

    def score_layers(self, batch: Tensor, *, micro_batch_size: int, metric: Metric = "cosine") -> Scores:
        """Loss and layer importance alone, from forward passes."""
        return score(
            self.model,
            dataclasses.replace(self.family, unit_kinds=()),
            self.widths,
            batch.to(self.model.device),
            micro_batch_size=micro_batch_size,
            metric=metric,
            estimator=_NO_UNITS,
            backend=self._backend,
        )

    def keep_layers(self, kept: Sequence[int]) -> None:
        """Removes all layers but these, numbered as they are now, ascending."""
        keep_layers(self.model, self.family, kept)
        self.widths = tuple(self.widths[layer] for layer in kept)

    def masked_loss(self, batch: Tensor, *, micro_batch_size: int) -> MaskedLoss:
        """Context that measures losses over `batch`, [sequences, length], without some of the units."""
        batch = batch.to(self.model.device)
        return MaskedLoss(self.model, self.family, self.widths, batch, micro_batch_size=micro_batch_size)

    def remove_units(
        self,
        keep: Sequence[Mapping[str, Indices]],
        *,
        grams: Grams | None = None,
        means: Means | None = None,
        ridge: float = RIDGE,
    ) -> None:
        """Keeps the named units of every layer, numbered as they are now; the rest is gone for good.

        Args:
            grams: compensate for the removed units by least squares, with these second moments of the
                inputs of the model as it is now.
            means: compensate by biases, which the model has, with these means of the inputs.
        """
        result = []
        for layer, (widths, layer_keep) in enumerate(zip(self.widths, keep, strict=True)):
            what = (self.model, self.family, layer, widths, layer_keep)
            compensated = compensated_weights(*what, grams, ridge=ridge) if grams is not None else {}
            if means is not None:
                compensated |= compensated_biases(*what, means)
            result.append(prune_layer(*what, backend=self._backend))
            replace_weights(self.model, compensated)
        self.widths = tuple(result)

    def copy(self, keep: Sequence[Mapping[str, Indices]] | None = None) -> PreTrainedModel:
        """A model like this one, of the same tensors where nothing goes.

        Args:
            keep: the units that stay, as in `remove_units`, of as many layers as the copy shall have.
        """
        shared = {id(p): p for p in self.model.parameters()}
        model = copy.deepcopy(self.model, dict(shared))
        if keep is not None:
            owner, _, name = self.family.layers_module.rpartition(".")
            layers: Any = model.get_submodule(self.family.layers_module)
            setattr(model.get_submodule(owner), name, layers[: len(keep)])
            for layer, layer_keep in enumerate(keep):
                prune_layer(model, self.family, layer, self.widths[layer], layer_keep, backend=self._backend)
        return model

    def column_tensors(self) -> dict[str, Tensor]:
        """What compensation changes: every down_proj and o_proj as it is now, or their biases alone."""
        parameters = dict(self.model.named_parameters())
        names = [
            name
            for layer, widths in enumerate(self.widths)
            for name in column_weights(self.family, layer, widths, parameters)
        ]
        if self._output_biases:
            names = [bias_of(name) for name in names]
        return {name: parameters[name].detach() for name in names}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts what `column_tensors` gave into a model that has lost the same units."""
        replace_weights(self.model, tensors)

    def save(self, directory: Path) -> None:
        """Writes the model with its tokenizer files in the native form (formats.md section 1).

        Args:
            directory: absent or empty; it appears complete or not at all.
        """
        from adapt_pruner.modeling.conversion import convert_pruned_model

        with atomic_directory(directory) as partial:
            convert_pruned_model(self.model, self.widths).save_pretrained(partial)
            copy_side_files(self.checkpoint.directory, partial)
