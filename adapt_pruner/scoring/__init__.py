"""Scoring: one pass over the calibration batch -> importance of units and of layers."""

from adapt_pruner.scoring.estimators import ESTIMATORS, Estimator, Subject, find_estimator, weights_alone
from adapt_pruner.scoring.taylor import Scores, score

__all__ = ["ESTIMATORS", "Estimator", "Scores", "Subject", "find_estimator", "score", "weights_alone"]
