"""Multiple-choice accuracy by log-likelihood, with the prompts and scores of lm-eval 0.4."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from adapt_pruner.assets import load_benchmark, load_mmlu
from adapt_pruner.data import check_vocabulary
from adapt_pruner.evaluation.log_probabilities import (
    check_logits,
    evaluating,
    longest_shared,
    token_log_probabilities,
)
from adapt_pruner.evaluation.shared_rows import Batch, batches, shared_rows
from adapt_pruner.evaluation.tasks import COMMONSENSE_TASKS, MMLU_EXAMPLES, TASKS, Item, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS = 256  # of a sequence of `batch_size`
_TEXTS = 4096  # that are tokenised at a time

Questions = Literal["all", "even", "odd"]
_HALVES: dict[Questions, slice] = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task.

    Args:
        task: name.
        items: number of questions.
        accuracy: share of questions whose right choice has the largest log-likelihood (`acc`).
        accuracy_stderr: standard error of it; None for a single question.
        accuracy_norm: the same by log-likelihood per character of the choice (`acc_norm`); None for tasks for
            which lm-eval does not report it.
        accuracy_norm_stderr: standard error of it.
        chance: expected accuracy of guessing.
        correct: per question, by log-likelihood.
        correct_norm: per question, by log-likelihood per character, or None.
    """

    task: str
    items: int
    accuracy: float
    accuracy_stderr: float | None
    accuracy_norm: float | None
    accuracy_norm_stderr: float | None
    chance: float
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None


@dataclass(frozen=True)
class MultipleChoiceResult:
    """Accuracy on several tasks.

    Args:
        tasks: one result per task, in the order asked for.
        mean_accuracy: mean of the tasks' accuracies, each task with the same weight.
        mean_accuracy_stderr: standard error of it, the tasks being independent; None if one is unknown.
        mean_accuracy_norm: the same with the normalised accuracy of the tasks that have one.
        mean_accuracy_norm_stderr: standard error of it.
        limit: only so many first questions of each task were asked; None for all.
        questions: "even" or "odd" where only every other one of them was asked.
    """

    tasks: tuple[TaskResult, ...]
    mean_accuracy: float
    mean_accuracy_stderr: float | None
    mean_accuracy_norm: float
    mean_accuracy_norm_stderr: float | None
    limit: int | None
    questions: Questions = "all"

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary of plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Request:
    """One choice as token ids: the continuation is predicted while `read` is being read.

    Args:
        read: context and continuation without the last token, [length], int32.
        targets: the continuation; its last token follows the last one of `read`.
    """

    read: np.ndarray
    targets: np.ndarray


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = COMMONSENSE_TASKS,
    *,
    limit: int | None = None,
    questions: Questions = "all",
    num_fewshot: int = 0,
    batch_size: int = 16,
) -> MultipleChoiceResult:
    """Accuracy of a model on multiple-choice benchmarks, asked without examples but for MMLU.

    Tasks whose text is in the built-in calibration corpus (boolq, sciq) are not in the default list.

    Args:
        model: causal language model; its training flags are restored afterwards.
        tokenizer: of the model. It adds the special tokens it adds by default, as in lm-eval.
        tasks: keys of `TASKS`; by default the seven commonsense tasks.
        limit: ask only the first so many questions of each task, of MMLU each subject, the same for every
            model.
        questions: "even" or "odd": ask every other question alone, the first so many of those.
        num_fewshot: solved examples in front of each question of MMLU, up to 5; 0 for every other task.
        batch_size: 256 tokens each, padding included, that are read at a time. Like other questions that are
            asked together, it changes log-likelihoods by rounding alone.
    Raises:
        ValueError: a task is unknown, an argument is out of range, or the tokenizer does not belong to the
            model.
        AssetError: the questions could not be fetched.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"unknown tasks {unknown}; expected at least one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    asked = [load_items(name, limit=limit, questions=questions, num_fewshot=num_fewshot) for name in tasks]
    scores = iter(
        score_items(model, tokenizer, [item for items in asked for item in items], batch_size=batch_size)
    )
    results = [
        _result(TASKS[name], items, list(itertools.islice(scores, len(items))))
        for name, items in zip(tasks, asked, strict=True)
    ]
    normalised = [(r.accuracy, r.accuracy_stderr) for r in results]
    for i, result in enumerate(results):
        if result.accuracy_norm is not None:
            normalised[i] = (result.accuracy_norm, result.accuracy_norm_stderr)
    mean, stderr = mean_of_tasks([(result.accuracy, result.accuracy_stderr) for result in results])
    mean_norm, stderr_norm = mean_of_tasks(normalised)
    return MultipleChoiceResult(tuple(results), mean, stderr, mean_norm, stderr_norm, limit, questions)


def load_items(
    name: str, *, limit: int | None = None, questions: Questions = "all", num_fewshot: int = 0
) -> list[Item]:
    """The questions of a task that `evaluate_multiple_choice` asks.

    Raises:
        ValueError: there are none, `questions` is not one of the choices, or there are no such examples.
        AssetError: they could not be fetched.
    """
    if questions not in _HALVES:
        raise ValueError(f"questions is {questions!r}; expected one of {', '.join(_HALVES)}")
    most = MMLU_EXAMPLES if name == "mmlu" else 0
    if not 0 <= num_fewshot <= most:
        raise ValueError(f"num_fewshot is {num_fewshot}; expected 0 to {most} for {name}")
    if name == "mmlu":
        rows = _mmlu_rows(limit, questions, num_fewshot)
    else:
        rows = load_benchmark(name)[_HALVES[questions]][:limit]
    if not rows:
        raise ValueError(f"{name} has no {questions} questions")
    return [TASKS[name].item(row) for row in rows]


def _mmlu_rows(limit: int | None, questions: Questions, num_fewshot: int) -> list[dict[str, Any]]:
    """Rows of every subject, with the first of its examples."""
    examples, tested = load_mmlu("dev"), load_mmlu("test")
    chosen = []
    for subject in dict.fromkeys(row["subject"] for row in tested):
        solved, rows = ([row for row in part if row["subject"] == subject] for part in (examples, tested))
        chosen += [{**row, "examples": solved[:num_fewshot]} for row in rows[_HALVES[questions]][:limit]]
    return chosen


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """Mean difference of two models on the same questions, and its standard error.

    Questions on which both are right or both are wrong cancel, so the error is much smaller than that of the
    difference of two separate accuracies.

    Args:
        first, second: per question, as in `TaskResult.correct`.
    Returns:
        (accuracy of the first minus accuracy of the second, standard error).
    Raises:
        ValueError: the lengths differ or are less than 2.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"{len(first)} and {len(second)} questions were answered; expected the same number, at least 2"
        )
    differences = torch.tensor(first).double() - torch.tensor(second).double()
    return float(differences.mean()), float(differences.std()) / math.sqrt(len(first))


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
) -> list[list[float]]:
    """Log-likelihood of every choice of every question, in nats.

    What choices begin with in common is read once, where the model allows it.

    Args:
        model, tokenizer, batch_size: as for `evaluate_multiple_choice`.
        items: questions.
    Returns:
        per question, per choice: sum of the log-probabilities of the continuation's tokens.
    Raises:
        ValueError: as for `evaluate_multiple_choice`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    config: Any = model.config.get_text_config()
    check_vocabulary(tokenizer, config.vocab_size)
    check_logits(model)
    requests = encode(tokenizer, items, getattr(config, "max_position_embeddings", None))
    rows = shared_rows([request.read for request in requests], longest_shared(model))
    scores = [0.0] * len(requests)
    with evaluating(model):
        for batch in batches(rows, batch_size * _TOKENS):
            for index, score in _score(model, requests, batch):
                scores[index] = score
    ordered = iter(scores)
    return [list(itertools.islice(ordered, len(item.continuations))) for item in items]


def encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], longest: int | None) -> list[Request]:
    """Every choice of every item as tokens, split where the tokens of the context alone end.

    Args:
        longest: tokens that the model can read; longer contexts are cut on the left.
    Raises:
        ValueError: a continuation without tokens, or with more than can be read.
    """
    pairs = [
        (context.rstrip(), context[len(context.rstrip()) :] + continuation)
        for item in items
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    requests = []
    for start in range(0, len(pairs), _TEXTS):
        part = pairs[start : start + _TEXTS]
        texts = list(dict.fromkeys(text for before, after in part for text in (before, before + after)))
        ids: Any = tokenizer(texts, verbose=False)["input_ids"]
        tokens = {text: np.array(row, np.int32) for text, row in zip(texts, ids, strict=True)}
        for before, after in part:
            assert before, "a context must have text"
            whole = tokens[before + after]
            targets = whole[len(tokens[before]) :]
            if not len(targets) or (longest is not None and len(targets) > longest):
                raise ValueError(
                    f"the continuation {after!r} has {len(targets)} tokens after {before[-40:]!r}; expected "
                    f"1 to {longest}"
                )
            requests.append(Request(whole[:-1] if longest is None else whole[:-1][-longest:], targets))
    return requests


def tokens_read(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> int:
    """Tokens that a model without a window reads to score the items, without padding."""
    requests = encode(tokenizer, items, None)
    return sum(len(row.tokens) for row in shared_rows([request.read for request in requests], sys.maxsize))


def _score(model: PreTrainedModel, requests: Sequence[Request], batch: Batch) -> Iterator[tuple[int, float]]:
    """Index and log-likelihood of every request in a batch."""
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    indices: list[int] = []
    for number, row in enumerate(batch.rows):
        for index, path in zip(row.sequences, row.paths, strict=True):
            targets = requests[index].targets
            rows.append(np.full(len(targets), number))
            columns.append(path[-len(targets) :])
            wanted.append(targets.astype(np.int64))
            indices.append(index)
    scored = token_log_probabilities(
        model,
        batch.tokens,
        *(torch.from_numpy(np.concatenate(parts)) for parts in (rows, columns, wanted)),
        positions=batch.positions,
        seen=batch.seen,
    ).cpu()
    pieces = scored.split(list(map(len, wanted)))
    return ((index, float(piece.sum())) for index, piece in zip(indices, pieces, strict=True))


def _result(task: Task, items: Sequence[Item], scores: Sequence[Sequence[float]]) -> TaskResult:
    correct = tuple(_argmax(score) == item.gold for item, score in zip(items, scores, strict=True))
    correct_norm = None
    if task.normalised:
        correct_norm = tuple(
            _argmax(_per_character(score, item.lengths)) == item.gold
            for item, score in zip(items, scores, strict=True)
        )
    accuracy, stderr = _accuracy(correct)
    accuracy_norm, stderr_norm = (None, None) if correct_norm is None else _accuracy(correct_norm)
    chance = sum(1 / len(item.continuations) for item in items) / len(items)
    return TaskResult(
        task=task.name,
        items=len(items),
        accuracy=accuracy,
        accuracy_stderr=stderr,
        accuracy_norm=accuracy_norm,
        accuracy_norm_stderr=stderr_norm,
        chance=chance,
        correct=correct,
        correct_norm=correct_norm,
    )


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _per_character(scores: Sequence[float], lengths: Sequence[int]) -> list[float]:
    # A choice left empty by the preprocessing is never the best one.
    return [score / n if n else -math.inf for score, n in zip(scores, lengths, strict=True)]


def _accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    share = sum(correct) / len(correct)
    if len(correct) < 2:
        return share, None
    return share, math.sqrt(share * (1 - share) / (len(correct) - 1))


def mean_of_tasks(values: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Mean of values of several tasks, each with the same weight, and its standard error.

    Args:
        values: of each task, the tasks being independent, and its standard error; None where that is unknown.
    """
    mean = sum(value for value, _ in values) / len(values)
    errors = [error for _, error in values if error is not None]
    if len(errors) < len(values):
        return mean, None
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(values)
