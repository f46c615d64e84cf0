"""Files that appear whole or not at all, and locks that one process holds at a time."""

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
    """A path beside `target`, of nothing yet, to write a file or a folder to inside the block: it
    is `target` afterwards, in one rename of what is safely on disk; nothing is left of it after an
    error. Raises OSError where that cannot be done."""
    # Under a name of its own, because others may be writing the same: whoever is last replaces.
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
    """Write `target` whole or not at all. Raises OSError where that cannot be done."""
    with replacing(target) as staging:
        staging.write_bytes(data)


def remove_unwritten(folder: Path, name: str = "") -> None:
    """Remove what processes that were killed while they wrote have left in `folder`: of all files,
    or of those called `name`, up to their first dot.

    Only for who holds the lock under which they are written: what another process is about to
    write looks the same.
    """
    for leftover in folder.glob(f"{_staging(name) if name else _STAGING}*"):
        _remove(leftover)


@contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for this thread, which may take it again inside the block.

    Makes the file, and its folder. Raises BlockingIOError if somebody else holds it, unless told to
    `wait`; OSError where there can be no such file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One object a path, so that taking it again is counted and not waited for.
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
    # A part of the name: the whole may be as long as a name may be.
    return f"{_STAGING}{name.split('.')[0][:40]}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
