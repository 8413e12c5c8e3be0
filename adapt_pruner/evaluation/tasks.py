"""Multiple-choice tasks as data: how a row of a benchmark becomes contexts, continuations and an answer.

Prompts are those of lm-eval 0.4, with 0 shots but for MMLU, so that its published numbers can be compared
with ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question; the score of choice i is log P(continuations[i] | contexts[i]).

    Args:
        contexts: one per choice; mostly equal.
        continuations: one per choice, with the space that separates it from the context.
        lengths: characters of each choice without the separating space, for the normalised score.
        gold: index of the right choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        name: as in lm-eval and, but for MMLU, `assets.BENCHMARKS`.
        item: makes a question of a row.
        normalised: lm-eval also reports the accuracy by log-likelihood per character (`acc_norm`).
        in_default_corpus: its text is part of the built-in calibration corpus, so that its score says nothing
            about a model calibrated or trained on that corpus.
    """

    name: str
    item: Callable[[Row], Item]
    normalised: bool
    in_default_corpus: bool = False


def _question(context: str, choices: list[str], gold: int) -> Item:
    return Item(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        lengths=tuple(len(choice) for choice in choices),
        gold=gold,
    )


def _hellaswag(row: Row) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_clean_hellaswag(ending) for ending in row["endings"]]
    return _question(_clean_hellaswag(context), endings, int(row["label"]))


def _clean_hellaswag(text: str) -> str:
    """Without the mark-up that the part of HellaSwag from WikiHow carries."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: Row) -> Item:
    return _question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _arc(row: Row) -> Item:
    choices = row["choices"]
    # Labels are A to D in most rows and 1 to 4 in others.
    gold = choices["label"].index(row["answerKey"])
    return _question(f"Question: {row['question']}\nAnswer:", choices["text"], gold)


def _winogrande(row: Row) -> Item:
    """Partial evaluation: the same ending is scored after each way to fill the gap."""
    before, _, after = row["sentence"].partition("_")
    options = (row["option1"], row["option2"])
    ending = after.strip()
    return Item(
        contexts=tuple(before + option for option in options),
        continuations=(f" {ending}",) * 2,
        lengths=(len(ending),) * 2,
        gold=int(row["answer"]) - 1,
    )


def _openbookqa(row: Row) -> Item:
    choices = row["choices"]
    return _question(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"].lstrip()))


def _social_iqa(row: Row) -> Item:
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(f"Q: {row['context']} {row['question']}\nA:", answers, int(row["label"]) - 1)


def _boolq(row: Row) -> Item:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _question(context, ["no", "yes"], int(row["answer"]))


def _sciq(row: Row) -> Item:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return _question(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def _copa(row: Row) -> Item:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    # lm-eval's choices begin with a space and get another one as separator.
    choices = [f" {choice[0].lower()}{choice[1:]}" for choice in (row["choice1"], row["choice2"])]
    return _question(f"{row['premise'].strip()[:-1]} {connector}", choices, row["label"])


def _commonsense_qa(row: Row) -> Item:
    letters = ["A", "B", "C", "D", "E"]
    options = "\n".join(
        f"{letter}. {text}" for letter, text in zip(letters, row["choices"]["text"], strict=True)
    )
    context = f"Question: {row['question'].strip()}\n{options}\nAnswer:"
    return _question(context, letters, letters.index(row["answerKey"]))


def _mmlu(row: Row) -> Item:
    """Behind the solved examples of the subject that the row carries."""
    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    solved = "".join(f"{_mmlu_text(e)} {_LETTERS[e['answer']]}\n\n" for e in row["examples"])
    return _question(head + solved + _mmlu_text(row), list(_LETTERS), row["answer"])


_LETTERS = "ABCD"


def _mmlu_text(row: Row) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(_LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{options}Answer:"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("hellaswag", _hellaswag, normalised=True),
        Task("piqa", _piqa, normalised=True),
        Task("arc_easy", _arc, normalised=True),
        Task("arc_challenge", _arc, normalised=True),
        Task("winogrande", _winogrande, normalised=False),
        Task("openbookqa", _openbookqa, normalised=True),
        Task("social_iqa", _social_iqa, normalised=False),
        Task("boolq", _boolq, normalised=False, in_default_corpus=True),
        Task("sciq", _sciq, normalised=True, in_default_corpus=True),
        Task("copa", _copa, normalised=False),
        Task("commonsense_qa", _commonsense_qa, normalised=False),
        Task("mmlu", _mmlu, normalised=False),
    )
}

MMLU_EXAMPLES = 5  # that there are of each subject

COMMONSENSE_TASKS: tuple[str, ...] = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "openbookqa",
    "piqa",
    "social_iqa",
    "winogrande",
)
