"""`adapt-pruner compare`: models x methods x targets -> one table, page and plot."""

from adapt_pruner.comparison.run import ComparisonResult, compare

__all__ = ["ComparisonResult", "compare"]
