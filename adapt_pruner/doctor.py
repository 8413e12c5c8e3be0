"""What is installed, what is built, and which kernel backends work here and why not."""

from __future__ import annotations

from typing import Any

from adapt_pruner import kernels
from adapt_pruner.assets import cache_dir
from adapt_pruner.run import environment
from adapt_pruner.shard_io import native_problem


def diagnose() -> dict[str, Any]:
    """Versions and hardware, contents of the extension, backends and shard I/O (None: works; else why not),
    cache."""
    try:
        extension: dict[str, Any] | str = kernels.build_info()
    except kernels.BackendUnavailable as error:
        extension = str(error)
    return {
        **environment(),
        "extension": extension,
        "backends": kernels.backend_status(),
        "shard_io": native_problem(),
        "cache": str(cache_dir()),
    }
