"""Perplexity and multiple choice against naive implementations, on a tiny random model."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adapt_pruner.evaluation import (
    COMMONSENSE_TASKS,
    TASKS,
    evaluate_multiple_choice,
    evaluate_perplexity,
    log_probabilities,
    multiple_choice,
    paired_difference,
    perplexity,
)
from adapt_pruner.evaluation.tasks import Item, Row

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALL = {
    "vocab_size": len(BYTES) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # far from uniform predictions
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def make_tokenizer(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token, and "\\n" followed by "A" merges into one."""
    vocabulary = {token: i for i, token in enumerate(["<s>", *BYTES, "ĊA"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "A")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, SMALL["vocab_size"], count).astype(np.int32)


def naive_log_probability(model: PreTrainedModel, read: list[int], target: int) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([read])).logits[0, -1]
    return float(torch.log_softmax(logits.double(), dim=-1)[target])


# Perplexity


def naive_loss(
    model: PreTrainedModel, tokens: list[int], context: int, stride: int, prefix: list[int]
) -> tuple:
    """Every token by a pass of its own, from as much of its first window as precedes it."""
    width = context - len(prefix)
    losses = []
    scored_to = 0
    for start in range(0, len(tokens), stride):
        end = min(start + width, len(tokens))
        for position in range(scored_to, end):
            read = prefix + tokens[start:position]
            if read:
                losses.append(-naive_log_probability(model, read, tokens[position]))
        scored_to = end
        if end == len(tokens):
            break
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("prefix", [None, 0])
@pytest.mark.parametrize(
    ("count", "context", "stride"),
    [(40, 16, None), (40, 16, 16), (41, 8, 3), (33, 16, 1), (7, 16, 4), (32, 8, None)],
)
def test_perplexity_equals_a_loop_over_tokens(
    model: PreTrainedModel, count: int, context: int, stride: int | None, prefix: int | None
) -> None:
    before = [] if prefix is None else [prefix]
    if stride == context:
        stride -= len(before)
    tokens = random_tokens(count)
    result = perplexity(model, tokens, context=context, stride=stride, batch_size=3, prefix_token_id=prefix)
    width = context - len(before)
    loss, scored = naive_loss(model, tokens.tolist(), context, stride or width, before)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert (result.tokens, result.context, result.stride) == (scored, context, stride or width)
    assert result.prefix_token_id == prefix


def test_number_of_scored_tokens(model: PreTrainedModel) -> None:
    tokens = random_tokens(64)
    assert perplexity(model, tokens, context=16).tokens == 4 * 15  # a window's first token is not predicted
    assert perplexity(model, tokens, context=16, stride=4).tokens == 63
    assert perplexity(model, tokens, context=17, prefix_token_id=0).tokens == 64
    assert perplexity(model, tokens[:17], context=16).tokens == 15  # a last window of one token has no target


@pytest.mark.parametrize("stride", [None, 5])
def test_perplexity_does_not_depend_on_the_batch(model: PreTrainedModel, stride: int | None) -> None:
    tokens = random_tokens(150)
    losses = [perplexity(model, tokens, context=16, stride=stride, batch_size=b).loss for b in (1, 4, 8)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_head_is_applied_in_chunks(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(60)
    whole = perplexity(model, tokens, context=20)
    monkeypatch.setattr(log_probabilities, "_LOGITS_AT_ONCE", 7 * SMALL["vocab_size"])
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[0]))
    chunked = perplexity(model, tokens, context=20)
    hook.remove()
    assert chunked.loss == pytest.approx(whole.loss, abs=1e-6)
    assert max(sizes) == 7


def test_soft_capped_logits() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, final_logit_softcapping=1.5, sliding_window=8)
    gemma = Gemma2ForCausalLM(config).eval()
    tokens = random_tokens(30)
    loss, _ = naive_loss(gemma, tokens.tolist(), 16, 16, [])
    assert perplexity(gemma, tokens, context=16).loss == pytest.approx(loss, abs=1e-5)


def test_models_with_other_logits_are_refused() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    with pytest.raises(
        ValueError, match="Scaled cannot be evaluated: its logits are not its output embedding"
    ):
        perplexity(Scaled(LlamaConfig(**SMALL)), random_tokens(10), context=8)


def test_max_tokens_and_bits_per_byte(model: PreTrainedModel) -> None:
    tokens = random_tokens(100)
    result = perplexity(model, tokens, context=16, max_tokens=50, num_bytes=200)
    alone = perplexity(model, tokens[:50], context=16)
    assert result.loss == alone.loss
    assert alone.bits_per_byte is None
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * 50 / 200)
    assert json.loads(json.dumps(result.to_dict()))["context"] == 16


def test_training_flags_are_restored(model: PreTrainedModel) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, random_tokens(20), context=8)
    assert [module.training for module in model.modules()] == before
    model.eval()
    perplexity(model, random_tokens(20), context=8)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context is 1; expected at least 2"),
        ({"context": 2, "prefix_token_id": 0}, "context is 2; expected at least 2 tokens of text"),
        ({"context": 512}, "context is 512, but the model has only 256 positions"),
        ({"context": 16, "stride": 0}, "stride is 0; expected 1 to 16"),
        ({"context": 16, "stride": 17}, "stride is 17; expected 1 to 16"),
        ({"context": 16, "batch_size": 0}, "batch_size is 0"),
        ({"context": 16, "max_tokens": 1}, "max_tokens is 1; expected at least 2"),
        ({"context": 16, "num_bytes": 0}, "num_bytes is 0; expected at least 1"),
    ],
)
def test_arguments_of_perplexity(model: PreTrainedModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model, random_tokens(20), **options)


def test_tokens_of_perplexity(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="there are 1 tokens; expected at least 2"):
        perplexity(model, [3], context=8)
    with pytest.raises(ValueError, match=r"shape \(2, 2\); expected one dimension"):
        perplexity(model, [[1, 2], [3, 4]], context=8)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="token ids go from 1 to 900; the vocabulary has 258"):
        perplexity(model, [1, 900], context=8)


def test_whole_text_file_is_one_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    text = " = Title = \n \n Some text été .\n \n\n More of it\n"
    path = tmp_path / "wiki.txt"
    path.write_text(text)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    expected = perplexity(model, ids, context=16, num_bytes=len(text.encode()))
    assert evaluate_perplexity(model, tokenizer, str(path), context=16) == expected
    with_bos = make_tokenizer(add_bos=True)  # which the stream must not contain
    assert evaluate_perplexity(model, with_bos, str(path), context=16, prefix_bos=False) == expected
    prefixed = perplexity(model, ids, context=16, num_bytes=len(text.encode()), prefix_token_id=0)
    assert evaluate_perplexity(model, tokenizer, str(path), context=16, prefix_bos=True) == prefixed
    assert evaluate_perplexity(model, with_bos, str(path), context=16) == prefixed
    first = evaluate_perplexity(model, tokenizer, str(path), context=16, max_tokens=20)
    assert first == perplexity(
        model, ids[:20], context=16, num_bytes=len(tokenizer.decode(ids[:20]).encode())
    )


def test_documents_of_a_part_are_joined(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a\n\n\nb\n\nc")  # of which "a" and "c" are held out
    ids = tokenizer("a\n\nc", add_special_tokens=False).input_ids
    result = evaluate_perplexity(model, tokenizer, str(path), "held-out", context=8)
    assert result == perplexity(model, ids, context=8, num_bytes=4)


def test_tokenizer_must_belong_to_the_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    small = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 100}))
    with pytest.raises(ValueError, match="ids up to 257, but the model's vocabulary has 100"):
        evaluate_perplexity(small, tokenizer, "default")
    with pytest.raises(ValueError, match="ids up to 257, but the model's vocabulary has 100"):
        multiple_choice.score_items(small, tokenizer, [])


def test_prefix_needs_a_bos_token(model: PreTrainedModel) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        evaluate_perplexity(model, tokenizer, "default", prefix_bos=True)


# Prompts

ROWS: dict[str, tuple[Row, list[tuple[str, str]], tuple[int, ...], int]] = {
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A  man [header] How to bake [title] bread.",
            "ctx_b": "he then",
            "endings": [" eats [step] it. ", "runs", "sings", "sleeps"],
            "label": "2",
        },
        [
            ("Baking: A man How to bake. bread. He then", f" {e}")
            for e in ("eats it.", "runs", "sings", "sleeps")
        ],
        (8, 4, 5, 6),
        2,
    ),
    "piqa": (
        {"goal": "open a jar", "sol1": "twist", "sol2": "kick é", "label": 1},
        [("Question: open a jar\nAnswer:", " twist"), ("Question: open a jar\nAnswer:", " kick é")],
        (5, 6),
        1,
    ),
    "arc_easy": (
        {"question": "Q?", "choices": {"text": ["x", "yy", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        [("Question: Q?\nAnswer:", f" {text}") for text in ("x", "yy", "z")],
        (1, 2, 1),
        1,
    ),
    "arc_challenge": (
        {"question": "Q?", "choices": {"text": ["x", "yy", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        [("Question: Q?\nAnswer:", f" {text}") for text in ("x", "yy", "z")],
        (1, 2, 1),
        2,
    ),
    "winogrande": (
        {"sentence": "Ann met Bea so _ was glad.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        [("Ann met Bea so Ann", " was glad."), ("Ann met Bea so Bea", " was glad.")],
        (9, 9),
        1,
    ),
    "openbookqa": (
        {
            "question_stem": "The sun is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": " A",
        },
        [("The sun is", " hot"), ("The sun is", " cold")],
        (3, 4),
        0,
    ),
    "social_iqa": (
        {"context": "C.", "question": "Why?", "answerA": "a", "answerB": "bb", "answerC": "c", "label": "3"},
        [("Q: C. Why?\nA:", " a"), ("Q: C. Why?\nA:", " bb"), ("Q: C. Why?\nA:", " c")],
        (1, 2, 1),
        2,
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        [("P.\nQuestion: is it?\nAnswer:", " no"), ("P.\nQuestion: is it?\nAnswer:", " yes")],
        (2, 3),
        1,
    ),
    "sciq": (
        {
            "support": "\n Facts. ",
            "question": "Q?",
            "distractor1": "a",
            "distractor2": "b",
            "distractor3": "c",
            "correct_answer": "dd",
        },
        [("Facts. \nQuestion: Q?\nAnswer:", f" {text}") for text in ("a", "b", "c", "dd")],
        (1, 1, 1, 2),
        3,
    ),
    "copa": (
        {
            "premise": "It rained. ",
            "choice1": "I slept.",
            "choice2": "He ran.",
            "question": "cause",
            "label": 0,
        },
        [("It rained because", "  i slept."), ("It rained because", "  he ran.")],
        (9, 8),
        0,
    ),
    "commonsense_qa": (
        {
            "question": " Where? ",
            "choices": {"label": list("ABCDE"), "text": ["v", "w", "x", "y", "z"]},
            "answerKey": "D",
        },
        [("Question: Where?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:", f" {letter}") for letter in "ABCDE"],
        (1,) * 5,
        3,
    ),
    "mmlu": (
        {
            "question": " Q? ",
            "subject": "high_school_physics",
            "choices": ["w", " x", "y", "z"],
            "answer": 2,
            "examples": [{"question": "E?", "choices": ["a", "b", "c", "d"], "answer": 1}],
        },
        [
            (
                "The following are multiple choice questions (with answers) about high school physics.\n\n"
                "E?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\nQ?\nA. w\nB.  x\nC. y\nD. z\nAnswer:",
                f" {letter}",
            )
            for letter in "ABCD"
        ],
        (1,) * 4,
        2,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts(name: str) -> None:
    row, pairs, lengths, gold = ROWS[name]
    item = TASKS[name].item(row)
    assert list(zip(item.contexts, item.continuations, strict=True)) == pairs
    assert item.lengths == lengths
    assert item.gold == gold


def test_copa_effect() -> None:
    row = {**ROWS["copa"][0], "question": "effect"}
    assert TASKS["copa"].item(row).contexts == ("It rained therefore",) * 2


def test_default_tasks_are_not_in_the_calibration_corpus() -> None:
    assert len(COMMONSENSE_TASKS) == 7
    assert {task.name for task in TASKS.values() if task.in_default_corpus} == {"boolq", "sciq"}
    assert not any(TASKS[name].in_default_corpus for name in COMMONSENSE_TASKS)


# Scores

ITEMS = [TASKS[name].item(row) for name, (row, *_) in ROWS.items()]


def naive_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, item: Item) -> list[float]:
    scores = []
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        stripped = context.rstrip()
        whole = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(stripped))
        scores.append(
            sum(naive_log_probability(model, whole[:i], whole[i]) for i in range(start, len(whole)))
        )
    return scores


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_equal_a_loop_over_tokens(model: PreTrainedModel, batch_size: int, add_bos: bool) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    items = [
        *ITEMS,
        Item(("ends with space  ", "other"), ("x", "Ay"), (1, 2), 0),
        Item(("merge\n", "merge"), ("Ab", "\nAb"), (2, 3), 0),
    ]
    scores = multiple_choice.score_items(model, tokenizer, items, batch_size=batch_size)
    for item, seen in zip(items, scores, strict=True):
        assert seen == pytest.approx(naive_scores(model, tokenizer, item), abs=1e-4)


def test_scores_do_not_depend_on_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    one, eight = (
        [s for scores in multiple_choice.score_items(model, tokenizer, ITEMS, batch_size=b) for s in scores]
        for b in (1, 8)
    )
    assert one == pytest.approx(eight, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("task", ["commonsense_qa", "hellaswag", "winogrande"])
def test_choices_read_once_what_they_begin_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    item = TASKS[task].item(ROWS[task][0])
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].shape))
    multiple_choice.score_items(model, tokenizer, [item])
    hook.remove()
    pairs = zip(item.contexts, item.continuations, strict=True)
    ids = [tokenizer.encode(context + continuation)[:-1] for context, continuation in pairs]
    beginnings = {tuple(sequence[: i + 1]) for sequence in ids for i in range(len(sequence))}
    assert read[-1] == (1, len(beginnings))
    assert multiple_choice.tokens_read(tokenizer, [item]) == len(beginnings)


def test_tasks_are_read_together(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiple_choice, "load_benchmark", lambda name: [ROWS[name][0]] * 2)
    passes = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    evaluate_multiple_choice(model, tokenizer, ["arc_easy", "arc_challenge"])
    hook.remove()
    assert len(passes) == 5  # four of a few tokens look at the model


def test_long_contexts_are_cut_on_the_left(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "abcdefgh" * 40
    item = Item((text, text), (" x", " y"), (1, 1), 0)
    ((first, _),) = multiple_choice.score_items(model, tokenizer, [item])
    ids = tokenizer.encode(text + " x")[-257:]
    expected = sum(naive_log_probability(model, ids[:i], ids[i]) for i in (255, 256))
    assert first == pytest.approx(expected, abs=1e-4)


def test_continuation_without_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="the continuation '' has 0 tokens after 'text'; expected 1 to 256"):
        multiple_choice.score_items(model, tokenizer, [Item(("text",), ("",), (0,), 0)])


def test_accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: [ROWS[name][0]] * 5 for name in ("arc_easy", "winogrande")}
    scores = {
        3: [[-3.0, -1.0, -2.0], [-1.0, -3.0, -2.0], [-2.0, -3.0, -1.0], [-1.0, -1.5, -2.0]],  # gold is 1
        2: [[-2.0, -1.0], [-1.0, -2.0], [-2.0, -2.0], [-2.0, -1.0]],  # gold is 1; the first of equals wins
    }
    monkeypatch.setattr(multiple_choice, "load_benchmark", rows.__getitem__)
    monkeypatch.setattr(multiple_choice, "score_items", lambda m, t, items, batch_size: scores[3] + scores[2])
    result = evaluate_multiple_choice(model, tokenizer, ["arc_easy", "winogrande"], limit=4)
    arc, winogrande = result.tasks
    assert (arc.task, arc.items, arc.accuracy, arc.chance) == ("arc_easy", 4, 0.25, pytest.approx(1 / 3))
    assert arc.correct == (True, False, False, False)
    assert arc.correct_norm == (True, False, False, True)  # lengths 1, 2, 1
    assert arc.accuracy_norm == 0.5
    assert arc.accuracy_stderr == pytest.approx(np.std([1, 0, 0, 0], ddof=1) / 2)
    assert (winogrande.correct, winogrande.accuracy) == ((True, False, False, True), 0.5)
    assert (winogrande.accuracy_norm, winogrande.correct_norm) == (None, None)
    assert result.mean_accuracy == pytest.approx(0.375)
    assert result.mean_accuracy_norm == pytest.approx(0.5)
    errors = [arc.accuracy_stderr, winogrande.accuracy_stderr]
    assert result.mean_accuracy_stderr == pytest.approx(np.hypot(*errors) / 2)
    assert result.limit == 4
    assert json.loads(json.dumps(result.to_dict()))["tasks"][0]["correct"] == [True, False, False, False]


def test_halves_of_the_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"goal": "g", "sol1": f"{'abcdefg'[i]}", "sol2": "xyz", "label": i % 3 % 2} for i in range(7)]
    monkeypatch.setattr(multiple_choice, "load_benchmark", lambda name: rows)
    every, even, odd = (
        evaluate_multiple_choice(model, tokenizer, ["piqa"], questions=questions).tasks[0].correct
        for questions in ("all", "even", "odd")
    )
    assert (even, odd) == (every[0::2], every[1::2])
    result = evaluate_multiple_choice(model, tokenizer, ["piqa"], questions="odd", limit=2)
    assert (result.tasks[0].correct, result.questions, result.limit) == (odd[:2], "odd", 2)
    monkeypatch.setattr(multiple_choice, "load_benchmark", lambda name: rows[:1])
    with pytest.raises(ValueError, match="piqa has no odd questions"):
        evaluate_multiple_choice(model, tokenizer, ["piqa"], questions="odd")
    with pytest.raises(ValueError, match="questions is 'prime'; expected one of all, even, odd"):
        evaluate_multiple_choice(model, tokenizer, ["piqa"], questions="prime")  # type: ignore[arg-type]


def test_questions_of_mmlu(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(split: str) -> list[Row]:
        return [
            {
                "question": f"{split} {subject} {i}?",
                "subject": subject,
                "choices": list("wxyz"),
                "answer": i % 4,
            }
            for subject in ("law", "art")
            for i in range(5)
        ]

    monkeypatch.setattr(multiple_choice, "load_mmlu", load)
    items = multiple_choice.load_items("mmlu", limit=2, questions="odd", num_fewshot=3)  # of each subject
    assert [item.gold for item in items] == [1, 3] * 2
    for item, subject in zip(items, ("law", "law", "art", "art"), strict=True):
        text = item.contexts[0]
        assert [text.count(f"dev {subject} {i}?") for i in range(5)] == [1, 1, 1, 0, 0]
        assert text.count(f"test {subject} {item.gold}?") == 1
        assert text.count("?") == 4
    assert len(multiple_choice.load_items("mmlu")) == 10
    for name, shots, most in (("mmlu", 6, 5), ("piqa", 1, 0)):
        with pytest.raises(ValueError, match=f"num_fewshot is {shots}; expected 0 to {most} for {name}"):
            multiple_choice.load_items(name, num_fewshot=shots)


def test_evaluation_end_to_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiple_choice, "load_benchmark", lambda name: [ROWS[name][0]] * 3)
    result = evaluate_multiple_choice(model, tokenizer, limit=1)
    assert [task.task for task in result.tasks] == list(COMMONSENSE_TASKS)
    assert all(task.items == 1 and task.accuracy_stderr is None for task in result.tasks)
    assert result.mean_accuracy_stderr is None
    for task in result.tasks:
        item = TASKS[task.task].item(ROWS[task.task][0])
        assert task.accuracy == (np.argmax(naive_scores(model, tokenizer, item)) == item.gold)


def test_empty_choice_is_never_best() -> None:
    assert multiple_choice._per_character([-1.0, -4.0], [0, 2]) == [-math.inf, -2.0]


def test_paired_difference() -> None:
    first, second = (True, True, False, True), (True, False, False, False)
    difference, error = paired_difference(first, second)
    assert difference == 0.5
    assert error == pytest.approx(np.std([0, 1, 0, 1], ddof=1) / 2)
    with pytest.raises(ValueError, match="4 and 3 questions were answered"):
        paired_difference(first, second[:3])


def test_arguments_of_multiple_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ValueError, match=r"unknown tasks \['other'\]; expected at least one of hellaswag, piqa"
    ):
        evaluate_multiple_choice(model, tokenizer, ["piqa", "other"])
    with pytest.raises(ValueError, match="expected at least one of"):
        evaluate_multiple_choice(model, tokenizer, [])
    with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
        evaluate_multiple_choice(model, tokenizer, limit=0)
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        multiple_choice.score_items(model, tokenizer, [], batch_size=0)
