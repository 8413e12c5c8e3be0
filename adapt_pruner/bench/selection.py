"""What a benchmark measures: the settings turned into shapes, ops and providers before anything runs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from adapt_pruner.bench.cases import DTYPES, KEPT, OPS, PROVIDERS, TOKENS, Op
from adapt_pruner.bench.layers import DEFAULT_SHAPES, MODELS, Shape
from adapt_pruner.config import BenchConfig
from adapt_pruner.kernels.backends import BackendUnavailable, backend_status
from adapt_pruner.kernels.roofline import require_roofline

BACKENDS = ("cpu", "cuda", "triton")
MARGIN = 1.1  # for what the estimate of memory does not know


@dataclass(frozen=True)
class Selection:
    """Settings of a benchmark, checked. `backends` has, for each device, those that run there."""

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    providers: tuple[str, ...]
    backends: dict[torch.device, tuple[str, ...]]

    @classmethod
    def of(cls, config: BenchConfig) -> Selection:
        """
        Raises:
            ValueError: a name that there is not, or a shape that is none.
            BackendUnavailable: a backend that was named cannot be used here, or none can.
        """
        selection = cls(
            _ops(config.ops),
            _shapes(config),
            _names("dtypes", config.dtypes, DTYPES),
            _names("providers", config.providers, PROVIDERS, _providers_called),
            _backends(config.backends),
        )
        if config.clock == "cpu" and any(device.type != "cpu" for device in selection.backends):
            raise ValueError("clock is 'cpu', expected 'wall' for backends on a GPU")
        for device in selection.backends:
            require_roofline(device)
        return selection


def _providers_called(name: str) -> Iterable[str]:
    """`eager` stands for both ways of it."""
    return [provider for provider in PROVIDERS if provider == name or provider.startswith(f"{name}_")]


def _names(
    setting: str, text: str, known: Iterable[str], stands_for: Callable[[str], Iterable[str]] | None = None
) -> tuple[str, ...]:
    """The names in a list separated by commas, each once."""
    found: dict[str, None] = {}
    for name in text.split(","):
        matches = stands_for(name.strip()) if stands_for else [k for k in known if k == name.strip()]
        if not matches:
            raise ValueError(f"{setting}: unknown name {name.strip()!r}, expected some of {', '.join(known)}")
        found.update(dict.fromkeys(matches))
    return tuple(found)


def _ops(text: str) -> tuple[Op, ...]:
    by_name = {op.name: op for op in OPS}
    families = dict.fromkeys(op.family for op in OPS)

    def stands_for(name: str) -> list[str]:
        return [op.name for op in OPS if name in ("all", op.name, op.family)]

    return tuple(by_name[name] for name in _names("ops", text, {**families, **by_name}, stands_for))


def _shapes(config: BenchConfig) -> tuple[Shape, ...]:
    if config.shapes is not None:
        return tuple(dict.fromkeys(parse_shape(text) for text in config.shapes.split(",")))
    if config.models is None:
        return DEFAULT_SHAPES

    def stands_for(name: str) -> list[str]:
        return [model for model in MODELS if name == "all" or name.lower() == model.lower()]

    names = _names("models", config.models, MODELS, stands_for)
    return tuple(dict.fromkeys(shape for name in names for shape in MODELS[name].shapes()))


def parse_shape(text: str) -> Shape:
    """ROWSxCOLUMNS, such as 4096x14336."""
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if match is None or math.prod(shape := (int(match[1]), int(match[2]))) < 2:
        raise ValueError(
            f"shapes: got {text.strip()!r}, expected ROWSxCOLUMNS such as 4096x14336, of two elements or more"
        )
    return shape


def _backends(text: str) -> dict[torch.device, tuple[str, ...]]:
    problems = backend_status()
    if os.environ.get("TRITON_INTERPRET") == "1":
        problems["triton"] = "TRITON_INTERPRET is set, which runs kernels as Python"
    if text == "auto":
        names = tuple(name for name in BACKENDS if problems[name] is None)
        if not names:
            reasons = "; ".join(f"{name}: {problems[name]}" for name in BACKENDS)
            raise BackendUnavailable(f"no backend can be used: {reasons}")
    else:
        names = _names("backends", text, BACKENDS)
        for name in names:
            if problems[name] is not None:
                raise BackendUnavailable(f"backend {name!r} cannot be used: {problems[name]}")
    on_gpu = tuple(name for name in names if name != "cpu")
    found: dict[torch.device, tuple[str, ...]] = {}
    if "cpu" in names:
        found[torch.device("cpu")] = ("cpu",)
    if on_gpu:
        found[torch.device("cuda", torch.cuda.current_device())] = on_gpu
    return found


def needed_bytes(shape: Shape, dtype: str, ops: Sequence[Op], providers: Iterable[str]) -> int:
    """Estimate of what measuring ops in turns takes at its peak, their rooflines included."""
    size, fp32 = DTYPES[dtype].itemsize, torch.float32.itemsize
    families = {op.family for op in ops}
    preallocated, allocating = "eager_preallocated" in providers, {"eager", "compile"} & set(providers)
    per_element = (2 + KEPT) * size  # the inputs, and the target of copies and gathers
    if preallocated or "linear_importance" in families:
        per_element += size
    if preallocated and "activation_stats" in families and size != fp32:
        per_element += fp32
    if allocating:
        of_plain = [op.temporaries * (fp32 if op.family == "activation_stats" else size) for op in ops]
        per_element += max(of_plain)
    tokens = TOKENS * sum(shape) * size if "linear_importance" in families else 0
    return int(MARGIN * (math.prod(shape) * per_element + tokens))
