"""What each of two gloo processes does for test_sharded_pruning.py; run by torch.distributed.run.

pruning_worker.py prune SETTINGS.json [CALL]: prunes with each of the settings in the file; rank 1 is killed
when it removes units for the CALL-th time.
pruning_worker.py scores RESULTS SETTINGS.json: scores with the whole model and with parts of it.
pruning_worker.py refused RESULTS SETTINGS.json: the errors of each of the settings.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.config import PruneConfig
from adapt_pruner.engines import in_memory, sharded
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.engines.sharded import ShardedEngine, agreed
from adapt_pruner.pruner import prune
from adapt_pruner.scoring.estimators import find_estimator
from adapt_pruner.sharding import join_processes, named_tensors, world


def only_parts(model) -> None:
    """No storage behind the weights holds more than this rank's share of them, padding included."""
    tensors = named_tensors(model)
    assert tensors
    assert all(isinstance(t, DTensor) for t in tensors.values())
    storages = {t.to_local().untyped_storage().data_ptr(): t.to_local() for t in tensors.values()}
    held = sum(t.untyped_storage().nbytes() for t in storages.values())
    padding = sum(t[:1].numel() * t.element_size() for t in tensors.values())
    whole = sum(t.numel() * t.element_size() for t in tensors.values())
    assert held <= whole / world().size + padding, (held, whole)


def watch() -> list[int]:
    """Looks at every sharded model there is, and forbids to load a whole one; sizes of gathered tensors."""
    gathered: list[int] = []
    read, pruned, full = sharded.read_model, sharded.prune_sharded, DTensor.full_tensor

    def watched_read(*args):
        model = read(*args)
        only_parts(model)
        return model

    def watched_prune(*args, **more):
        model, widths = pruned(*args, **more)
        only_parts(model)
        return model, widths

    def watched_full(tensor, **more):
        whole = full(tensor, **more)
        gathered.append(whole.numel())
        return whole

    def forbidden(*args, **more):
        raise AssertionError("a whole model is loaded")

    sharded.read_model, sharded.prune_sharded = watched_read, watched_prune
    DTensor.full_tensor = watched_full
    in_memory.load_model = forbidden
    return gathered


def prune_all(settings: str, kill: int) -> None:
    gathered = watch()
    remove, calls = ShardedEngine.remove_units, []

    def dying(engine, keep, **more):
        calls.append(1)
        if len(calls) == kill and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        remove(engine, keep, **more)

    ShardedEngine.remove_units = dying
    for values in json.loads(Path(settings).read_text()):
        iterations = []
        result = prune(PruneConfig(**values), on_iteration=iterations.append)
        assert world().rank == 0 or not iterations
        assert result.plan is not None
    print(f"rank {world().rank} gathered at most {max(gathered)} elements at once")


def scores_of(engine, case: dict):
    """Of a batch; and the loss, layer and unit importance as one list of numbers."""
    batch = torch.randint(3, 280, (case["sequences"], 24), generator=torch.Generator().manual_seed(1))
    scores = engine.score(
        batch,
        micro_batch_size=case["micro_batch_size"],
        metric=case.get("metric", "cosine"),
        estimator=find_estimator(case.get("estimator", "taylor_first")),
        gqa_credit=case.get("gqa_credit", "owner"),
    )
    units = [layer[kind.name] for layer in scores.unit_importance for kind in engine.family.unit_kinds]
    return scores, [scores.loss, *scores.layer_importance.tolist(), *np.concatenate(units).tolist()]


def score_all(results: str, settings: str) -> None:
    lines = []
    for case in json.loads(Path(settings).read_text()):
        checkpoint = open_checkpoint(case["model"])
        how = {"device": "cpu", "granularity": case.get("granularity", "kv_group")}
        alone = scores_of(InMemoryEngine(checkpoint, **how), case)[1]
        engine = ShardedEngine(checkpoint, **how)
        _, twice = (scores_of(engine, case)[1] for _ in range(2))
        assert all(p.grad is None for p in engine.model.parameters())
        # As the loop has it: scored again once units have gone.
        keep = []
        for layer, widths in enumerate(engine.widths):
            units = {kind.name: np.arange(kind.count(widths)) for kind in engine.family.kinds_in(widths)}
            if layer == 1:  # of two query heads that share a KV head, one
                units = {name: n[1::2] if name == "query_head" else n[1:] for name, n in units.items()}
            keep.append(units)
        whole = InMemoryEngine(checkpoint, **how)
        before = weakref.ref(engine.model)
        for each in (engine, whole):
            each.remove_units(keep)
        assert before() is None  # and its memory is free
        assert engine.widths == whole.widths
        assert engine.num_parameters == whole.num_parameters
        lines.append([alone, twice, scores_of(whole, case)[1], scores_of(engine, case)[1]])
    Path(f"{results}-{world().rank}.json").write_text(json.dumps(lines))


def refused(results: str, settings: str) -> None:
    errors = []
    rank = join_processes("cpu").rank
    for values in json.loads(Path(settings).read_text()):
        try:
            prune(PruneConfig(**values))
        except (ValueError, RuntimeError, FileExistsError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            errors.append("")
    try:
        agreed([{"channel": np.arange(5)}, {"channel": np.arange(5 + rank)}])
    except RuntimeError as error:
        errors.append(f"RuntimeError: {error}")
    assert agreed([{"channel": np.array([1, 2, 7])}])[0]["channel"].tolist() == [1, 2, 7]
    Path(f"{results}-{rank}.json").write_text(json.dumps(errors))


def main(command: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported need not be looked through each time that a model is freed
    join_processes("cpu")
    if command == "prune":
        prune_all(arguments[0], int(arguments[1]) if len(arguments) > 1 else 0)
    elif command == "scores":
        score_all(*arguments)
    else:
        refused(*arguments)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
