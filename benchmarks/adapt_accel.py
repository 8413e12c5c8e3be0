"""Whether interleaving pruning with training helps: four ways to spend the same recovery tokens, and a page.

    python benchmarks/adapt_accel.py [--recipe recipes/smollm2-135m-to-70.yaml] [--output runs/adapt-accel]
        [--limit 200] [--arms once,interleaved] [--page docs/results-adapt-accel.md]

Every arm is a run of `accel` with the settings of the recipe but for what the arm is about; an arm that was
killed goes on where it was, and one that is finished is not run again. The page comes once all are finished.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner import AccelConfig, EvaluateConfig, accel, evaluate, prune
from adapt_pruner.checkpoint import write_json, write_text
from adapt_pruner.comparison.page import environment_line, markdown_table

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "once": ("pruned at once, then trained", {"stages": 1}),
    "interleaved": ("pruned and trained in stages", {"optimizer_state": "reset"}),
    "distilled": (
        "in stages, with the unpruned model as teacher",
        {"optimizer_state": "reset", "teacher": True},
    ),
    "moments": ("in stages, with the moments of units that stay", {"optimizer_state": "keep"}),
}


def arm_config(recipe: dict[str, Any], arm: str, output: Path) -> AccelConfig:
    """The recipe with what the arm changes."""
    changes = dict(ARMS[arm][1])
    recover = dict(recipe["recover"])
    if changes.pop("teacher", False):
        recover["teacher"] = recipe["model"]
    return AccelConfig(
        **{**recipe, **changes, "recover": recover, "output": str(output / arm), "resume": True}
    )


def measure(model: Path | str, file: Path, limit: int) -> dict[str, Any]:
    """Accuracy of the seven tasks, kept in a file."""
    if not file.exists():
        result = evaluate(EvaluateConfig(model=str(model), data="none", tasks="commonsense", limit=limit))
        assert result.multiple_choice is not None
        write_json(file, {"limit": limit, **result.multiple_choice.to_dict()})
    found = json.loads(file.read_text())
    if found["limit"] != limit:
        raise ValueError(f"{file} has {found['limit']} questions of each task, expected {limit}: remove it")
    return found


def run_arm(recipe: dict[str, Any], arm: str, output: Path, limit: int) -> None:
    """One arm; "pruned" is what "once" begins with, and the unpruned model."""
    if arm != "pruned":
        measure(accel(arm_config(recipe, arm, output)).model_directory, output / f"{arm}.json", limit)
        return
    config = arm_config(recipe, "once", output)
    settings = config.pruning(1, config.target, config.model, str(output / "pruned"), True)
    measure(prune(settings).model_directory, output / "pruned.json", limit)
    measure(config.model, output / "dense.json", limit)


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Tokens that all stages have trained on so far, and what was logged there."""
    tokens, values, before = [], [], 0
    for log in sorted(run.glob("stages/*/recover/log.jsonl")):
        settings = yaml.safe_load(log.with_name("config.yaml").read_text())
        of_step = settings["batch_size"] * settings["sequence_length"]
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        logged = {
            entry["step"]: entry[key] for entry in entries if key in entry
        }  # the last where one was redone
        tokens += [before + step * of_step for step in logged]
        values += logged.values()
        before += of_step * max(entry.get("step", 0) for entry in entries)
    return tokens, values


def plot(output: Path, file: Path) -> None:
    """Training loss over tokens, and held-out loss behind each stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out = figure.subplots(1, 2)
    for number, arm in enumerate(ARMS):
        key = "cross_entropy" if arm == "distilled" else "loss"  # of the text alone, as that of the others
        training.plot(*curve(output / arm, key), color=f"C{number}", label=arm, lw=1)
        held_out.plot(*curve(output / arm, "eval_loss"), "o-", color=f"C{number}", ms=4, label=arm)
    for axis, name in ((training, "training loss"), (held_out, "held-out loss behind each stage")):
        axis.set_xlabel("recovery tokens")
        axis.set_ylabel(f"{name} (nats per token)")
    training.legend(frameon=False)
    figure.savefig(file, dpi=110)


def lines_of(output: Path) -> list[dict[str, Any]]:
    """A line for the unpruned and the untrained model and for each arm."""
    untrained = json.loads((output / "once/stages/01/prune/metrics.json").read_text())
    loss = json.loads((output / "once/metrics.json").read_text())["stages"][0]["held_out_loss_before"]
    lines: list[dict[str, Any]] = [
        {"arm": "dense", "parameters": untrained["parameters_before"]},
        {"arm": "pruned", "parameters": untrained["parameters_after"], "held_out_loss": loss},
    ]
    for arm in ARMS:
        made = json.loads((output / arm / "metrics.json").read_text())
        stages = made["stages"]
        spans = [json.loads(p.read_text()) for p in sorted((output / arm).glob("stages/*/*/metrics.json"))]
        lines.append(
            {
                "arm": arm,
                "parameters": made["parameters_after"],
                "stages": len(stages),
                "tokens": made["tokens"],
                "held_out_loss": made["held_out_loss"],
                "pruning_seconds": sum(stage["pruning_seconds"] for stage in stages),
                "training_seconds": sum(stage["tokens"] / stage["tokens_per_second"] for stage in stages),
                "peak_memory_bytes": max(span["peak_memory_bytes"] for span in spans),
            }
        )
    for line in lines:
        found = json.loads((output / f"{line['arm']}.json").read_text())
        # Normalised by length where lm-eval does so, as in `compare`.
        line |= {task["task"]: task.get("accuracy_norm") or task["accuracy"] for task in found["tasks"]}
        line |= {"mean": found["mean_accuracy_norm"], "mean_stderr": found["mean_accuracy_norm_stderr"]}
    return lines


def write_page(recipe: dict[str, Any], output: Path, page: Path, limit: int, command: str) -> None:
    """The page, and beside it the lines as CSV and the curves."""
    lines = lines_of(output)
    plot(output, page.with_suffix(".png"))
    columns = list(dict.fromkeys(key for line in lines for key in line))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(page.with_suffix(".csv"), table.getvalue())
    shown = {
        "arm": lambda line: line["arm"],
        "parameters": lambda line: f"{line['parameters']:,}",
        "held-out perplexity": lambda line: f"{math.exp(line['held_out_loss']):.2f}",
        "mean accuracy": lambda line: f"{line['mean']:.4f} ± {line['mean_stderr']:.4f}",
        "pruning s": lambda line: f"{line['pruning_seconds']:.0f}",
        "training s": lambda line: f"{line['training_seconds']:.0f}",
        "peak GiB": lambda line: f"{line['peak_memory_bytes'] / 2**30:.2f}",
    }

    def cell(line: dict[str, Any], name: str) -> str:
        try:
            return shown[name](line)
        except KeyError:  # of a model that was not trained
            return "-"

    what = "".join(f"- `{arm}`: {text}\n" for arm, (text, _) in ARMS.items())
    held_out = {line["arm"]: line.get("held_out_loss") for line in lines}
    gains = {arm: held_out[arm] - held_out["once"] for arm in ARMS if arm != "once"}
    best = min(gains, key=lambda arm: gains[arm])
    helps = "helps" if gains[best] < 0 else "does not help"
    listed = ", ".join(f"`{arm}` {gain:+.3f}" for arm, gain in gains.items())
    tokens = recipe["recover"]["tokens"]
    rows = [[cell(line, name) for name in shown] for line in lines]
    text = f"""# Adapt-Accel: does interleaving help?

{recipe["model"]} pruned to {recipe["target"]} of its parameters, and {tokens} tokens of recovery training,
spent in four ways:

{what}
{markdown_table(list(shown), rows)}
**Interleaving {helps} here**: the best of the three in stages, `{best}`, has a held-out loss
{gains[best]:+.3f} nats per token from that of `once` (all three: {listed}; below 0 is better).
With {tokens} tokens the last stage, which alone has the final widths, gets fewer steps than `once` in all.

Held-out text is that part of the recovery text, apart from what is trained on.
Accuracy is the mean of the seven commonsense tasks, {limit} questions of each, normalised by length where
lm-eval does so; ± is a standard error. Seconds and peaks of memory are those of the machine below.

![Loss over tokens]({page.with_suffix(".png").name})

## How it was made

```sh
{command}
```

The recipe:

```yaml
{yaml.safe_dump(recipe, sort_keys=False)}```

{environment_line(json.loads((output / "once/environment.json").read_text()))}"""
    write_text(page, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2-135m-to-70.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/adapt-accel"))
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--arms", default=",".join(["pruned", *ARMS]), help="separated by commas")
    parser.add_argument("--page", type=Path, default=Path("docs/results-adapt-accel.md"))
    options = parser.parse_args()
    recipe = yaml.safe_load(options.recipe.read_text())
    arms = options.arms.split(",")
    if unknown := sorted(set(arms) - {"pruned", *ARMS}):
        parser.error(f"arms are {unknown}, expected some of pruned, {', '.join(ARMS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    if len(arms) == 1:
        run_arm(recipe, arms[0], options.output, options.limit)
        return
    settings = [f"--{name}={getattr(options, name)}" for name in ("recipe", "output", "limit")]
    for arm in arms:  # in a process of its own, whose peak of memory is the arm's
        subprocess.run([sys.executable, __file__, f"--arms={arm}", *settings], check=True)
    command = " ".join(["python benchmarks/adapt_accel.py", *settings, f"--page={options.page}"])
    write_page(recipe, options.output, options.page, options.limit, command)


if __name__ == "__main__":
    main()
