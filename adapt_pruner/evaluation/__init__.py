"""Measuring language models: perplexity and multiple-choice questions."""

from adapt_pruner.evaluation.multiple_choice import (
    MultipleChoiceResult,
    TaskResult,
    evaluate_multiple_choice,
    paired_difference,
)
from adapt_pruner.evaluation.perplexity import PerplexityResult, evaluate_perplexity, perplexity
from adapt_pruner.evaluation.tasks import COMMONSENSE_TASKS, TASKS, Item, Task

__all__ = [
    "COMMONSENSE_TASKS",
    "TASKS",
    "Item",
    "MultipleChoiceResult",
    "PerplexityResult",
    "Task",
    "TaskResult",
    "evaluate_multiple_choice",
    "evaluate_perplexity",
    "paired_difference",
    "perplexity",
]
