"""Structured pruning of decoder language models: Adapt-Pruner (arXiv 2502.03460) with fused kernels.

Importing the package is enough for transformers' Auto classes to load pruned models; it imports neither
torch nor transformers itself.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from adapt_pruner.modeling.registration import register_on_first_load

if TYPE_CHECKING:
    from adapt_pruner.adapt_accel import AccelResult, accel
    from adapt_pruner.apply import apply_plan
    from adapt_pruner.bench import BenchResult, bench_kernels
    from adapt_pruner.comparison import ComparisonResult, compare
    from adapt_pruner.config import (
        BenchConfig,
        CompareConfig,
        EvaluateConfig,
        InspectConfig,
        PlanMemoryConfig,
        PruneConfig,
    )
    from adapt_pruner.evaluation.evaluate import EvaluationResult, evaluate
    from adapt_pruner.inspection import ModelSummary, summarize
    from adapt_pruner.memory_plan import MemoryPlan, plan_memory
    from adapt_pruner.methods import METHODS, Method
    from adapt_pruner.plan import PruningPlan
    from adapt_pruner.pruner import PruneResult, prune
    from adapt_pruner.recovery.config import AccelConfig, RecoverConfig
    from adapt_pruner.recovery.recover import RecoverResult, recover
    from adapt_pruner.scoring import Estimator

_HOME = {
    "AccelConfig": "recovery.config",
    "AccelResult": "adapt_accel",
    "BenchConfig": "config",
    "BenchResult": "bench",
    "CompareConfig": "config",
    "ComparisonResult": "comparison",
    "Estimator": "scoring",
    "EvaluateConfig": "config",
    "EvaluationResult": "evaluation.evaluate",
    "InspectConfig": "config",
    "METHODS": "methods",
    "MemoryPlan": "memory_plan",
    "Method": "methods",
    "ModelSummary": "inspection",
    "PlanMemoryConfig": "config",
    "PruneConfig": "config",
    "PruneResult": "pruner",
    "PruningPlan": "plan",
    "RecoverConfig": "recovery.config",
    "RecoverResult": "recovery.recover",
    "accel": "adapt_accel",
    "apply_plan": "apply",
    "bench_kernels": "bench",
    "compare": "comparison",
    "evaluate": "evaluation.evaluate",
    "plan_memory": "memory_plan",
    "prune": "pruner",
    "recover": "recovery.recover",
    "summarize": "inspection",
}

__all__ = [
    "METHODS",
    "AccelConfig",
    "AccelResult",
    "BenchConfig",
    "BenchResult",
    "CompareConfig",
    "ComparisonResult",
    "Estimator",
    "EvaluateConfig",
    "EvaluationResult",
    "InspectConfig",
    "MemoryPlan",
    "Method",
    "ModelSummary",
    "PlanMemoryConfig",
    "PruneConfig",
    "PruneResult",
    "PruningPlan",
    "RecoverConfig",
    "RecoverResult",
    "accel",
    "apply_plan",
    "bench_kernels",
    "compare",
    "evaluate",
    "plan_memory",
    "prune",
    "recover",
    "summarize",
]

try:
    __version__ = metadata.version("adapt_pruner")
except metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"adapt_pruner.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_on_first_load()
