"""Tasks of lm-eval, EleutherAI's evaluation harness, which is installed by the extra `lm-eval`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapt_pruner.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LmEvalResult:
    """What lm-eval reports of a task, or of a group of tasks.

    Args:
        task: its name.
        items: number of questions; None for a group.
        num_fewshot: solved examples in front of each; None for a group whose tasks differ.
        metrics: by name, such as "acc", with the filter of lm-eval behind a comma if it has one.
        stderr: standard errors of those that have one.
    """

    task: str
    items: int | None
    num_fewshot: int | None
    metrics: dict[str, float]
    stderr: dict[str, float]


def find_lm_eval_tasks(names: Sequence[str]) -> TaskManager:
    """The tasks of lm-eval by name, of which those must be some.

    Args:
        names: tasks, groups or tags of lm-eval, or YAML files of tasks.
    Raises:
        ValueError: lm-eval is not installed, or it does not know a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks {list(names)} need lm-eval, which is not installed: pip install 'adapt_pruner[lm-eval]'. "
            f"Built in are, without examples but for mmlu, {sorted(TASKS)}"
        )
    from lm_eval.tasks import TaskManager

    files = {name for name in names if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()}
    # Its own tasks take seconds to find. A file may name some of them only where it is a group.
    own = set(names) - files or any("group:" in Path(file).read_text("utf-8") for file in files)
    manager = TaskManager(include_defaults=bool(own))
    unknown = sorted(set(names) - files - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}: neither built in, nor of lm-eval, nor YAML files")
    return manager


def evaluate_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> tuple[LmEvalResult, ...]:
    """Measures a model by lm-eval, which runs no code of models or data sets and fetches what it needs.

    Args:
        names, manager: as for `find_lm_eval_tasks`, and what it returned.
        num_fewshot: solved examples in front of each question; None: as many as the task says.
        limit: ask only the first so many questions of each task.
        batch_size: sequences at a time.
    Raises:
        OSError: questions could not be fetched.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: Any = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(names),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    return tuple(_result(name, values, found) for name, values in found["results"].items())


def _result(name: str, values: dict[str, Any], found: dict[str, Any]) -> LmEvalResult:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, (int, float)):  # names, and errors that are "N/A"
            continue
        into = stderr if metric.endswith("_stderr") else metrics
        metric = metric.removesuffix("_stderr")
        into[metric if filtered == "none" else f"{metric},{filtered}"] = float(value)
    items = found["n-samples"].get(name, {}).get("effective")
    return LmEvalResult(name, items, found["n-shot"].get(name), metrics, stderr)
