"""Starts a worker of these tests as two gloo processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import adapt_pruner


def torchrun(
    worker: str, *arguments: object, timeout: float = 400, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a script beside this file.

    Args:
        arguments: its command line.
        variables: of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name(worker)
    paths = [Path(adapt_pruner.__file__).parents[1], script.parents[1]]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", **variables}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", str(port), script, *arguments,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
