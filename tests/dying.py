"""Runs of `prune` in children that are killed at a call; for processes that have only imported.

Children are forked, so there must be no thread pool yet.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from adapt_pruner import pruner
from adapt_pruner.config import PruneConfig
from adapt_pruner.modeling import register

register()  # imports the model classes once, for all children


def child(config: PruneConfig, dying: tuple[Any, str] | None = None, count: int = 0) -> int:
    """Status of a child that prunes, and is killed in the call of that number of `dying`: owner and name."""
    if os.fork():
        return os.wait()[1]
    if dying:
        owner, name = dying
        original, calls = getattr(owner, name), []

        def killing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killing)
    pruner.prune(config)
    os._exit(0)
