"""Makes transformers' Auto classes know the pruned models, without importing transformers early."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TRIGGER = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Registers every per-layer-width model with AutoConfig, AutoModel and AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from adapt_pruner.modeling.modeling_adapt import MODELS

    for config, model, causal_lm in MODELS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Runs `register` right after transformers' Auto classes have been imported.

    Importing transformers takes seconds and hundreds of megabytes, which commands that only touch files
    do not need; `import adapt_pruner` alone must still be enough for `from_pretrained` to work.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_when_transformers_is_imported() -> None:
    """Registers now if transformers' Auto classes are loaded, else as soon as they are."""
    if _TRIGGER in sys.modules:
        register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
