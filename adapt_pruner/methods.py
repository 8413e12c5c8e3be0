"""Methods of pruning as presets: how units are scored, how layers share the loss, in how many rounds."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from adapt_pruner.config import AllocationName, PruneConfig
from adapt_pruner.families import Granularity
from adapt_pruner.scoring.estimators import (
    ESTIMATORS,
    FLUCTUATION,
    MAGNITUDE_L2,
    OBS_FISHER,
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
        estimator: how units are scored; None where whole layers go.
        allocation: how much each layer loses.
        one_shot: prunes in one round, whatever `iterations` says.
        iterations: rounds that would remove everything, of methods that are not.
        num_sequences: calibration sequences of each round.
        gqa_credit: which KV group a query head counts for.
        granularity: unit of attention, or "layer": layer importance alone decides then.
        attention_rate, mlp_rate: multiple of a layer's sparsity that its attention units, its channels lose.
        compensation: what the kept weights do about the removed ones.
        carry_over: how much what earlier rounds measured counts in each later one.
        prefix_bos: of the calibration sequences; None: where the tokenizer adds it to text itself.
        protected: share of the layers at the start and at the end that lose nothing, rounded up.
        removes: "units" of layers, as all of the above says; or "dimensions" of the hidden states
            (`slicegpt.py`), to which none of it but `one_shot` applies.
    """

    name: str
    summary: str
    source: str
    estimator: Estimator | None = TAYLOR_FIRST
    allocation: AllocationName = "adaptive"
    one_shot: bool = False
    iterations: int = 50
    num_sequences: int = 512
    gqa_credit: GqaCredit = "owner"
    granularity: Granularity = "kv_group"
    attention_rate: float = 1.0
    mlp_rate: float = 1.0
    compensation: str = "none"
    carry_over: float = 0.0
    prefix_bos: bool | None = None
    protected: tuple[float, float] = (0.0, 0.0)
    removes: Literal["units", "dimensions"] = "units"

    def protected_layers(self, num_layers: int) -> str:
        """As `PruneConfig` has them."""
        first, last = (math.ceil(share * num_layers) for share in self.protected)
        ends = [(0, first - 1), (num_layers - last, num_layers - 1)]
        return ",".join(f"{a}-{b}" for a, b in ends if b >= a) or "none"

    def to_dict(self) -> dict[str, Any]:
        values = {**dataclasses.asdict(self), "estimator": self.estimator.name if self.estimator else None}
        return values if self.removes == "units" else values | dict.fromkeys((*_OF_UNITS, "protected"))


# Settings that a method decides, and that say how units are chosen.
_OF_UNITS = (
    "estimator",
    "allocation",
    "gqa_credit",
    "granularity",
    "attention_rate",
    "mlp_rate",
    "compensation",
    "carry_over",
)

METHODS: tuple[Method, ...] = (
    Method(
        "adapt-pruner",
        "first-order Taylor; layers lose by how little they change the residual stream, in many rounds",
        "arXiv 2502.03460",
        num_sequences=32,
        attention_rate=1 / 3,
        carry_over=1.0,
    ),
    Method(
        "adapt-pruner+",
        "rise of the loss after least-squares compensation, per parameter over all layers, in many rounds",
        "ours, after arXiv 2502.03460, 2312.17244 and 2302.04089",
        estimator=OBS_FISHER,
        allocation="global",
        num_sequences=32,
        granularity="query_head",
        attention_rate=1 / 3,
        compensation="least_squares",
        carry_over=1.0,
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
        "fluctuation of inputs; one threshold for the units of all layers; biases hold the mean of what went",
        "arXiv 2312.11983",
        estimator=FLUCTUATION,
        allocation="threshold",
        one_shot=True,
        compensation="bias",
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
        "shortgpt",
        "whole layers: those that change the residual stream least go, in one round",
        "arXiv 2403.03853",
        estimator=None,
        granularity="layer",
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
        "slicegpt",
        "hidden states in their principal coordinates, the least of which are deleted everywhere",
        "arXiv 2401.15024",
        one_shot=True,
        removes="dimensions",
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


def _require_target_of_parameters(config: PruneConfig, what: str) -> None:
    """That there is a target for parameters and none for anything else."""
    if others := sorted(set(config.targets()) - {"target"}):
        raise ValueError(f"{what} lands on parameters alone: expected a target and no {', '.join(others)}")


def _refuse_unit_settings(config: PruneConfig) -> None:
    given = {name: getattr(config, name) for name in _OF_UNITS if name != "granularity"}
    given["compensation"] = None if config.compensation == "none" else config.compensation
    useless = {name: value for name, value in given.items() if value is not None} | _changed(config)
    if useless:
        raise ValueError(f"granularity is 'layer', which removes no units: expected no {useless}")


# Settings about units that no method decides.
_ABOUT_UNITS = ("mlp_granularity", "round_to", "gradients")


def _changed(config: PruneConfig) -> dict[str, Any]:
    """Those that are not as they are if not given."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {n: getattr(config, n) for n in _ABOUT_UNITS if getattr(config, n) != defaults[n]}


def resolve(
    config: PruneConfig, num_layers: int, method: Method | None = None
) -> tuple[PruneConfig, Estimator | None]:
    """The settings with everything that the method decides filled in, and the estimator they name.

    Where whole layers go there is no estimator, and nothing of what is about units is filled in.

    Args:
        method: instead of the one that the settings name.
    Raises:
        ValueError: an unknown method or estimator, layers that the model does not have, or settings that
            exclude each other.
    """
    method = method or find_method(config.method)
    config = _of_method(config, method)
    preset = method.to_dict() | {"protected_layers": method.protected_layers(num_layers)}
    whole_layers = (config.granularity or method.granularity) == "layer"
    if whole_layers:
        _refuse_unit_settings(config)
        _require_target_of_parameters(config, "granularity 'layer'")
        preset |= {**dict.fromkeys(_OF_UNITS), "granularity": "layer", "compensation": "none"}
    settings = {
        field.name: preset[field.name]
        for field in dataclasses.fields(config)
        if getattr(config, field.name) is None and field.name in preset
    }
    resolved = dataclasses.replace(config, **settings)
    if whole_layers:
        return resolved, None
    if resolved.gqa_credit == "modulo" and resolved.granularity == "query_head":
        raise ValueError("gqa_credit is 'modulo', which is about KV groups: expected granularity kv_group")
    if resolved.allocation == "search":
        _require_target_of_parameters(config, "allocation 'search'")
    named, own = resolved.estimator, method.estimator
    if named is None:
        raise ValueError(f"{method.name} removes whole layers: expected granularity layer, or an estimator")
    estimator = own if own and named == own.name else find_estimator(named)
    if resolved.gradients == "fused" and not estimator.fusible:
        raise ValueError(f"gradients is 'fused': the estimator {estimator.name} cannot be scored so")
    return resolved, estimator


def resolve_dimensions(config: PruneConfig, method: Method) -> PruneConfig:
    """The settings of a method that removes dimensions.

    Raises:
        ValueError: a setting that says how units are chosen.
    """
    names = (*_OF_UNITS, "protected_layers")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    given |= _changed(config)
    if given:
        raise ValueError(
            f"{method.name} removes dimensions of hidden states, not units of layers: expected no {given}"
        )
    _require_target_of_parameters(config, method.name)
    return _of_method(config, method)


def _of_method(config: PruneConfig, method: Method) -> PruneConfig:
    """The settings with the name of the method, its rounds and how much of the text each reads."""
    if method.one_shot:
        if config.iterations not in (None, 1):
            logger.info("%s prunes in one shot: iterations %d is ignored", method.name, config.iterations)
        config = dataclasses.replace(config, iterations=1)
    sequences = method.num_sequences if config.num_sequences is None else config.num_sequences
    return dataclasses.replace(config, method=method.name, num_sequences=sequences)


def require_experts_supported(config: PruneConfig, estimator: Estimator) -> None:
    """That these settings can prune a mixture of experts.

    Args:
        config: resolved.
    Raises:
        ValueError: one cannot; the message names it and what can.
    """
    whole = config.mlp_granularity == "expert"
    problem = None
    if estimator.grams or (whole and estimator.of_columns):
        what = "columns of output-side matrices, which whole experts have none of"
        if estimator.grams:
            what = "second moments of inputs, which are not collected for experts"
        able = [e.name for e in ESTIMATORS if not (e.grams or (whole and e.of_columns))]
        problem = f"the estimator {estimator.name} needs the {what}: expected one of {able}"
    elif config.compensation != "none":
        problem = (
            f"compensation {config.compensation!r} needs the inputs of every down_proj, which are not "
            "collected for experts: expected 'none'"
        )
    elif config.gradients == "fused":
        problem = "gradients 'fused' needs linear layers, and experts are none: expected 'materialised'"
    elif others := sorted({"target_flops", "target_latency"} & set(config.targets())):
        problem = f"{others[0]} is not known to be linear in its units: expected none"
    elif config.allocation == "search":
        problem = "allocation 'search' measures losses without units of linear layers: expected another one"
    elif whole and config.allocation == "reference":
        problem = "allocation 'reference' counts rows of heads and channels alone: expected another one"
    elif whole and config.gqa_credit == "modulo":
        problem = "gqa_credit 'modulo' is for heads and channels alone: expected 'owner'"
    if problem is not None:
        raise ValueError(f"the model is a mixture of experts: {problem}")


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
