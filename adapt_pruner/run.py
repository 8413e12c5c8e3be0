"""The run directory: everything one command writes, and what a resume needs."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adapt_pruner.checkpoint import write_json, write_tensors, write_text

if TYPE_CHECKING:
    from torch import Tensor

# Settings that do not change the result, so a resumed run may have others; "recover.x" is x in that mapping.
_FREE_TO_CHANGE = ("output", "resume", "memory")


class RunDirectory:
    """Layout: config.yaml environment.json log.jsonl metrics.json plan.json iterations/ model/ state/.

    `state/` exists until the run is complete; `model/` appears by rename.
    `state/tensors-NNN.safetensors` belongs to iteration NNN of `state/progress.json`, and no other is read.
    """

    def __init__(self, path: Path, *, free_to_change: Collection[str] = _FREE_TO_CHANGE) -> None:
        self.path = path
        self._free_to_change = free_to_change
        self.model = path / "model"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.json"
        self._state = path / "state" / "progress.json"
        self._engine = path / "state" / "engine"
        self._lock: int | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Any,
        *,
        resume: bool,
        free_to_change: Collection[str] = _FREE_TO_CHANGE,
    ) -> RunDirectory:
        """Creates a run directory, or opens an unfinished one.

        Args:
            config: a frozen dataclass; on resume it must equal the saved one.
            free_to_change: but for these settings.
        Raises:
            FileExistsError: the directory is not empty and `resume` is not set.
            ValueError: `resume` with other settings, or a directory that is no run.
            BlockingIOError: another process is writing to it.
        """
        run = cls(Path(path), free_to_change=free_to_change)
        run.check(config, resume=resume)
        run.path.mkdir(parents=True, exist_ok=True)
        run._acquire()
        for leftover in filter(_is_partial, run.path.iterdir()):  # its writer is dead, or held the lock
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        # The config comes first: from then on a run that was killed can be resumed.
        saved = run.path / "config.yaml"
        if not saved.exists():
            write_text(saved, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        if not (run.path / "environment.json").exists():
            write_json(run.path / "environment.json", environment())
        return run

    def check(self, config: Any, *, resume: bool) -> None:
        """Raises what `open` raises, apart from the lock, and writes nothing."""
        saved = self.path / "config.yaml"
        # A lock or a half-written file alone is a run that was killed before it began.
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output {self.path} exists and is not a directory")
        occupied = self.path.exists() and any(
            file.name != ".lock" and not _is_partial(file) for file in self.path.iterdir()
        )
        if occupied and not resume:
            hint = "; --resume goes on with the run in it" if saved.exists() else ""
            raise FileExistsError(f"output directory {self.path} is not empty{hint}")
        if occupied and not saved.exists():
            raise ValueError(f"{self.path} is not a run directory: it has no config.yaml to resume from")
        if occupied:
            settings = yaml.safe_load(saved.read_text(encoding="utf-8"))
            self._require_same_settings(settings, config)

    def _require_same_settings(self, saved: Any, config: Any) -> None:
        if not isinstance(saved, dict):
            raise ValueError(f"{self.path / 'config.yaml'} is damaged")
        for field in dataclasses.fields(config):
            key, value = field.name, getattr(config, field.name)
            # A setting that the run does not know is younger than the run, which had its default.
            default = None if field.default is dataclasses.MISSING else field.default
            self._require_same(key, saved.get(key, default), value)

    def _require_same(self, key: str, before: Any, value: Any) -> None:
        if key in self._free_to_change or before == value:
            return
        if isinstance(before, Mapping) and isinstance(value, Mapping):  # settings of another command
            for name in sorted(before.keys() | value.keys()):
                self._require_same(f"{key}.{name}", before.get(name), value.get(name))
            return
        raise ValueError(
            f"cannot resume {self.path}: {key} is {value!r}, the run was started with {before!r}"
        )

    def _acquire(self) -> None:
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise BlockingIOError(
                error.errno, "another process is writing to the run", str(self.path)
            ) from None

    def close(self) -> None:
        """Lets other processes write; called once the run is complete or has failed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def complete(self) -> bool:
        return self.model.exists() and not self._state.exists()

    def log(self, event: str, **values: Any) -> None:
        """Appends one JSON line with the time (seconds since the epoch) and the event."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values})
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_iteration(
        self,
        number: int,
        record: dict[str, Any],
        state: dict[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Records a finished iteration; a kill after this resumes behind it.

        Args:
            tensors: what cannot be made again from `state`.
        """
        (self.path / "iterations").mkdir(exist_ok=True)
        write_json(self.path / "iterations" / f"{number:03}.json", record)
        self._state.parent.mkdir(exist_ok=True)
        if tensors:
            write_tensors(self._tensors(number), tensors)
        write_text(self._state, json.dumps({"iteration": number, **state}))
        for old in self._state.parent.glob("*.safetensors"):  # those of before were needed until here
            if old != self._tensors(number):
                old.unlink()

    def load_tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors that were saved with an iteration, the last finished one; none if none were."""
        from safetensors.torch import load_file

        path = self._tensors(number)
        return load_file(path) if path.exists() else {}

    def _tensors(self, number: int) -> Path:
        return self._state.parent / f"tensors-{number:03}.safetensors"

    def keep_engine(self, name: str) -> None:
        """Records which engine prunes, before it does."""
        self._state.parent.mkdir(exist_ok=True)
        write_text(self._engine, name)

    @property
    def engine(self) -> str | None:
        """The one that an unfinished run was begun with, if it got so far."""
        return self._engine.read_text(encoding="utf-8") if self._engine.exists() else None

    def load_state(self) -> dict[str, Any] | None:
        """State after the last finished iteration, or None if there is none."""
        if not self._state.exists():
            return None
        state: dict[str, Any] = json.loads(self._state.read_text(encoding="utf-8"))
        return state

    def iterations(self) -> list[dict[str, Any]]:
        """Records of the finished iterations, in order."""
        files = sorted((self.path / "iterations").glob("*.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def finish(self) -> None:
        """Removes what only a resume needs."""
        self._state.unlink(missing_ok=True)  # first: the tensors beside it go in any order
        shutil.rmtree(self._state.parent, ignore_errors=True)


class FollowedRun(RunDirectory):
    """The directory of a run that the first of several processes writes, as the others have it: read-only."""

    def log(self, event: str, **values: Any) -> None:
        pass

    def save_iteration(
        self,
        number: int,
        record: dict[str, Any],
        state: dict[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        pass

    def finish(self) -> None:
        pass


def _is_partial(path: Path) -> bool:
    """Whether this is what a killed process left of an atomic write."""
    return path.name.startswith(".") and ".partial" in path.name


def environment() -> dict[str, Any]:
    """Versions, source revision and hardware, for the record of a run."""
    from importlib import metadata

    import torch

    versions: dict[str, str | None] = {}
    for package in ("adapt_pruner", "torch", "triton", "transformers", "datasets", "safetensors", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "revision": _git_revision(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda_devices": [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
    }


def _git_revision() -> str | None:
    """Revision of the source tree this package runs from, if it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
