"""A folder that keeps what a long run has found, so that the same command goes on with the rest."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer

from coachhook.facts.request import EditRequest
from coachhook.system import files
from coachhook.system.files import file_lock, remove_unwritten


@contextmanager
def run_folder(place: Path, protocol: dict[str, Any]) -> Iterator[None]:
    """Hold `place` for the run that `protocol` describes, and for it alone.

    Raises `typer.BadParameter` if `place` belongs to another run or another process works in it.
    """
    with ExitStack() as holding:
        try:
            holding.enter_context(file_lock(place / ".lock"))
        except BlockingIOError:
            raise typer.BadParameter(f"another process works in {place}; wait for it") from None
        remove_unwritten(place)
        description = place / "protocol.json"
        # As JSON has it: there are no tuples.
        wanted = json.loads(json.dumps(protocol))
        if description.exists() and read(description) != wanted:
            raise typer.BadParameter(
                f"{place} holds a run of another version, of other facts or settings; take "
                "another folder"
            )
        write(description, wanted)
        yield


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds; measured and written now where there is no such file."""
    if not path.exists():
        write(path, measure())
    return read(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` has written. Raises `typer.BadParameter` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise typer.BadParameter(f"{path} is damaged; delete it, and the same command goes on")
    return found


def write(path: Path, document: Any) -> None:
    """Whole or not at all."""
    files.write(path, f"{json.dumps(document, indent=1)}\n".encode())


def checksum(requests: Sequence[EditRequest]) -> str:
    return hashlib.sha256(json.dumps([r.to_dict() for r in requests]).encode()).hexdigest()
