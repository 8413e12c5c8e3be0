"""The same questions through lm-eval, by its own prompts, and through ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt_pruner.assets import load_benchmark, load_mmlu, resolve_model
from adapt_pruner.evaluation import COMMONSENSE_TASKS, evaluate_multiple_choice, multiple_choice

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.real_model

ITEMS = 10
FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
}
SUBJECTS = ("abstract_algebra", "global_facts")  # short ones, in the order of their names
MMLU_ITEMS = 2


def local_task(
    directory: Path, name: str, file: str, splits: dict[str, list[dict]], **settings: object
) -> str:
    """A YAML file with lm-eval's own task, which reads its rows from here."""
    data = {}
    for split, rows in splits.items():
        data[split] = str(directory / f"{name}_{split}.jsonl")
        Path(data[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / file),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(own | settings))
    return str(path)


def test_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    whole = {"training_split": None, "validation_split": "validation", "test_split": None}
    files = [
        local_task(tmp_path, name, FILES[name], {"validation": load_benchmark(name)[:ITEMS]}, **whole)
        for name in COMMONSENSE_TASKS
    ]
    for subject in SUBJECTS:
        splits = {
            split: [row for row in load_mmlu(split) if row["subject"] == subject] for split in ("dev", "test")
        }
        splits["test"] = splits["test"][:MMLU_ITEMS]
        stock = f"mmlu/default/mmlu_{subject}.yaml"
        files.append(local_task(tmp_path, subject, stock, splits, num_fewshot=5, tag=None))
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=files,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["samples"]
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found.items()}

    scores: list[list[float]] = []
    score_items = multiple_choice.score_items

    def record(*args: Any, **options: Any) -> list[list[float]]:
        scores.extend(seen := score_items(*args, **options))
        return seen

    monkeypatch.setattr(multiple_choice, "score_items", record)
    ours = evaluate_multiple_choice(model, tokenizer, limit=ITEMS).tasks
    few = {
        split: [row for row in load_mmlu(split) if row["subject"] in SUBJECTS] for split in ("dev", "test")
    }
    monkeypatch.setattr(multiple_choice, "load_mmlu", few.__getitem__)
    ours += evaluate_multiple_choice(model, tokenizer, ["mmlu"], limit=MMLU_ITEMS, num_fewshot=5).tasks

    theirs = {name: samples[f"local_{name}"] for name in COMMONSENSE_TASKS}
    theirs["mmlu"] = [sample for subject in SUBJECTS for sample in samples[f"local_{subject}"]]
    assert [len(rows) for rows in theirs.values()] == [ITEMS] * 7 + [MMLU_ITEMS * 2]
    flat = [sample for rows in theirs.values() for sample in rows]
    for seen, sample in zip(scores, flat, strict=True):
        assert seen == pytest.approx([response[0] for response in sample["filtered_resps"]], abs=1e-3)
    for result, rows in zip(ours, theirs.values(), strict=True):
        assert list(result.correct) == [row["acc"] == 1 for row in rows]
        if result.correct_norm is not None:
            assert list(result.correct_norm) == [row["acc_norm"] == 1 for row in rows]
