"""Works on one row in a process of its own, writing its JSON file after every step.

So the peak of memory is that of the row alone, and one that is killed for its memory takes no other with it.
The process ends with the one that started it, whose end of the pipe to stdin is closed then.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapt_pruner.assets import AssetError, resolve_model
from adapt_pruner.comparison.rows import Failure, Row
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.evaluation.evaluate import evaluate_model
from adapt_pruner.inspection import summarize
from adapt_pruner.latency import measure
from adapt_pruner.pruner import prune
from adapt_pruner.run import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("adapt_pruner.comparison")


def run_of(path: Path) -> Path:
    """The run directory of the row in a file."""
    return path.parent.parent / "runs" / path.stem


def work(path: Path) -> None:
    """Does every missing step of the row in a file; what goes wrong is written there too, and not raised."""
    row = Row.load(path)
    if (here := environment()) not in row.environments:
        row = dataclasses.replace(row, environments=(*row.environments, here))
    step = "start"
    try:
        bench = _Bench(row, run_of(path))
        for step in row.missing:
            _log.info("%s: %s", row.title, step)
            started = time.perf_counter()
            result = bench.do(step) | {"wall_seconds": round(time.perf_counter() - started, 3)}
            row = dataclasses.replace(row, results={**row.results, step: result})
            row.save(path)
    except Exception as error:  # whatever it is, it is the row's result
        # A model or a method that does not fit says so by a ValueError, and would again.
        refused = isinstance(error, ValueError)
        if not refused and not isinstance(error, (OSError, AssetError)):
            traceback.print_exc()
        reason = str(error) if refused else f"{type(error).__name__}: {error}"
        dataclasses.replace(row, failure=Failure(step, " ".join(reason.split()), not refused)).save(path)


class _Bench:
    """The models of a row, loaded when they are needed first."""

    def __init__(self, row: Row, run: Path) -> None:
        self._row, self._run = row, run
        self._loaded: dict[str, PreTrainedModel] = {}
        self._base = str(resolve_model(row.model))
        pruned = row.prune is not None
        if pruned and "pruning" in row.results and row.missing and not (run / "model").exists():
            prune(row.pruning(run))  # the model was deleted, and is made again for what is asked in addition
        self._directory = str(run / "model") if pruned else self._base

    def do(self, step: str) -> dict[str, Any]:
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "pruning": lambda: prune(self._row.pruning(self._run)).metrics,
            "size": self._size,
            "perplexity": self._perplexity,
            "speed": self._speed,
        }
        return steps[step]() if step in steps else self._task(step)

    def _model(self, directory: str) -> PreTrainedModel:
        if directory not in self._loaded:
            device, dtype = self._row.evaluate["device"], self._row.evaluate["dtype"]
            self._loaded[directory] = load_model(directory, device=device, dtype=dtype)
        return self._loaded[directory]

    def _size(self) -> dict[str, Any]:
        before, after = summarize(self._base), summarize(self._directory)
        return {
            "parameters_before": before.parameters,
            "parameters": after.parameters,
            "non_embedding_before": before.non_embedding_parameters,
            "non_embedding": after.non_embedding_parameters,
        }

    def _evaluate(self, **changes: Any) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._directory)
        config = self._row.evaluation(self._directory, **changes)
        return evaluate_model(config, self._model(self._directory), tokenizer)

    def _perplexity(self) -> dict[str, Any]:
        perplexity, _ = self._evaluate()
        return dataclasses.asdict(perplexity)

    def _task(self, name: str) -> dict[str, Any]:
        _, multiple_choice = self._evaluate(data="none", column=None, tasks=name)
        return dataclasses.asdict(multiple_choice.tasks[0])

    def _speed(self) -> dict[str, Any]:
        """Tokens per second of forward passes; a pruned model takes turns with the one before pruning."""
        models = [self._model(directory) for directory in dict.fromkeys((self._base, self._directory))]
        generator = torch.Generator().manual_seed(0)
        vocabulary = models[0].config.get_text_config().vocab_size
        inputs = torch.randint(vocabulary, self._row.latency, generator=generator).to(models[0].device)
        seconds = np.median(measure(models, inputs), axis=0)
        before, after = inputs.numel() / seconds[0], inputs.numel() / seconds[-1]
        return {"tokens_per_second_before": round(before, 2), "tokens_per_second": round(after, 2)}


def delete_model(run: Path) -> None:
    """Deletes the pruned model of a run; killed in between, it leaves what the run takes for a left-over."""
    if (run / "model").exists():
        partial = run / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (run / "model").rename(partial)
        shutil.rmtree(partial)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """What the process runs: works on the row in the file that its argument names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="adapt-pruner: %(message)s")
    logging.getLogger("adapt_pruner").setLevel(logging.INFO)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    work(Path(sys.argv[1]))
