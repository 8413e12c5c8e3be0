"""The pruning plan: which layers and units stay. The only bridge between scoring and surgery."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapt_pruner.checkpoint import write_text
from adapt_pruner.families import Family, Granularity, LayerWidths, MlpGranularity, UnitTensor

FORMAT_VERSION = 1
Indices = npt.NDArray[np.int64]
Runs = npt.NDArray[np.int64]  # [n, 2], first index and length of each


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """keep_indices of every layer and unit kind, numbered as in the base model; compare plans by `hash`.

    Attributes:
        base_model: the name the base model was given by.
        config_hash, weight_fingerprint: identify the base model's config and weights.
        family: name of the family.
        settings: method and settings that led to this plan, for the record.
        initial_units: per layer, number of units of each kind in the base model.
        keep_indices: per layer, sorted unique int64 indices of the units that stay.
        removed_layers: sorted numbers of the layers that go as a whole; their keep_indices say nothing.
    """

    base_model: str
    config_hash: str
    weight_fingerprint: str
    family: str
    settings: Mapping[str, Any]
    initial_units: tuple[Mapping[str, int], ...]
    keep_indices: tuple[Mapping[str, Indices], ...]
    removed_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.initial_units) != len(self.keep_indices):
            raise ValueError(
                f"plan has {len(self.initial_units)} layers of units but {len(self.keep_indices)} of indices"
            )
        for layer, (initial, keep) in enumerate(zip(self.initial_units, self.keep_indices, strict=True)):
            if set(initial) != set(keep):
                raise ValueError(f"layer {layer}: unit kinds {sorted(keep)}, expected {sorted(initial)}")
            for kind, indices in keep.items():
                where = f"plan, layer {layer}, {kind}"
                if len(indices) == 0:
                    raise ValueError(f"{where}: no unit is kept, at least one must remain")
                if np.any(np.diff(indices) <= 0):
                    raise ValueError(f"{where}: keep_indices are not sorted and unique")
                if indices[0] < 0 or indices[-1] >= initial[kind]:
                    raise ValueError(
                        f"{where}: keep_indices span {indices[0]}..{indices[-1]}, "
                        f"expected within 0..{initial[kind] - 1}"
                    )
        layers = range(len(self.initial_units))
        if not set(self.removed_layers) < set(layers) or list(self.removed_layers) != sorted(
            set(self.removed_layers)
        ):
            raise ValueError(
                f"plan: removed_layers are {list(self.removed_layers)}, expected sorted and unique ones of "
                f"0..{len(layers) - 1}, and not all"
            )

    @cached_property
    def hash(self) -> str:
        """sha256 over everything in the plan."""
        return _hash(self._payload())

    @property
    def granularity(self) -> Granularity:
        """What attention was pruned by; its other unit kind is not in the plan."""
        return "query_head" if "query_head" in self.initial_units[0] else "kv_group"

    @property
    def mlp_granularity(self) -> MlpGranularity:
        """What layers with experts were pruned by."""
        return "expert" if any("expert" in layer for layer in self.initial_units) else "channel"

    @property
    def kept_layers(self) -> list[int]:
        """Numbers of the layers that stay, ascending."""
        return [i for i in range(len(self.initial_units)) if i not in self.removed_layers]

    def removes_nothing(self) -> bool:
        return not self.removed_layers and all(
            len(keep[kind]) == initial[kind]
            for initial, keep in zip(self.initial_units, self.keep_indices, strict=True)
            for kind in keep
        )

    def widths(self, family: Family, base: Sequence[LayerWidths]) -> tuple[LayerWidths, ...]:
        """Widths of the pruned model, of the layers that stay.

        Raises:
            ValueError: the base widths are not those the plan was made for, or the KV heads of a layer would
                be read by different numbers of query heads.
        """
        if len(base) != len(self.keep_indices):
            raise ValueError(f"the plan has {len(self.keep_indices)} layers, the model {len(base)}")
        result = []
        for layer, (widths, initial, keep) in enumerate(
            zip(base, self.initial_units, self.keep_indices, strict=True)
        ):
            pruned = widths
            kinds = sorted(kind.name for kind in family.kinds_in(widths))
            if sorted(initial) != kinds:
                raise ValueError(f"layer {layer}: the plan is for units {sorted(initial)}, expected {kinds}")
            for kind in family.kinds_in(widths):
                if kind.count(widths) != initial[kind.name]:
                    raise ValueError(
                        f"layer {layer}: the model has {kind.count(widths)} units of {kind.name}, "
                        f"the plan was made for {initial[kind.name]}"
                    )
                lanes = kind.lanes(widths)
                kept = np.bincount(keep[kind.name] * lanes // kind.count(widths), minlength=lanes)
                if np.any(kept != kept[0]):
                    raise ValueError(
                        f"layer {layer}: the plan keeps {kept.tolist()} units of {kind.name} per "
                        f"{'expert' if kind.name == 'channel' else 'KV group'}, expected equally many of each"
                    )
                pruned = kind.resized(pruned, len(keep[kind.name]))
            result.append(pruned)
        return tuple(result[layer] for layer in self.kept_layers)

    def _payload(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "config_hash": self.config_hash,
            "weight_fingerprint": self.weight_fingerprint,
            "family": self.family,
            "settings": dict(self.settings),
            "layers": [
                {
                    kind: {"initial": initial[kind], "keep_runs": encode_runs(keep[kind])}
                    for kind in sorted(keep)
                }
                for initial, keep in zip(self.initial_units, self.keep_indices, strict=True)
            ],
            # Only where there are any, so that plans without them keep their hash.
            **({"removed_layers": list(self.removed_layers)} if self.removed_layers else {}),
        }

    def to_json(self) -> str:
        """The plan as JSON, keep_indices run-length coded as [first, length], with its hash.

        Each unit kind of a layer is one line; indented, each number would be.
        """
        payload = self._payload()
        layers = "\n  },\n  {\n".join(
            ",\n".join(f"   {_dumps(kind)}: {_dumps(entry)}" for kind, entry in layer.items())
            for layer in payload.pop("layers")
        )
        head = json.dumps({**payload, "hash": self.hash}, indent=1).removesuffix("\n}")
        return f'{head},\n "layers": [\n  {{\n{layers}\n  }}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Reads a plan.

        Raises:
            ValueError: not a plan, another format version, or contents that do not match the hash.
        """
        try:
            payload = json.loads(text, object_hook=_runs_as_array)
            version, stored = payload["format_version"], payload["hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a pruning plan: {error!r}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"plan format version is {version!r}, expected {FORMAT_VERSION}")
        del payload["hash"]
        if (seen := _hash(payload)) != stored:  # before anything in it is believed
            raise ValueError(f"the plan was changed or damaged: hash is {seen}, expected {stored}")
        try:
            layers = [layer.items() for layer in payload["layers"]]
            return cls(
                payload["base_model"],
                payload["config_hash"],
                payload["weight_fingerprint"],
                payload["family"],
                payload["settings"],
                tuple({kind: entry["initial"] for kind, entry in layer} for layer in layers),
                tuple({kind: decode_runs(entry["keep_runs"]) for kind, entry in layer} for layer in layers),
                tuple(payload.get("removed_layers", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a pruning plan: {error!r}") from error

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Reads a plan file, or that of a run directory; errors as `from_json`, naming the file.

        Raises:
            ValueError: also for a run directory that has none.
        """
        if Path(path).is_dir():
            run, path = Path(path), Path(path) / "plan.json"
            if (run / "config.yaml").exists() and not path.exists():
                raise ValueError(
                    f"{run} has no plan.json: the run is not finished, or its method rotates hidden states "
                    "(slicegpt), which no list of kept units can describe; then its model/ is all there is"
                )
        path = Path(path)
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def pruned_members(
    keep_indices: Sequence[Mapping[str, Indices]],
    family: Family,
    base: Sequence[LayerWidths],
    tensors: Mapping[str, Any],
) -> dict[str, tuple[list[UnitTensor], Indices]]:
    """Of each tensor that may lose rows or columns: what of it belongs to units, and which of these stay.

    Args:
        keep_indices: per layer and unit kind, as in a plan.
        base: widths of the model before.
        tensors: its tensors, or their headers, by name.
    """
    pruned: dict[str, tuple[list[UnitTensor], Indices]] = {}
    for layer, (widths, keep) in enumerate(zip(base, keep_indices, strict=True)):
        for kind in family.kinds_in(widths):
            for member in family.unit_tensors(kind, layer, widths, tensors):
                if kind.name != "expert" or member.expert is None:  # an expert goes with whole tensors
                    pruned.setdefault(member.name, ([], keep[kind.name]))[0].append(member)
    return pruned


def within_expert(member: UnitTensor, shape: Sequence[int], keep: Indices) -> Indices:
    """The kept units that lie in this member, numbered as in it.

    Args:
        shape: of the tensor that the member names.
        keep: sorted.
    """
    if member.expert is None:
        return keep
    rows = member.matrix_shape(shape)[member.dim] if member.segment is None else member.segment.length
    units = rows // member.group_size
    before = member.expert * units
    first, end = np.searchsorted(keep, (before, before + units))
    numbers: Indices = keep[first:end] - before
    return numbers


def _runs_as_array(entry: dict[str, Any]) -> dict[str, Any]:
    """Makes an array of the runs in a layer's entry as soon as they are parsed: lists take ten times as much.

    What is no list of runs stays as it is, for the hash to be that of the file.
    """
    runs = entry.get("keep_runs")
    if isinstance(runs, list) and {*map(type, runs)} <= {list} and {*map(len, runs)} <= {2}:
        numbers = list(chain.from_iterable(runs))
        if {*map(type, numbers)} <= {int} and all(0 <= number < 2**31 for number in numbers):
            entry["keep_runs"] = np.array(numbers, np.int64).reshape(-1, 2)
    return entry


def _hash(payload: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for text in _sorted_json(payload):
        digest.update(text.encode())
    return digest.hexdigest()


def _sorted_json(payload: Mapping[str, Any]) -> Iterator[str]:
    """json.dumps(payload, sort_keys=True) in pieces, each layer being one."""
    for number, (key, value) in enumerate(sorted(payload.items())):
        yield f"{', ' if number else '{'}{_dumps(key)}: "
        if isinstance(value, list):
            yield "["
            for index, element in enumerate(value):
                yield f"{', ' if index else ''}{_dumps(element)}"
            yield "]"
        else:
            yield _dumps(value)
    yield "}"


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=np.ndarray.tolist)


def encode_runs(indices: Indices) -> Runs:
    """Sorted indices as runs."""
    begins = np.flatnonzero(np.diff(indices, prepend=indices[:1] - 2) != 1)
    return np.column_stack([indices[begins], np.diff(begins, append=len(indices))])


def decode_runs(runs: Runs) -> Indices:
    """Inverse of `encode_runs`.

    Raises:
        TypeError: not an array of runs.
    """
    if not isinstance(runs, np.ndarray):
        raise TypeError(f"runs are {reprlib.repr(runs)}, expected pairs [first, length] of integers")
    ends = np.cumsum(runs[:, 1])
    shifts = runs[:, 0] - ends + runs[:, 1]  # of indices from their place among all
    result: Indices = np.repeat(shifts, runs[:, 1])
    result += np.arange(len(result))
    return result
