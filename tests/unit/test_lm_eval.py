"""Tasks that go to lm-eval: which do, what is refused before a model is loaded, and a task of a file."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_evaluation import SMALL, make_tokenizer, naive_scores
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner.config import EvaluateConfig
from adapt_pruner.evaluation import COMMONSENSE_TASKS
from adapt_pruner.evaluation.evaluate import evaluate, split_tasks
from adapt_pruner.evaluation.tasks import Item
from adapt_pruner.report.console import show_evaluated


def config(tasks: str, **options: object) -> EvaluateConfig:
    return EvaluateConfig("missing", data="none", tasks=tasks, **options)


@pytest.mark.parametrize(
    ("tasks", "num_fewshot", "built_in", "foreign"),
    [
        ("commonsense,piqa", None, COMMONSENSE_TASKS, ()),
        ("piqa,truthfulqa_mc2,mmlu", 0, ("piqa", "mmlu"), ("truthfulqa_mc2",)),
        ("piqa,mmlu,gsm8k", 5, ("mmlu",), ("piqa", "gsm8k")),
        ("mmlu", 6, (), ("mmlu",)),
    ],
)
def test_who_asks(tasks: str, num_fewshot: int | None, built_in: tuple, foreign: tuple) -> None:
    assert split_tasks(config(tasks, num_fewshot=num_fewshot)) == (built_in, foreign)


def test_lm_eval_asks_all_questions() -> None:
    with pytest.raises(ValueError, match=r"questions is 'odd', but \['piqa'\] with 2 examples go to lm-eval"):
        evaluate(config("piqa", num_fewshot=2, questions="odd"))


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(
        ValueError, match=r"\['gsm8k'\] need lm-eval, .* pip install 'adapt_pruner\[lm-eval\]'"
    ):
        evaluate(config("gsm8k,piqa"))  # of a model that is not there, which nobody noticed


def test_unknown_names() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match=r"unknown tasks \['no_such_task', 'none.yaml'\]: neither built in"):
        evaluate(config("no_such_task,arc_easy,none.yaml", num_fewshot=1))


def test_a_task_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"question": f"{q} is", "choices": ["a b", "c", "dd"], "answer": i % 3} for i, q in enumerate("pqrst")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "task.yaml"
    task.write_text(f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
""")
    output = tmp_path / "result.json"
    result = evaluate(
        EvaluateConfig(
            str(tmp_path / "model"), data="none", tasks=str(task), limit=4, num_fewshot=1, device="cpu",
            output=str(output),
        )
    )  # fmt: skip
    (own,) = result.lm_eval
    assert (own.task, own.items, own.num_fewshot) == ("own", 4, 1)
    right = []
    for i, row in enumerate(rows[:4]):
        first = rows[i == 0]  # lm-eval leaves out the question itself
        shot = f"{first['question']} {first['choices'][first['answer']]}\n\n"
        contexts = (shot + row["question"],) * 3
        item = Item(contexts, tuple(f" {c}" for c in row["choices"]), (3, 1, 2), row["answer"])
        scores = naive_scores(model, tokenizer, item)
        right.append(scores.index(max(scores)) == item.gold)
    assert own.metrics == {"acc": sum(right) / 4}
    assert own.stderr.keys() == {"acc"}
    assert json.loads(output.read_text())["lm_eval"][0]["metrics"] == own.metrics
    console = Console(width=100, file=io.StringIO())
    show_evaluated(console, result)
    assert "own" in (shown := console.file.getvalue())
    assert f"{own.metrics['acc']:.3f}" in shown
