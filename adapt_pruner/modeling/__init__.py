"""Models with per-layer widths: registration with the Auto classes, conversion from stock models."""

from adapt_pruner.modeling.registration import register, register_family, register_on_first_load

__all__ = ["register", "register_family", "register_on_first_load"]
