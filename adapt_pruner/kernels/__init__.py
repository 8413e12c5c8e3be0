"""Fused ops: importance, gathering, similarity of residual streams, statistics of activations."""

from adapt_pruner.kernels.activations import ActivationStats
from adapt_pruner.kernels.backends import BACKENDS, BackendUnavailable, backend_status, build_info
from adapt_pruner.kernels.checks import METRICS, MODES
from adapt_pruner.kernels.finite import NonFiniteError
from adapt_pruner.kernels.ops import (
    UnitSet,
    activation_stats,
    gather_units,
    linear_importance,
    residual_similarity,
    unit_importance,
    unit_importances,
)

__all__ = [
    "BACKENDS",
    "METRICS",
    "MODES",
    "ActivationStats",
    "BackendUnavailable",
    "NonFiniteError",
    "UnitSet",
    "activation_stats",
    "backend_status",
    "build_info",
    "gather_units",
    "linear_importance",
    "residual_similarity",
    "unit_importance",
    "unit_importances",
]
