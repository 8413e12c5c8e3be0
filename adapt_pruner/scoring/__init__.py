"""Scoring: one forward and backward pass -> importance of units and of layers."""

from adapt_pruner.scoring.taylor import Scores, score

__all__ = ["Scores", "score"]
