"""What is installed, what is built, and which kernel backends work here and why not."""

from __future__ import annotations

from typing import Any

from adapt_pruner import kernels
from adapt_pruner.assets import cache_dir
from adapt_pruner.run import environment


def diagnose() -> dict[str, Any]:
    """Versions and hardware, contents of the extension, backends (None: works; else why not), cache."""
    try:
        extension: dict[str, Any] | str = kernels.build_info()
    except kernels.BackendUnavailable as error:
        extension = str(error)
    return {
        **environment(),
        "extension": extension,
        "backends": kernels.backend_status(),
        "cache": str(cache_dir()),
    }
