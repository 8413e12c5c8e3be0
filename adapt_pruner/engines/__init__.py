"""Engines: where the weights live while a model is scored and pruned."""

from adapt_pruner.engines.in_memory import InMemoryEngine, load_model

__all__ = ["InMemoryEngine", "load_model"]
