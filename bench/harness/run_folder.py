"""A folder that keeps what a long run has found, so that the same command goes on with the rest."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer

from coachhook.facts.request import EditRequest
from coachhook.journal import tensor_file
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
        if description.exists() and read_json(description) != wanted:
            raise typer.BadParameter(
                f"{place} holds a run of another version, of other facts or settings; take "
                "another folder"
            )
        write_json(description, wanted)
        yield


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds; measured and written now where there is no such file."""
    if not path.exists():
        write_json(path, measure())
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` has written. Raises `damaged` for anything else."""
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
    """The error for a kept file that is not what was written."""
    return typer.BadParameter(f"{path} is damaged; delete it, and the same command goes on")


def checksum(requests: Sequence[EditRequest]) -> str:
    """SHA-256 of the requests: which facts a run is of."""
    return hashlib.sha256(json.dumps([r.to_dict() for r in requests]).encode()).hexdigest()
