"""Zero-shot multiple-choice accuracy by log-likelihood, with the prompts and scores of lm-eval 0.4."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from adapt_pruner.assets import load_benchmark
from adapt_pruner.data import check_vocabulary
from adapt_pruner.evaluation.log_probabilities import check_logits, evaluating, token_log_probabilities
from adapt_pruner.evaluation.tasks import COMMONSENSE_TASKS, TASKS, Item, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
class _Request:
    """One choice as token ids: the continuation is predicted while `read` is being read.

    Args:
        read: context and continuation without the last token.
        targets: the continuation; its last token follows the last one of `read`.
    """

    read: tuple[int, ...]
    targets: tuple[int, ...]


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = COMMONSENSE_TASKS,
    *,
    limit: int | None = None,
    questions: Questions = "all",
    batch_size: int = 16,
) -> MultipleChoiceResult:
    """Accuracy of a model on multiple-choice benchmarks with 0 shots.

    Tasks whose text is in the built-in calibration corpus (boolq, sciq) are not in the default list.

    Args:
        model: causal language model; its training flags are restored afterwards.
        tokenizer: of the model. It adds the special tokens it adds by default, as in lm-eval.
        tasks: keys of `TASKS`; by default the seven commonsense tasks.
        limit: ask only the first so many questions of each task, the same for every model.
        questions: "even" or "odd": ask every other question alone, the first so many of those.
        batch_size: sequences at a time; does not change the result.
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
    results = []
    for name in tasks:
        items = load_items(name, limit=limit, questions=questions)
        results.append(
            _result(TASKS[name], items, score_items(model, tokenizer, items, batch_size=batch_size))
        )
    normalised = [(r.accuracy, r.accuracy_stderr) for r in results]
    for i, result in enumerate(results):
        if result.accuracy_norm is not None:
            normalised[i] = (result.accuracy_norm, result.accuracy_norm_stderr)
    mean, stderr = mean_of_tasks([(result.accuracy, result.accuracy_stderr) for result in results])
    mean_norm, stderr_norm = mean_of_tasks(normalised)
    return MultipleChoiceResult(tuple(results), mean, stderr, mean_norm, stderr_norm, limit, questions)


def load_items(name: str, *, limit: int | None = None, questions: Questions = "all") -> list[Item]:
    """The questions of a task that `evaluate_multiple_choice` asks.

    Raises:
        ValueError: there are none, or `questions` is not one of the choices.
        AssetError: they could not be fetched.
    """
    if questions not in _HALVES:
        raise ValueError(f"questions is {questions!r}; expected one of {', '.join(_HALVES)}")
    rows = load_benchmark(name)[_HALVES[questions]][:limit]
    if not rows:
        raise ValueError(f"{name} has no {questions} questions")
    return [TASKS[name].item(row) for row in rows]


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

    Choices whose tokens differ only in the last one share one pass through the model.

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
    longest = getattr(config, "max_position_embeddings", None)
    requests = [
        _encode(tokenizer, context, continuation, longest)
        for item in items
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    with evaluating(model):
        scores = iter(_score(model, requests, batch_size))
    return [[next(scores) for _ in item.continuations] for item in items]


def _encode(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, longest: int | None
) -> _Request:
    """Tokens of a context and its continuation, split where the tokens of the context alone end."""
    stripped = context.rstrip()
    assert stripped, "a context must have text"
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation)
    targets = whole[len(tokenizer.encode(stripped)) :]
    if not targets or (longest is not None and len(targets) > longest):
        raise ValueError(
            f"the continuation {continuation!r} has {len(targets)} tokens after {stripped[-40:]!r}; expected "
            f"1 to {longest}"
        )
    read = whole[:-1] if longest is None else whole[:-1][-longest:]
    return _Request(tuple(read), tuple(targets))


def _score(model: PreTrainedModel, requests: Sequence[_Request], batch_size: int) -> list[float]:
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        sharing.setdefault(request.read, []).append(index)
    # Longest first: sequences of a batch are of similar length, and memory runs out at the start if at all.
    ordered = sorted(sharing, key=lambda read: (-len(read), read))
    scores = [0.0] * len(requests)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        for index, score in _score_batch(model, requests, batch, [sharing[read] for read in batch]):
            scores[index] = score
    return scores


def _score_batch(
    model: PreTrainedModel,
    requests: Sequence[_Request],
    batch: Sequence[tuple[int, ...]],
    sharing: Sequence[Sequence[int]],
) -> Iterator[tuple[int, float]]:
    inputs = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (read, indices) in enumerate(zip(batch, sharing, strict=True)):
        inputs[row, : len(read)] = torch.tensor(read)
        for index in indices:
            wanted = requests[index].targets
            rows += [row] * len(wanted)
            columns += range(len(read) - len(wanted), len(read))
            targets += wanted
    scored = token_log_probabilities(
        model, inputs, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets)
    ).cpu()
    flat = [index for indices in sharing for index in indices]
    pieces = scored.split([len(requests[index].targets) for index in flat])
    return ((index, float(piece.sum())) for index, piece in zip(flat, pieces, strict=True))


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
