"""Models with per-layer widths: registration with the Auto classes, conversion from stock models."""

from adapt_pruner.modeling.registration import register, register_when_transformers_is_imported

__all__ = ["register", "register_when_transformers_is_imported"]
