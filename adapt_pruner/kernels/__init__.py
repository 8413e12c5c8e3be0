"""Fused ops of pruning: unit importance, gathering of kept units, similarity of residual streams."""

from adapt_pruner.kernels.backends import BACKENDS, BackendUnavailable, backend_status, build_info
from adapt_pruner.kernels.checks import METRICS, MODES
from adapt_pruner.kernels.ops import gather_units, residual_similarity, unit_importance

__all__ = [
    "BACKENDS",
    "METRICS",
    "MODES",
    "BackendUnavailable",
    "backend_status",
    "build_info",
    "gather_units",
    "residual_similarity",
    "unit_importance",
]
