"""What the command line prints for people: tables and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from adapt_pruner.bench import BenchResult, Comparison
    from adapt_pruner.comparison import ComparisonResult
    from adapt_pruner.evaluation.evaluate import EvaluationResult
    from adapt_pruner.inspection import LayerSummary, ModelSummary
    from adapt_pruner.memory_plan import MemoryPlan
    from adapt_pruner.pruner import IterationReport
    from adapt_pruner.recovery.estimate import Estimate


class PruningBar:
    """Progress towards the parameter target on stderr, with loss, parameters and the time left.

    Appears with the first iteration; where stderr is no terminal, each iteration is a line.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]} | {task.fields[size]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=float("inf"),  # iterations may take minutes
        )
        self._task = self._progress.add_task("", total=None, loss="-", size="-")

    def __enter__(self) -> PruningBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, report: IterationReport) -> None:
        """Shows where the run stands, as what is furthest from its target does."""
        used: dict[str, dict[str, float]] = dict(report.resources)
        if report.parameters_target is not None:
            used["parameters"] = {
                "before": report.parameters_before,
                "target": report.parameters_target,
                "after": report.parameters,
            }
        others = "".join(
            f", {_resource(name)} {_amount(name, u['after'])} (target {_amount(name, u['target'])})"
            for name, u in report.resources.items()
        )
        if not self._console.is_terminal:
            target = f" (target {report.parameters_target:,})" if "parameters" in used else ""
            print(
                f"iteration {report.iteration}: loss {report.loss:.3f}, {report.parameters:,} parameters"
                f"{target}{others}",
                file=sys.stderr,
                flush=True,
            )
            return
        self._progress.start()
        self._progress.update(
            self._task,
            description=f"iteration {report.iteration}",
            total=1.0,
            completed=min(_progress(u) for u in used.values()),
            loss=f"{report.loss:.3f}",
            size=f"{report.parameters:,} parameters",
        )


def _progress(used: dict[str, float]) -> float:
    """Fraction of what has to go that is gone."""
    excess = used["before"] - used["target"]
    return min(1.0, (used["before"] - used["after"]) / excess) if excess > 0 else 1.0


def _resource(name: str) -> str:
    return {"flops": "FLOPs", "kv_cache_bytes": "KV bytes"}.get(name, name)


def _amount(name: str, value: float) -> str:
    return f"{value * 1e3:.3f} ms" if name == "latency" else f"{value:,}"


def show_limits(console: Console, resources: dict[str, dict[str, float]], title: str | None = None) -> None:
    """What is limited: before, target, after, and what is left of it."""
    table = Table("", "before", "target", "after", "of before", title=title)
    for name, used in resources.items():
        cells = [
            _amount(name, used[key]) if used[key] is not None else "-"
            for key in ("before", "target", "after")
        ]
        table.add_row(_resource(name), *cells, f"{used['after'] / used['before']:.2%}")
    console.print(table)


def show_pruned(console: Console, result: dict[str, Any]) -> None:
    parameters = {key: result[f"parameters_{key}"] for key in ("before", "target", "after")}
    show_limits(console, {"parameters": parameters, **result["resources"]}, escape(result["run_directory"]))
    below = result["parameters_below_target"]
    console.print(
        f"{'' if below is None else f'{below:,} parameters below the target after '}"
        f"{result['iterations']} iterations, "
        f"{result['seconds']:.0f} s, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def show_recovered(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{escape(result['run_directory'])}: {result['steps']} steps, {result['tokens']:,} tokens, "
        f"held-out loss {_loss(result['held_out_loss_before'])} -> {_loss(result['held_out_loss'])}; "
        f"{result['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def show_accelerated(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=escape(result["run_directory"]))
    for column in ("stage", "parameters", "steps", "tokens", "held-out loss: pruned", "trained"):
        table.add_column(column)
    for line in result["stages"]:
        table.add_row(
            str(line["stage"]),
            f"{line['parameters']:,}",
            str(line["steps"]),
            f"{line['tokens']:,}",
            _loss(line["held_out_loss_before"]),
            _loss(line["held_out_loss"]),
        )
    console.print(table)


def show_recovery_estimates(console: Console, estimates: Sequence[Estimate]) -> None:
    table = Table("stage", "parameters", "steps", "tokens", "pruning", "training", "GiB of tensors")
    for e in estimates:
        minutes = (f"{e.pruning_minutes:.1f} min", f"{e.training_minutes:.1f} min")
        stage = "-" if e.stage is None else str(e.stage)
        table.add_row(
            stage,
            f"{e.parameters:,}",
            str(e.steps),
            f"{e.tokens:,}",
            *minutes,
            f"{e.memory_bytes / 2**30:.2f}",
        )
    console.print(table)
    total = sum(e.pruning_minutes + e.training_minutes for e in estimates)
    console.print(f"about {total:.0f} minutes, by rates measured here just now")


def show_memory_plan(console: Console, plan: MemoryPlan) -> None:
    size = f"{plan.parameters:,} parameters in {plan.layers} layers, {plan.weight_bytes / 1e9:.1f} GB"
    work = f"{plan.iterations} iterations of {plan.calibration_tokens:,} tokens"
    console.print(
        f"{escape(plan.model)}: {size}; {work}; sharded over {plan.processes} processes, numbers each"
    )
    table = Table("engine", "memory", "fits here", "reads, writes", "FLOPs", "time", "whole run")
    table.columns[0].no_wrap = True
    for e in plan.engines:
        once = f"{e.bytes_read_once / 1e9:.1f} GB once"
        table.add_row(
            e.engine,
            f"{e.memory_bytes / 1e9:.1f} GB",
            "yes" if e.fits else "no",
            once if e.bytes_read_once else f"{e.bytes_per_iteration / 1e9:.1f} GB",
            f"{e.flops_per_iteration:.2g}",
            _duration(e.seconds_per_iteration),
            _duration(e.seconds_once + plan.iterations * e.seconds_per_iteration),
        )
    console.print(table)
    machine = plan.machine
    where = f" at {escape(machine.disk_directory)}" if machine.disk_directory else ""
    console.print(
        f"FLOPs and time of an iteration, by {machine.flops_per_second / 1e9:,.0f} GFLOP/s in a layer and "
        f"{machine.disk_bytes_per_second / 1e9:.2f} GB/s from the disk{where}, measured here just now; "
        f"{machine.available_bytes / 1e9:.1f} GB of memory available"
    )
    for e in plan.engines:
        if e.problem is not None:
            console.print(f"[bold]{e.engine}[/] cannot: {escape(e.problem)}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_methods(console: Console, result: dict[str, Any]) -> None:
    for what in ("method", "estimator"):
        table = Table(box=box.SIMPLE)
        table.add_column(what, no_wrap=True)
        table.add_column("what it does" if what == "method" else "importance of a unit")
        table.add_column("source")
        for row in result[f"{what}s"]:
            table.add_row(row["name"], row["summary"], row["source"])
        console.print(table)


def show_evaluated(console: Console, result: EvaluationResult) -> None:
    if result.perplexity:
        p = result.perplexity
        console.print(
            f"perplexity {p.perplexity:.3f} ({result.data}, {p.tokens:,} tokens, context {p.context}, "
            f"stride {p.stride})"
        )
    if result.multiple_choice:
        mean = result.multiple_choice
        table = Table("task", "items", "acc", "acc_norm", "chance", title=escape(result.model))
        for task in mean.tasks:
            table.add_row(
                task.task,
                str(task.items),
                _with_error(task.accuracy, task.accuracy_stderr),
                _with_error(task.accuracy_norm, task.accuracy_norm_stderr),
                f"{task.chance:.3f}",
            )
        table.add_section()
        table.add_row(
            "mean",
            "",
            _with_error(mean.mean_accuracy, mean.mean_accuracy_stderr),
            _with_error(mean.mean_accuracy_norm, mean.mean_accuracy_norm_stderr),
            "",
        )
        console.print(table)
    if result.lm_eval:
        table = Table(
            "task", "items", "shots", "metric", "value", title=f"{escape(result.model)}, by lm-eval"
        )
        for found in result.lm_eval:
            first = [found.task, *("" if n is None else str(n) for n in (found.items, found.num_fewshot))]
            for metric, value in found.metrics.items():
                cells = map(escape, [*first, metric])
                table.add_row(*cells, _with_error(value, found.stderr.get(metric)))
                first = ["", "", ""]
        console.print(table)


def show_compared(console: Console, result: ComparisonResult) -> None:
    if result.output is None:
        _show_estimates(console, result)
        return
    for model in dict.fromkeys(line["model"] for line in result.rows):
        table = Table(title=f"{escape(model)} (kept: of the parameters outside embedding and head)")
        table.add_column("method", overflow="fold")  # names of variants are long
        for column in ("target", "kept", "perplexity", "mean accuracy", "difference"):
            table.add_column(column, no_wrap=True)
        for line in (line for line in result.rows if line["model"] == model):
            kept, perplexity = line["non_embedding_kept"], line["perplexity"]
            table.add_row(
                line["method"],
                _target(line["target"]),
                "-" if kept is None else f"{kept:.2%}",
                "-" if perplexity is None else f"{perplexity:.2f}",
                _with_error(line.get("mean"), line.get("mean_stderr")),
                _with_error(line.get("mean_difference"), line.get("mean_difference_stderr")),
            )
        console.print(table)
    for line in (line for line in result.rows if line["failure"]):
        what = f"{line['model']} {line['method']} {_target(line['target'])}"
        console.print(f"{what} failed, {line['failure']}", markup=False)
    console.print(f"{result.output / 'results.md'} has all of it", markup=False)


def _show_estimates(console: Console, result: ComparisonResult) -> None:
    for model in dict.fromkeys(e.model for e in result.estimates):
        first = Column("minutes", overflow="fold")
        table = Table(first, "target", "pruning", "evaluation", "loading", "all", title=escape(model))
        for e in (e for e in result.estimates if e.model == model):
            minutes = (e.pruning, e.evaluation, e.loading, e.minutes)
            table.add_row(e.method, _target(e.target), *(f"{m:.1f}" for m in minutes))
        console.print(table)
    total = sum(e.minutes for e in result.estimates)
    console.print(f"about {total:.0f} minutes, by rates measured here just now")


def _target(target: float | None) -> str:
    return "" if target is None else f"{target:g}"


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def show_inspected(
    console: Console,
    after: ModelSummary,
    before: ModelSummary | None,
    limits: dict[str, dict[str, float]],
) -> None:
    def cell(now: LayerSummary, was: LayerSummary | None, key: str) -> str:
        width = str(getattr(now.widths, key))
        return f"{getattr(was.widths, key)} → {width}" if was else width

    # Channels are those of each expert where there are experts.
    experts = any(layer.widths.num_experts for layer in (before or after).layers)
    widths = ["heads", "KV", *(["experts"] * experts), "channels"]
    table = Table("layer", *widths, "parameters", "kept", "MFLOPs", "KV bytes")
    there = iter(after.layers)
    for i in range(len(after.layers) + len(after.removed_layers)):
        if i in after.removed_layers:
            table.add_row(str(i), "removed", *[""] * (len(widths) - 1), "0", "0%", "0.00", "0")
            continue
        layer, was = next(there), before.layers[i] if before else None
        table.add_row(
            str(i),
            cell(layer, was, "num_attention_heads"),
            cell(layer, was, "num_key_value_heads"),
            *([cell(layer, was, "num_experts")] * experts),
            cell(layer, was, "intermediate_size"),
            f"{layer.parameters:,}",
            f"{layer.parameters / was.parameters:.0%}" if was else "",
            f"{layer.flops_per_token / 1e6:.2f}",
            f"{layer.kv_cache_bytes_per_token:,}",
        )
    console.print(table)
    totals = Table("total", *(["before"] if before else []), "after" if before else "", "")
    for key in (
        "parameters",
        "non_embedding_parameters",
        "flops_per_token",
        "kv_cache_bytes_per_token",
        "kv_cache_bytes",
    ):
        now = getattr(after, key)
        if before:
            was = getattr(before, key)
            totals.add_row(key.replace("_", " "), f"{was:,}", f"{now:,}", f"{now / was:.2%}")
        else:
            totals.add_row(key.replace("_", " "), f"{now:,}", "")
    console.print(totals)
    if limits:
        show_limits(console, limits, "limits of the run")
    console.print(
        f"{after.model_type}, {after.dtype}; FLOPs of a token and KV cache at a context of {after.context}"
    )


def show_benchmark(console: Console, result: BenchResult) -> None:
    tables: dict[str, Table] = {}
    op = ""
    for row in result.rows:
        title = f"{row.shape} {row.dtype}, {row.device}, {row.threads} threads, {row.clock} clock"
        if title not in tables:
            columns = ("", "ms p20 p50 p80", "GB/s", "of", "extra MiB")
            tables[title] = Table(*columns, title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table = tables[title]
        is_roofline = row.provider == "roofline"
        if not is_roofline and row.op != op:
            table.add_row(f"[bold]{row.op}[/bold]", "", "", row.roofline)
        op = row.op
        table.add_row(
            row.op if is_roofline else f"  {row.provider}{f' {row.backend}' * (row.provider == 'ours')}",
            " ".join(_three_digits(value) for value in (row.ms_p20, row.ms_p50, row.ms_p80)),
            f"{row.gbps:.1f}",
            f"{row.fraction_of_roofline:.1%}",
            "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}",
        )
    for table in tables.values():
        console.print(table)
    for note in result.notes:
        console.print(note, markup=False)
    if result.comparison:
        _show_comparison(console, result.comparison)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _show_comparison(console: Console, comparison: Comparison) -> None:
    if comparison.old_devices:
        console.print(f"the earlier run was on other devices too: {', '.join(comparison.old_devices)}")
    console.print(
        f"{comparison.matched} rows compared, {comparison.unmatched} without an earlier one, "
        f"{len(comparison.regressions)} slower"
    )
    if not comparison.regressions:
        return
    table = Table("op", "provider", "shape", "dtype", "ms", "of roofline", "time", title="regressions")
    for r in comparison.regressions:
        before, after = r.before, r.after
        table.add_row(
            after.op,
            f"{after.provider} ({after.backend})",
            after.shape,
            after.dtype,
            f"{before.ms_p50:.3f} → {after.ms_p50:.3f}",
            f"{before.fraction_of_roofline:.1%} → {after.fraction_of_roofline:.1%}",
            f"x {r.slowdown:.2f}",
        )
    console.print(table)


def show_families(console: Console, families: dict[str, Any]) -> None:
    for name, family in families.items():
        stock = ", ".join(t for t in family["model_types"] if not t.startswith("adapt_"))
        source = f"; {family['source']}" if family["source"] else ""
        console.print(
            f"{name}: model_type {stock} ({family['models']}{source})", markup=False, soft_wrap=True
        )


def show_doctor(console: Console, found: dict[str, Any]) -> None:
    table = Table("", "", show_header=False)
    for name, version in found["versions"].items():
        table.add_row(name, version or "[red]not installed[/red]")
    for key in ("python", "revision", "machine", "processor", "threads", "cache"):
        table.add_row(key, str(found[key]))
    table.add_row("CUDA devices", ", ".join(found["cuda_devices"]) or "none")
    extension = found["extension"]
    if isinstance(extension, str):
        table.add_row("extension", f"[red]{extension}[/red]")
    else:
        table.add_row("extension", ", ".join(f"{key} {value}" for key, value in extension.items()))
    problem = found["shard_io"]
    table.add_row("native shard I/O", "works" if problem is None else f"not usable: {problem}")
    table.add_section()
    for backend, reason in found["backends"].items():
        table.add_row(f"backend {backend}", "works" if reason is None else f"not usable: {reason}")
    console.print(table)


def show_demo(console: Console, result: dict[str, Any]) -> None:
    before, after, metrics = result["before"], result["after"], result["metrics"]
    table = Table("SmolLM2-135M", "before", "after", "")
    table.add_row(
        "parameters",
        f"{before['parameters']:,}",
        f"{after['parameters']:,}",
        f"{after['parameters'] / before['parameters']:.2%}",
    )
    first, last = before["perplexity"], after["perplexity"]
    table.add_row(
        f"held-out perplexity ({last['tokens']:,} tokens)",
        f"{first['perplexity']:.2f}",
        f"{last['perplexity']:.2f}",
        f"x {last['perplexity'] / first['perplexity']:.2f}",
    )
    console.print(table)
    console.print(f"before: {result['text_before']}", markup=False)
    console.print(f"after:  {result['text_after']}", markup=False)
    console.print(
        f"{metrics['iterations']} iterations, {metrics['seconds']:.0f} s of pruning; "
        f"no recovery training. Run directory: {result['run_directory']} "
        "(widths.png shows the layers, model/ loads with from_pretrained)"
    )
