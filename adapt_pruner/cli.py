"""Command line: parse, call, print. Every command is a function of the Python API."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_type_hints

from docstring_parser import parse
from jsonargparse import SUPPRESS, ActionConfigFile, ActionYesNo, ArgumentParser, Namespace
from rich.console import Console

from adapt_pruner import __version__
from adapt_pruner.assets import AssetError, resolve_model
from adapt_pruner.config import (
    ApplyConfig,
    BenchConfig,
    CompareConfig,
    EvaluateConfig,
    InspectConfig,
    MissingSetting,
    PlanMemoryConfig,
    PruneConfig,
    VerifyConfig,
)
from adapt_pruner.recovery.config import AccelConfig, RecoverConfig
from adapt_pruner.report import console as show


class _WrongUsage(Exception):
    """Arguments that the parser accepts one by one, but that are not enough for the command."""


# What --json prints, what prints the same for people, and the exit status if it is not 0.
Shown = (
    tuple[dict[str, Any], Callable[[Console], None]] | tuple[dict[str, Any], Callable[[Console], None], int]
)

_COMMANDS: dict[str, tuple[type | None, tuple[str, ...], str]] = {
    "prune": (PruneConfig, ("model",), "prune a model to a parameter budget"),
    "apply": (ApplyConfig, ("plan", "model"), "replay a saved plan on a checkpoint"),
    "verify": (VerifyConfig, ("model",), "compare the weights of a model with its checksums"),
    "recover": (RecoverConfig, ("model",), "train a pruned model to recover its quality"),
    "accel": (AccelConfig, (), "prune and train in stages, as a settings file says: accel RECIPE.yaml"),
    "evaluate": (EvaluateConfig, ("model",), "perplexity and multiple-choice accuracy"),
    "compare": (CompareConfig, ("models",), "models by several methods at several sizes, in one table"),
    "inspect": (InspectConfig, ("model",), "widths, parameters, FLOPs and KV cache, layer by layer"),
    "plan-memory": (PlanMemoryConfig, ("model",), "memory, reads and time that pruning a model would take"),
    "bench": (BenchConfig, ("suite",), "time of the kernels beside plain PyTorch and the memory's limits"),
    "methods": (None, (), "methods and estimators of prune, one line and the source each"),
    "families": (None, (), "the architectures that can be pruned"),
    "doctor": (None, (), "versions, built ops, and which backends work here"),
    "demo": (None, (), "prune SmolLM2-135M to 80% and show the result"),
}


class _Parser(ArgumentParser):
    """Reports wrong usage in one line, options named as they are typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(rf"\b(?:{'|'.join(_COMMANDS)})\.(\w+)", lambda m: _flag(m[1]), message)
        text = re.sub(r'Parser key "(\w+)":', lambda m: f"{_flag(m[1])}:", text)
        text = _plainly(" ".join(text.split())).replace('in "<unicode string>", ', "")
        print(f"adapt-pruner: error: {text}; see --help", file=sys.stderr)
        sys.exit(2)


def _plainly(message: str) -> str:
    """What the parser says of a setting that may be left out, without the names of types."""
    union = re.search(
        r": Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .*"
        r" Given value: (.*)",
        message,
    )
    if union is None:
        return message
    kinds = re.sub(r"(, )?<class 'NoneType'>", "", union[1])
    kinds = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", kinds))
    return f"{message[: union.start()]} is {union[2]!r}, expected {kinds}"


def build_parser() -> ArgumentParser:
    """The command-line parser; settings and their help come from the config dataclasses."""
    parser = _Parser(
        prog="adapt-pruner", description="Structured pruning of decoder language models.", version=__version__
    )
    commands = parser.add_subcommands(dest="command")
    for name, (config, positional, help_text) in _COMMANDS.items():
        command = _Parser(description=help_text)
        if config is not None:
            _add_config(command, config, positional)
        elif name == "demo":
            command.add_argument("--output", default="runs/demo", help="run directory to create")
        command.add_argument("--json", action="store_true", help="print JSON alone on stdout")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        commands.add_subcommand(name, command, help=help_text)
    return parser


def _add_config(command: ArgumentParser, config: type, positional: tuple[str, ...]) -> None:
    """One argument for each field of a config dataclass, described by its docstring."""
    command.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    described = {
        p.arg_name: (p.description or "").replace("\n", " ") for p in parse(config.__doc__ or "").params
    }
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        options: dict[str, Any] = {"help": described[field.name]}
        if not _is_required(field):
            made = field.default_factory
            options["default"] = field.default if made is dataclasses.MISSING else made()
        if field.name in positional:
            # Suppressed, or an absent positional would overwrite the value from the settings file with None.
            command.add_argument(field.name, type=str, nargs="?", **options, default=SUPPRESS)
        elif types[field.name] is bool:
            command.add_argument(_flag(field.name), action="store_true", **options)
        elif types[field.name] == bool | None:
            both_ways = ActionYesNo(yes_prefix="", no_prefix="no-")
            command.add_argument(_flag(field.name), action=both_ways, **options)
        else:
            kind, required = types[field.name], _is_required(field)
            command.add_argument(_flag(field.name), type=kind, required=required, **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `adapt-pruner`; returns the exit status: 0, 1 for an error, 2 for wrong usage."""
    parsed = build_parser().parse_args(_config_first(sys.argv[1:] if argv is None else argv))
    arguments: Namespace = parsed[parsed.command]
    _log_to_stderr()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            result, print_result, *status = _RUN[parsed.command](arguments)
    except KeyboardInterrupt:
        how = "the same command" if parsed.command == "apply" else "--resume"
        print(f"adapt-pruner: interrupted; {how} goes on with an unfinished run", file=sys.stderr)
        return 130
    except (_WrongUsage, MissingSetting) as error:
        print(f"adapt-pruner: error: {error}; see adapt-pruner {parsed.command} --help", file=sys.stderr)
        return 2
    except _reported_errors() as error:
        if arguments.debug:
            raise
        print(f"adapt-pruner: error: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one tells
        return status[0] if status else 0
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_result(Console())
    return status[0] if status else 0


def _reported_errors() -> tuple[type[Exception], ...]:
    """What is told in one line; of the kernels only once they were imported: they import torch."""
    kernels = sys.modules.get("adapt_pruner.kernels")
    of_kernels = () if kernels is None else (kernels.BackendUnavailable,)
    return ValueError, OSError, AssetError, *of_kernels


def _log_to_stderr() -> None:
    """Our own messages; of the libraries' only errors, whose loggers read these variables when imported."""
    for variable in ("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    logger = logging.getLogger("adapt_pruner")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("adapt-pruner: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _config_first(argv: Sequence[str]) -> list[str]:
    """The arguments with --config right behind the command: the parser lets the last one win.

    `accel` takes the settings file itself: most of what it needs is only said there.
    """
    first: list[str] = []
    rest: list[str] = []
    switches = {_flag(f.name) for f in dataclasses.fields(AccelConfig) if f.default is False}
    switches |= {"--json", "--debug", "--help"}
    takes_value = False  # the argument before
    arguments = iter(argv)
    for argument in arguments:
        is_recipe = argv[0] == "accel" and rest and not argument.startswith("-") and not takes_value
        takes_value = False
        if is_recipe:
            first += ["--config", argument]
        elif argument == "--config":
            first += [argument, *itertools.islice(arguments, 1)]
        elif argument.startswith("--config="):
            first.append(argument)
        else:
            rest.append(argument)
            takes_value = argument.startswith("--") and "=" not in argument and argument not in switches
    return [*rest[:1], *first, *rest[1:]]


def _print_warning(message: Any, *details: Any, **more: Any) -> None:
    print(f"adapt-pruner: warning: {message}", file=sys.stderr)


def _config(kind: type, arguments: Namespace) -> Any:
    """The config dataclass from the parsed arguments."""
    fields = dataclasses.fields(kind)
    values = {field.name: arguments.get(field.name) for field in fields}
    missing = [field.name for field in fields if values[field.name] is None and _is_required(field)]
    if missing:  # positional, but optional to the parser because a settings file may give them
        raise _WrongUsage(f"missing argument: {' '.join(missing).upper()}")
    return kind(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _quieten_transformers() -> None:
    """Its progress bars of loading and saving would tear ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _prune(arguments: Namespace) -> Shown:
    from adapt_pruner.pruner import prune

    config = _config(PruneConfig, arguments)
    _quieten_transformers()
    with show.PruningBar() as bar:
        pruned = prune(config, on_iteration=bar.update)
    plan_hash = pruned.plan.hash if pruned.plan else None
    result = {"run_directory": str(pruned.run_directory), "plan_hash": plan_hash, **pruned.metrics}
    return result, lambda console: show.show_pruned(console, result)


def _apply(arguments: Namespace) -> Shown:
    from adapt_pruner.apply import apply_plan
    from adapt_pruner.checkpoint import open_checkpoint
    from adapt_pruner.plan import PruningPlan

    config = _config(ApplyConfig, arguments)
    output = apply_plan(
        PruningPlan.load(config.plan),
        resolve_model(config.model),
        config.output,
        uncompensated=config.uncompensated,
        max_shard_bytes=config.max_shard_bytes(),
    )
    result = {"model_directory": str(output), "parameters": open_checkpoint(output).num_parameters}
    return result, lambda console: console.print(f"wrote {output}: {result['parameters']:,} parameters")


def _verify(arguments: Namespace) -> Shown:
    from adapt_pruner.checkpoint import open_checkpoint
    from adapt_pruner.shard_io import CHECKSUMS_NAME, verify_checksums

    model = resolve_model(_config(VerifyConfig, arguments).model)
    checkpoint = open_checkpoint(model)
    tensors, checked = len(checkpoint.tensors), verify_checksums(checkpoint)
    result = {"model_directory": str(model), "tensors": tensors, "tensors_checked": checked or 0}
    found = f"there is no {CHECKSUMS_NAME}" if checked is None else f"{checked} agree with {CHECKSUMS_NAME}"
    return result, lambda console: console.print(f"{model}: headers of {tensors} tensors are sound; {found}")


def _recover(arguments: Namespace) -> Shown:
    from adapt_pruner.recovery.estimate import estimate_recovery
    from adapt_pruner.recovery.recover import recover

    config = _config(RecoverConfig, arguments)
    _quieten_transformers()
    if config.dry_run:
        return _estimates(estimate_recovery(config))
    recovered = recover(config)
    result = {"run_directory": str(recovered.run_directory), **recovered.metrics}
    return result, lambda console: show.show_recovered(console, result)


def _accel(arguments: Namespace) -> Shown:
    from adapt_pruner.adapt_accel import accel
    from adapt_pruner.recovery.estimate import estimate_accel

    config = _config(AccelConfig, arguments)
    _quieten_transformers()
    if config.dry_run:
        return _estimates(estimate_accel(config))
    made = accel(config)
    result = {"run_directory": str(made.run_directory), **made.metrics}
    return result, lambda console: show.show_accelerated(console, result)


def _estimates(estimates: Sequence[Any]) -> Shown:
    result = {"stages": [dataclasses.asdict(e) for e in estimates]}
    return result, lambda console: show.show_recovery_estimates(console, estimates)


def _evaluate(arguments: Namespace) -> Shown:
    from adapt_pruner.evaluation.evaluate import evaluate

    _quieten_transformers()
    result = evaluate(_config(EvaluateConfig, arguments))
    return result.to_dict(), lambda console: show.show_evaluated(console, result)


def _compare(arguments: Namespace) -> Shown:
    from adapt_pruner.comparison import compare

    _quieten_transformers()
    result = compare(_config(CompareConfig, arguments))
    return result.to_dict(), lambda console: show.show_compared(console, result), int(result.incomplete)


def _inspect(arguments: Namespace) -> Shown:
    from adapt_pruner.inspection import inspect_model, limits_of_run, ratios

    after, before = inspect_model(_config(InspectConfig, arguments))
    limits = limits_of_run(arguments.model)
    result: dict[str, Any] = {"model": after.to_dict()}
    if before:
        result |= {"before": before.to_dict(), "ratios": ratios(after, before)}
    if limits:
        result["limits"] = limits
    return result, lambda console: show.show_inspected(console, after, before, limits)


def _plan_memory(arguments: Namespace) -> Shown:
    from adapt_pruner.memory_plan import plan_memory

    _quieten_transformers()
    result = plan_memory(_config(PlanMemoryConfig, arguments))
    return result.to_dict(), lambda console: show.show_memory_plan(console, result)


def _bench(arguments: Namespace) -> Shown:
    from adapt_pruner.bench import bench_kernels

    result = bench_kernels(_config(BenchConfig, arguments))
    return result.to_dict(), lambda console: show.show_benchmark(console, result), int(result.failed)


def _methods(arguments: Namespace) -> Shown:
    from adapt_pruner.methods import METHODS
    from adapt_pruner.scoring import ESTIMATORS

    result = {
        "methods": [method.to_dict() for method in METHODS],
        "estimators": [{"name": e.name, "summary": e.summary, "source": e.source} for e in ESTIMATORS],
    }
    return result, lambda console: show.show_methods(console, result)


def _families(arguments: Namespace) -> Shown:
    from adapt_pruner.families import FAMILIES

    result = {
        f.name: {"model_types": list(f.model_types), "models": f.models, "source": f.source} for f in FAMILIES
    }
    return result, lambda console: show.show_families(console, result)


def _doctor(arguments: Namespace) -> Shown:
    from adapt_pruner.doctor import diagnose

    result = diagnose()
    return result, lambda console: show.show_doctor(console, result)


def _demo(arguments: Namespace) -> Shown:
    from adapt_pruner.demo import demo

    _quieten_transformers()
    print("Pruning SmolLM2-135M to 80% of its parameters: minutes on two CPU cores", file=sys.stderr)
    with show.PruningBar() as bar:
        result = demo(arguments.output, on_iteration=bar.update).to_dict()
    return result, lambda console: show.show_demo(console, result)


_RUN: dict[str, Callable[[Namespace], Shown]] = {
    "prune": _prune,
    "apply": _apply,
    "verify": _verify,
    "recover": _recover,
    "accel": _accel,
    "evaluate": _evaluate,
    "compare": _compare,
    "inspect": _inspect,
    "plan-memory": _plan_memory,
    "bench": _bench,
    "methods": _methods,
    "families": _families,
    "doctor": _doctor,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
