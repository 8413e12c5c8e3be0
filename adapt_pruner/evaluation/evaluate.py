"""The `evaluate` command: perplexity of one model on a text, and its results on benchmarks."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapt_pruner.assets import resolve_model
from adapt_pruner.checkpoint import open_checkpoint, write_json
from adapt_pruner.config import EvaluateConfig
from adapt_pruner.engines.device import resolve_device
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.evaluation.lm_eval_tasks import LmEvalResult, evaluate_lm_eval, find_lm_eval_tasks
from adapt_pruner.evaluation.multiple_choice import MultipleChoiceResult, evaluate_multiple_choice
from adapt_pruner.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from adapt_pruner.evaluation.tasks import COMMONSENSE_TASKS, MMLU_EXAMPLES, TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found: each part is None, and that of lm-eval empty, if it was not asked for."""

    model: str
    parameters: int
    data: str | None
    perplexity: PerplexityResult | None
    multiple_choice: MultipleChoiceResult | None
    lm_eval: tuple[LmEvalResult, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Evaluates a model as the config says.

    Raises:
        ValueError: nothing to evaluate, an unknown task, a task of lm-eval without it, no text, or a model
            that cannot be loaded.
    """
    built_in, foreign = split_tasks(config)
    if config.data == "none" and not built_in and not foreign:
        raise ValueError('nothing to evaluate: data is "none" and no task is named')
    started = time.perf_counter()
    resolve_device(config.device)
    if config.output:
        if Path(config.output).is_dir():
            raise ValueError(f"output is {config.output}, a directory; expected a JSON file to write")
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    manager = find_lm_eval_tasks(foreign) if foreign else None
    checkpoint = open_checkpoint(resolve_model(config.model))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    model = load_model(checkpoint, device=config.device, dtype=config.dtype)
    lm_eval: tuple[LmEvalResult, ...] = ()
    if manager is not None:  # first, as it may not reach its questions
        lm_eval = evaluate_lm_eval(
            model,
            tokenizer,
            foreign,
            manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            batch_size=config.batch_size,
        )
    perplexity, multiple_choice = evaluate_model(config, model, tokenizer)
    result = EvaluationResult(
        config.model,
        checkpoint.num_parameters,
        None if config.data == "none" else config.data,
        perplexity,
        multiple_choice,
        lm_eval,
        round(time.perf_counter() - started, 3),
    )
    if config.output:
        write_json(Path(config.output), result.to_dict())
    return result


def evaluate_model(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PerplexityResult | None, MultipleChoiceResult | None]:
    """What `evaluate` measures without lm-eval, of a model that is loaded."""
    perplexity = None
    if config.data != "none":
        perplexity = evaluate_perplexity(
            model,
            tokenizer,
            config.data,
            "held-out" if config.data == "default" else None,
            column=config.column,
            split=config.split,
            context=config.context,
            stride=config.stride,
            max_tokens=config.max_tokens,
            batch_size=config.batch_size,
            prefix_bos=config.prefix_bos,
        )
    multiple_choice = None
    tasks, _ = split_tasks(config)
    if tasks:
        multiple_choice = evaluate_multiple_choice(
            model,
            tokenizer,
            tasks,
            limit=config.limit,
            questions=config.questions,
            num_fewshot=config.num_fewshot or 0,
            batch_size=config.batch_size,
        )
    return perplexity, multiple_choice


def task_names(tasks: str) -> tuple[str, ...]:
    """Names of built-in tasks from a comma-separated list, "commonsense" spelled out.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    names = _names(tasks)
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}, expected commonsense or some of {sorted(TASKS)}")
    return names


def split_tasks(config: EvaluateConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of built-in tasks, and those for lm-eval, which alone has examples for most tasks.

    Raises:
        ValueError: lm-eval does not ask every other question alone, as one of its tasks would have to.
    """
    shots = config.num_fewshot or 0
    names = _names(config.tasks)
    built_in = tuple(
        name for name in names if name in TASKS and shots <= (MMLU_EXAMPLES if name == "mmlu" else 0)
    )
    foreign = tuple(name for name in names if name not in built_in)
    if foreign and config.questions != "all":
        raise ValueError(
            f"questions is {config.questions!r}, but {list(foreign)} with {shots} examples go to lm-eval, "
            f"which asks all; built in are {sorted(TASKS)}, without examples but for mmlu"
        )
    return built_in, foreign


def _names(tasks: str) -> tuple[str, ...]:
    names: list[str] = []
    for name in filter(None, (part.strip() for part in tasks.split(","))):
        names += COMMONSENSE_TASKS if name == "commonsense" else [name]
    return tuple(dict.fromkeys(names))
