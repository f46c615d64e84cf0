"""A folder that keeps the results of a long run, so that the same command can resume it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer

from coachhook.facts.request import EditRequest
from coachhook.system import tensor_file
from coachhook.system.files import file_lock, remove_unwritten


@contextmanager
def run_folder(place: Path, protocol: dict[str, Any]) -> Iterator[None]:
    """Reserve `place` for the run that `protocol` describes.

    Raises `typer.BadParameter` if `place` belongs to another run or another process works in it.
    """
    with ExitStack() as holding:
        try:
            holding.enter_context(file_lock(place / ".lock"))
        except BlockingIOError:
            raise typer.BadParameter(f"another process works in {place}; wait for it") from None
        remove_unwritten(place)
        description = place / "protocol.json"
        # Through JSON, which turns tuples into lists.
        wanted = json.loads(json.dumps(protocol))
        if description.exists() and read_json(description) != wanted:
            raise typer.BadParameter(
                f"{place} holds a run of another version, of other facts or settings; take "
                "another folder"
            )
        write_json(description, wanted)
        yield


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The contents of `path`; if there is no such file, `measure()`, written there first."""
    if not path.exists():
        write_json(path, measure())
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The document that `write_json` wrote. Raises `typer.BadParameter` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise damaged(path)
    return found


def write_json(path: Path, document: dict[str, Any]) -> None:
    write(path, f"{json.dumps(document, indent=1)}\n".encode())


def write(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all. Raises `SaveError`."""
    tensor_file.write(path, content)


def damaged(path: Path) -> typer.BadParameter:
    """The error for a kept file that has changed since it was written."""
    return typer.BadParameter(f"{path} is damaged; delete it, and the same command goes on")


def checksum(requests: Sequence[EditRequest]) -> str:
    """SHA-256 of the requests, to tell the facts of one run from those of another."""
    return hashlib.sha256(json.dumps([r.to_dict() for r in requests]).encode()).hexdigest()
