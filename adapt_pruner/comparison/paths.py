"""How a page shows the paths that a comparison was given: not where they lie on this machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path


def shown_path(text: str) -> str:
    """An absolute path from the working directory on, or its name if it lies elsewhere; other text as is."""
    path = Path(text).expanduser()
    if not path.is_absolute():
        return text
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def shown_setting(text: str) -> str:
    """The same, and of a file elsewhere also what is in it, as its name alone does not say which it is."""
    path = Path(text).expanduser()
    if not path.is_file() or path.resolve().is_relative_to(Path.cwd()):
        return shown_path(text)
    return f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})"


def shown_models(models: Iterable[str], earlier: Mapping[str, str]) -> dict[str, str]:
    """What each model is called, by what it was given as; where names are alike, with directories above.

    Args:
        earlier: what the models of earlier calls are called, which stays.
    """
    names = dict(earlier)
    for model in models:
        if model not in names:
            parts = Path(model).parts
            tails = (str(Path(*parts[-n:])) for n in range(2, len(parts)))
            candidates = (shown_path(model), *tails)
            names[model] = next((c for c in candidates if c not in names.values()), model)
    return names


def without_paths(text: str) -> str:
    """A message with the name alone of every absolute path in it."""
    quoted = re.sub(r"(['\"])/(?!/)(?:[^'\"]*/)?([^'\"/]+)\1", r"\1\2\1", text)
    return re.sub(r"(?<![\w./~])/(?!/)(?:[^\s/'\"]+/)*([^\s/'\",;:]+)", r"\1", quoted)
