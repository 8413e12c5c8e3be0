"""Methods with settings changed for their rows alone: NAME:key=value:key=value."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from adapt_pruner.config import PruneConfig, split_names
from adapt_pruner.methods import Method, find_method

# Settings of `PruneConfig` that are those of the comparison, or that its rows are told apart by.
_SHARED = (
    "model", "method", "target", "target_of", "target_flops", "target_kv_cache", "target_latency",
    "target_context", "latency_batch", "latency_tokens", "calibration", "calibration_column", "seed",
    "device", "dtype", "backend", "output", "resume",
)  # fmt: skip
_KINDS = {name: kind for name, kind in get_type_hints(PruneConfig).items() if name not in _SHARED}

_AMOUNTS = ("iterations", "num_sequences", "sequence_length")  # how much calibration text is read


@dataclass(frozen=True)
class Variant:
    """A method, and the settings of `PruneConfig` that its rows have otherwise than all others."""

    method: Method
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As it is typed, settings in the order of `PruneConfig`: equal variants have equal names."""
        return ":".join([self.method.name, *(f"{k}={_text(v)}" for k, v in self.changes.items())])

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant of a text such as "adapt-pruner+:carry-over=0.5:protected-layers=0-3/-1".

        Its parts contain no comma, which stands between methods: lists have a slash instead.

        Raises:
            ValueError: an unknown method, a setting that a row may not have for itself, or no such value.
        """
        name, *pairs = (part.strip() for part in text.split(":"))
        method = find_method(name)
        changes: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = (part.strip() for part in pair.partition("="))
            key = key.replace("-", "_")
            if key not in _KINDS:
                _refuse(text, f"a setting is {key!r}", f"one of {list(_KINDS)}")
            if not equals:
                _refuse(text, f"{key} has no value", f"{key}=VALUE")
            if key in changes:
                _refuse(text, f"{key} is given twice", "one value")
            if key == "iterations" and method.one_shot:
                _refuse(text, f"iterations is {value!r}", f"none: {method.name} prunes in one round")
            changes[key] = _value(text, key, value)
        return cls(method, {key: changes[key] for key in _KINDS if key in changes})


def parse_variants(text: str, *, ignored: str) -> tuple[Variant, ...]:
    """The variants between the commas, each once, without those of the ignored name."""
    variants = [Variant.parse(part) for part in split_names(text) if part != ignored]
    return tuple({variant.name: variant for variant in variants}.values())


def method_name(name: str) -> str:
    """Of the method that a variant of this name is one of."""
    return name.partition(":")[0]


def curve_name(name: str) -> str:
    """What is left of a variant's name without how much text it reads: those of one name make up a curve."""
    return re.sub(rf":(?:{'|'.join(_AMOUNTS)})=[^:]*", "", name)


def _value(text: str, key: str, value: str) -> Any:
    """The value of a setting, by the type of its field."""
    kind = _KINDS[key]
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            _refuse(text, f"{key} is {value!r}", f"one of {get_args(kind)}")
        return value
    if kind is bool:
        if value not in ("true", "false"):
            _refuse(text, f"{key} is {value!r}", "true or false")
        return value == "true"
    if kind is str:
        return value.replace("/", ",")
    assert kind in (int, float)
    try:
        return kind(value)
    except ValueError:
        _refuse(text, f"{key} is {value!r}", "a whole number" if kind is int else "a number")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(",", "/")


def _refuse(text: str, seen: str, expected: str) -> NoReturn:
    raise ValueError(f"method {text!r}: {seen}, expected {expected}")
