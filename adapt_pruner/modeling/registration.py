"""Makes transformers' Auto classes know the pruned models, without importing transformers early."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from adapt_pruner.families import Family, add_family
from adapt_pruner.modeling.pruned_config import CLASSES, Classes

_AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Makes the Auto classes of transformers know every pruned and sliced model, and MobileLLM."""
    from adapt_pruner.modeling import modeling_adapt, modeling_sliced
    from adapt_pruner.modeling.mobilellm import MobileLLMConfig, MobileLLMForCausalLM, MobileLLMModel

    mobilellm = (MobileLLMConfig, MobileLLMModel, MobileLLMForCausalLM)
    for config, model, causal_lm in (*modeling_adapt.MODELS, *modeling_sliced.MODELS, mobilellm):
        _register_classes(config, model, causal_lm)


def register_family(family: Family, config: Any, model: Any, causal_lm: Any) -> None:
    """Adds a family of your own to this process; docs/families.md has an example.

    Args:
        config, model, causal_lm: its classes with per-layer widths, made with the mixins of
            `adapt_pruner.modeling.modeling_adapt`; the config's model_type is "adapt_" and the stock one.
    Raises:
        ValueError: one of its model types is known already.
    """
    add_family(family)
    CLASSES[config.model_type.removeprefix("adapt_")] = Classes(
        next(c.__name__ for c in causal_lm.__mro__ if c.__module__.startswith("transformers.")),
        config.__name__.removesuffix("Config"),
        Path(inspect.getfile(config)),
    )
    _register_classes(config, model, causal_lm)


def _register_classes(config: Any, model: Any, causal_lm: Any) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


def register_on_first_load() -> None:
    """Arranges that the first `AutoConfig.from_pretrained`, through which every load goes, registers first.

    `import adapt_pruner` calls this, so that it is enough for `from_pretrained` to work. Importing the model
    classes there and then would cost seconds and hundreds of megabytes that commands which only touch files
    do not need, and would fail in the middle of transformers' own circular imports.
    """
    module = sys.modules.get(_AUTO_CONFIG_MODULE)
    if module is not None:
        _patch(module)
    else:
        sys.meta_path.insert(0, _PatchAfterImport())


def _patch(module: ModuleType) -> None:
    auto_config = module.AutoConfig
    original = auto_config.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_config.from_pretrained = original
        register()
        return cls.from_pretrained(*args, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    """Patches the module of AutoConfig as soon as somebody imports it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CONFIG_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_patch(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = execute_then_patch  # type: ignore[method-assign]
        return spec
