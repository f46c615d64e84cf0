"""Files that appear whole or not at all, and lock files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

_STAGING = ".writing-"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a fresh path beside `target`; write a file or folder there inside the block. At the end
    it is flushed to disk and renamed to `target` in one step; after an error it is removed. Raises
    OSError if that fails."""
    # A unique name, because other processes may be writing the same target: the last one wins.
    staging = target.with_name(f"{_staging(target.name)}{os.getpid()}-{uuid4().hex[:8]}")
    try:
        yield staging
        for path in (staging, *staging.rglob("*")):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        os.replace(staging, target)
    finally:
        with suppress(OSError):
            _remove(staging)


def write(target: Path, data: bytes) -> None:
    """Write `target` whole or not at all. Raises OSError if that fails."""
    with replacing(target) as staging:
        staging.write_bytes(data)


def remove_unwritten(folder: Path, name: str = "") -> None:
    """Remove from `folder` what killed processes left half-written: of any target, or only of those
    whose names equal `name` up to the first dot.

    Call only while holding the lock under which these files are written: what a running process is
    writing looks the same.
    """
    for leftover in folder.glob(f"{_staging(name) if name else _STAGING}*"):
        _remove(leftover)


@contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for this thread, which may take it again inside the block.

    Creates the file and its folder. Raises BlockingIOError if the lock is held elsewhere, unless
    `wait` is true; OSError if the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One object per path, so that taking the lock again is counted and does not block.
    lock = FileLock(path.resolve(), is_singleton=True)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BlockingIOError(f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()


def _staging(name: str) -> str:
    # Only part of the name: the whole may already be as long as file names can be.
    return f"{_STAGING}{name.split('.')[0][:40]}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
