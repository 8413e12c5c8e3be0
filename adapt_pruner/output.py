"""Directories that are written completely or not at all, and what is checked before any work begins."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that becomes `target` by rename when the block ends without error.

    Raises:
        FileExistsError, ValueError: as of `require_empty`; nothing is written then.
    """
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        _publish(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"could not write {target}: {error}") from error
        raise


@contextlib.contextmanager
def resumable_directory(target: Path, key: str) -> Iterator[Path]:
    """As `atomic_directory`, but what an interrupted process has left for the same target and key is there
    again. An error in the block leaves nothing behind; what was left for another key goes.

    Args:
        key: what the contents depend on, as letters and digits.
    Raises:
        FileExistsError, ValueError: as of `require_empty`; nothing is written then.
        BlockingIOError: another process is writing the same.
    """
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(_resumable_prefix(target) + key)
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        for other in _resumable_directories(target):
            if other != partial:
                with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(other):
                    shutil.rmtree(other)
        try:
            yield partial
            _publish(partial, target)
        except Exception:  # not an interrupt
            shutil.rmtree(partial, ignore_errors=True)
            raise


def resumable_bytes(target: Path) -> int:
    """Bytes on the disk of what interrupted processes have left for `target`: it is kept or deleted."""
    total = 0
    for directory in _resumable_directories(target):
        for file in directory.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # one of them is at work
                total += file.lstat().st_blocks * 512
    return total


def require_empty(target: Path) -> None:
    """Raises unless `target` is absent or an empty directory, which can be replaced by another.

    Raises:
        FileExistsError: it is a file, not empty, a symbolic link or a mount point.
        ValueError: the path ends in no name.
    """
    if target.name in ("", ".."):
        raise ValueError(f"{str(target)!r} ends in no name; expected the path of a directory to create")
    if target.is_symlink():
        raise FileExistsError(
            f"{target} is a symbolic link to {os.readlink(target)}; expected a directory itself; nothing was "
            "written"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory; nothing was written")
    if target.exists() and _mount_of(target) != _mount_of(target.parent):
        raise FileExistsError(f"{target} is a mount point; expected a directory in it; nothing was written")


def require_free_space(target: Path, num_bytes: int) -> None:
    """Raises OSError (ENOSPC) when the file system of `target` has fewer free bytes than needed."""
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space for the pruned model: {num_bytes:,} bytes needed, {free:,} free",
            str(target),
        )


def _mount_of(directory: Path) -> str:
    """The kernel's number of the mount a directory lies in; bind mounts have the device of their source."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    finally:
        os.close(descriptor)
    return text.partition("mnt_id:")[2].split()[0]


def _resumable_prefix(target: Path) -> str:
    return f".{target.name}.resumable-"


def _resumable_directories(target: Path) -> list[Path]:
    return list(target.parent.glob(f"{glob.escape(_resumable_prefix(target))}*"))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process at a time has this; the lock goes with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), directory.lstat()):  # published or gone since
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise BlockingIOError(errno.EAGAIN, "another process is writing", str(directory)) from None
        yield
    finally:
        os.close(descriptor)


def _publish(partial: Path, target: Path) -> None:
    """Gives a complete directory its name, once it is on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors makes its files private
        _sync(path)
    _sync(partial)
    partial.rename(target)  # an empty directory is replaced
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
