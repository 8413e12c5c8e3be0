"""Methods of pruning as presets: how units are scored, how layers share the loss, in how many rounds."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from adapt_pruner.allocation import AllocationName
from adapt_pruner.config import PruneConfig
from adapt_pruner.scoring.estimators import (
    FLUCTUATION,
    MAGNITUDE_L2,
    RANDOM,
    TAYLOR_FIRST,
    TAYLOR_REFERENCE,
    WANDA,
    Estimator,
    GqaCredit,
    find_estimator,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A named choice of settings. What `PruneConfig` says itself overrides it.

    Attributes:
        name: of `--method`.
        summary, source: what it does, in a line, and where it is described.
        estimator: how units are scored.
        allocation: how much each layer loses.
        one_shot: prunes in one round, whatever `iterations` says.
        gqa_credit: which KV group a query head counts for.
        granularity: unit of attention.
        compensation: what the kept weights do about the removed ones.
        prefix_bos: of the calibration sequences; None: where the tokenizer adds it to text itself.
        protected: share of the layers at the start and at the end that lose nothing, rounded up.
    """

    name: str
    summary: str
    source: str
    estimator: Estimator = TAYLOR_FIRST
    allocation: AllocationName = "adaptive"
    one_shot: bool = False
    gqa_credit: GqaCredit = "owner"
    granularity: str = "kv_group"
    compensation: str = "none"
    prefix_bos: bool | None = None
    protected: tuple[float, float] = (0.0, 0.0)

    def protected_layers(self, num_layers: int) -> str:
        """As `PruneConfig` has them."""
        first, last = (math.ceil(share * num_layers) for share in self.protected)
        ends = [(0, first - 1), (num_layers - last, num_layers - 1)]
        return ",".join(f"{a}-{b}" for a, b in ends if b >= a) or "none"

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "estimator": self.estimator.name}


METHODS: tuple[Method, ...] = (
    Method(
        "adapt-pruner",
        "first-order Taylor; layers lose by how little they change the residual stream, in many rounds",
        "arXiv 2502.03460",
    ),
    Method(
        "llm-pruner",
        "first-order Taylor; the same share of each layer but the first eighth and last sixteenth",
        "arXiv 2305.11627 (its script keeps layers 0-3 and 30-31 of LLaMA-7B)",
        allocation="uniform",
        one_shot=True,
        protected=(1 / 8, 1 / 16),
    ),
    Method(
        "flap",
        "fluctuation of inputs; one threshold for the units of all layers",
        "arXiv 2312.11983",
        estimator=FLUCTUATION,
        allocation="threshold",
        one_shot=True,
        # compensation="bias" as soon as there is one: FLAP adds W[:, removed] times the mean input to a bias.
    ),
    Method(
        "wanda-sp",
        "weights times norm of their inputs; the same share of each layer",
        "arXiv 2306.11695, structured as in arXiv 2312.11983",
        estimator=WANDA,
        allocation="uniform",
        one_shot=True,
    ),
    Method(
        "magnitude",
        "squared weights; the same share of each layer",
        "baseline L2 of arXiv 2305.11627",
        estimator=MAGNITUDE_L2,
        allocation="uniform",
        one_shot=True,
    ),
    Method(
        "random",
        "random units; the same share of each layer",
        "baseline of arXiv 2305.11627",
        estimator=RANDOM,
        allocation="uniform",
        one_shot=True,
    ),
    Method(
        "reference",
        "adapt-pruner as its published implementation has it, which overshoots the target",
        "published implementation of arXiv 2502.03460",
        estimator=TAYLOR_REFERENCE,
        allocation="reference",
        gqa_credit="modulo",
        prefix_bos=False,
    ),
)


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise ValueError(f"method is {name!r}, expected one of {[m.name for m in METHODS]}")


def resolve(
    config: PruneConfig, num_layers: int, method: Method | None = None
) -> tuple[PruneConfig, Estimator]:
    """The settings with everything that the method decides filled in, and the estimator they name.

    Args:
        method: instead of the one that the settings name.
    Raises:
        ValueError: an unknown method or estimator, layers that the model does not have, or settings that
            exclude each other.
    """
    method = method or find_method(config.method)
    preset = method.to_dict() | {"protected_layers": method.protected_layers(num_layers)}
    settings = {
        field.name: preset[field.name]
        for field in dataclasses.fields(config)
        if getattr(config, field.name) is None and field.name in preset
    }
    settings["method"] = method.name
    if method.one_shot and config.iterations != 1:
        logger.info("%s prunes in one shot: iterations %d is ignored", method.name, config.iterations)
        settings["iterations"] = 1
    resolved = dataclasses.replace(config, **settings)
    named = resolved.estimator
    assert named is not None
    estimator = method.estimator if named == method.estimator.name else find_estimator(named)
    if resolved.gradients == "fused" and not estimator.fusible:
        raise ValueError(f"gradients is 'fused': the estimator {estimator.name} cannot be scored so")
    return resolved, estimator


def parse_layers(text: str, num_layers: int) -> frozenset[int]:
    """Numbers and ranges of layers such as "0-3,30,-1", -1 being the last; "none" is empty.

    Raises:
        ValueError: something else, or a layer that the model does not have.
    """
    layers: set[int] = set()
    for part in () if text == "none" else text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        first = int(match[1]) if match else num_layers
        first += num_layers if first < 0 else 0
        last = int(match[2]) if match and match[2] else first
        if not 0 <= first <= last < num_layers:
            raise ValueError(
                f"protected_layers is {text!r}, expected none, or layers of 0-{num_layers - 1} such as 0-3,-1"
            )
        layers.update(range(first, last + 1))
    return frozenset(layers)
