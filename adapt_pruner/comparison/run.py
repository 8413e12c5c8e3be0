"""The `compare` command: checks everything, then row by row in processes of their own, then the page."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.assets import resolve_model
from adapt_pruner.calibration import calibration_tokens, with_prefix
from adapt_pruner.checkpoint import Checkpoint, open_checkpoint, write_json, write_text
from adapt_pruner.comparison import row_process
from adapt_pruner.comparison.estimate import Estimate, Workload, estimate
from adapt_pruner.comparison.page import read_comparison, write_page
from adapt_pruner.comparison.paths import shown_models, shown_path, shown_setting
from adapt_pruner.comparison.rows import Failure, Row, find_baseline, requested_rows
from adapt_pruner.comparison.table import table
from adapt_pruner.config import CompareConfig, split_names
from adapt_pruner.data import check_vocabulary, prefix_token
from adapt_pruner.engines.device import resolve_device
from adapt_pruner.evaluation.multiple_choice import load_items
from adapt_pruner.evaluation.perplexity import text_tokens
from adapt_pruner.families import layer_widths
from adapt_pruner.run import RunDirectory

_log = logging.getLogger(__name__)

# What an added call may have otherwise; the rows hold all the rest.
_FREE_TO_CHANGE = (
    "models", "methods", "targets", "tasks", "baseline", "keep_models", "output", "page", "dry_run", "resume"
)  # fmt: skip


@dataclass(frozen=True)
class ComparisonResult:
    """What `compare` found.

    Attributes:
        output: directory of results.md, results.csv and results.png; None of a dry run.
        rows: as in results.csv, but for models by the paths they were given as; none of a dry run.
        estimates: of a dry run, minutes of each row.
        incomplete: some row has broken, and another try with `resume` may end otherwise.
    """

    output: Path | None
    rows: tuple[dict[str, Any], ...]
    estimates: tuple[Estimate, ...] = ()
    incomplete: bool = False

    def to_dict(self) -> dict[str, Any]:
        if self.output is not None:
            return {"output": str(self.output), "rows": list(self.rows)}
        rows = [dataclasses.asdict(e) | {"minutes": e.minutes} for e in self.estimates]
        return {"rows": rows, "minutes": sum(e.minutes for e in self.estimates)}


def compare(config: CompareConfig) -> ComparisonResult:
    """Prunes every model by every method to every target, evaluates the results and writes a page.

    A comparison can be killed at any moment; with `resume` it goes on behind the last finished step of a row.
    A row that fails says why, and the others go on.

    Raises:
        ValueError: a setting, a model or a text that does not fit; all are checked before the first row.
        FileExistsError: the output directory is not empty.
        AssetError: a model, text or benchmark could not be fetched.
    """
    rows = requested_rows(config)
    earlier, info = _earlier(config)
    baseline = find_baseline(config, [row.method for row in earlier], info.get("baseline"))
    if config.dry_run:
        return ComparisonResult(None, (), estimate(list(rows.values()), _check_inputs(config, rows)))
    output = Path(config.output)
    RunDirectory(output, free_to_change=_FREE_TO_CHANGE).check(config, resume=config.resume)
    rows = {name: _with_earlier(row, _file(output, name)) for name, row in rows.items()}
    if not all(row.settled for row in rows.values()):
        _check_inputs(config, rows)
    page = Path(config.page) if config.page else None
    if page:
        if page.is_dir():
            raise ValueError(f"page is {config.page!r}, a directory: expected a file to write")
        page.parent.mkdir(parents=True, exist_ok=True)  # if this fails, then before the first row
    directory = RunDirectory.open(output, config, resume=config.resume, free_to_change=_FREE_TO_CHANGE)
    try:
        _record_call(config, output, list(rows), baseline)
        # Again, now that nobody else writes to them.
        rows = {name: _with_earlier(row, _file(output, name)) for name, row in rows.items()}
        for number, (name, row) in enumerate(rows.items(), 1):
            path = _file(output, name)
            if not row.settled:
                _log.info("row %d of %d: %s", number, len(rows), row.title)
                directory.log("row", name=name)
                started = time.perf_counter()
                _run(row, path)
                minutes = (time.perf_counter() - started) / 60
                failure = Row.load(path).failure
                reason = f"failed: {failure.reason}" if failure else "done"
                _log.info("row %d of %d: %s after %.1f minutes", number, len(rows), reason, minutes)
                write_page(output)
            if not config.keep_models and not Row.load(path).missing:
                row_process.delete_model(row_process.run_of(path))
        write_page(output, page)
    finally:
        directory.close()
    done, info = read_comparison(output)
    incomplete = any(not row.settled for row in done)
    return ComparisonResult(output, tuple(table(done, info)), incomplete=incomplete)


def _file(output: Path, name: str) -> Path:
    return output / "rows" / f"{name}.json"


def _with_earlier(row: Row, path: Path) -> Row:
    return row.joined(Row.load(path)) if path.exists() else row


def _run(row: Row, path: Path) -> None:
    """Works on a row in a process of its own, which ends when this one does."""
    path.parent.mkdir(exist_ok=True)
    row.save(path)
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {row_process.__name__} import main; main()", str(path)],
        env={**os.environ, "PYTHONPATH": search},
        stdin=subprocess.PIPE,
        stdout=2,  # nothing of it belongs to the result on stdout
    )
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
    row = Row.load(path)
    if status and not row.failure:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        failure = Failure((row.missing or ["end"])[0], f"its process {how}", retry=True)
        dataclasses.replace(row, failure=failure).save(path)


def _earlier(config: CompareConfig) -> tuple[list[Row], dict[str, Any]]:
    """Rows that are in the output directory already, and what they share."""
    output = Path(config.output)
    if not config.output or not (output / "comparison.json").exists():
        return [], {"calls": [], "rows": []}
    return read_comparison(output)


def _record_call(config: CompareConfig, output: Path, names: list[str], baseline: str) -> None:
    """Everything of the page that no row holds."""
    _, before = _earlier(config)
    settings = dataclasses.asdict(config)
    models = shown_models(split_names(config.models), before.get("models", {}))
    call = _command(config, models)
    # The same call without a page did nothing that this one does not.
    lesser = _command(dataclasses.replace(config, page=None), models) if config.page else None
    info = {
        "calls": list(dict.fromkeys([*(c for c in before["calls"] if c != lesser), call])),
        "rows": list(dict.fromkeys([*before["rows"], *names])),
        "models": models,
        "baseline": baseline,
        "settings": {
            name: shown_setting(value) if isinstance(value, str) else value
            for name, value in settings.items()
            if name not in _FREE_TO_CHANGE
        },
    }
    write_json(output / "comparison.json", info)
    write_text(output / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def _command(config: CompareConfig, models: Mapping[str, str]) -> str:
    """The call on the command line, the same whether it is resumed or not, with paths as pages show them."""
    words = ["adapt-pruner", "compare", ",".join(models[name] for name in split_names(config.models))]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("models", "resume", "dry_run", "keep_models") or value == field.default:
            continue
        words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [shown_path(str(value))])]
    return shlex.join(words)


def _check_inputs(config: CompareConfig, rows: dict[str, Row]) -> dict[str, Workload]:
    """That texts and questions are there and fit the models; what there is to read of each model.

    Raises:
        ValueError, AssetError: as for `compare`.
    """
    from transformers import AutoTokenizer

    resolve_device(config.device)
    items = {
        name: load_items(name, limit=config.limit, questions=config.questions)
        for name in dict.fromkeys(name for row in rows.values() for name in row.tasks)
    }
    workloads = {}
    for model in dict.fromkeys(row.model for row in rows.values()):
        checkpoint = open_checkpoint(resolve_model(model))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        check_vocabulary(tokenizer, checkpoint.config["vocab_size"])
        _check_calibration(rows, model, checkpoint)
        positions = checkpoint.config.get("max_position_embeddings")
        for name in ("latency_tokens", *(["context"] if config.data != "none" else [])):
            if positions is not None and getattr(config, name) > positions:
                raise ValueError(
                    f"{name} is {getattr(config, name)}, but {model} has only {positions} positions"
                )
        tokens = 0
        if config.data != "none":
            part = "held-out" if config.data == "default" else None
            tokens = len(text_tokens(tokenizer, config.data, part, column=config.column, split=config.split))
            if tokens < 2:
                raise ValueError(f"data {config.data!r} has {tokens} tokens for {model}: expected at least 2")
            if config.context - (prefix_token(tokenizer, None) is not None) < 2:
                raise ValueError(f"context is {config.context}: expected at least 2 tokens of text")
        workloads[model] = Workload.of(config, tokenizer, tokens, items)
    return workloads


def _check_calibration(rows: dict[str, Row], model: str, checkpoint: Checkpoint) -> None:
    num_layers = len(layer_widths(checkpoint.config))
    configs = [
        row.resolved(num_layers)[0] for row in rows.values() if row.model == model and row.prune is not None
    ]
    drawn = {(c.num_sequences, c.sequence_length, c.pack, c.prefix_bos): c for c in configs}
    for config in drawn.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each run says it again
            calibration_tokens(with_prefix(config, checkpoint), checkpoint)
