"""Which facts a script works on."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import typer

from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest


def demo_facts() -> Path:
    """The facts that come with the package."""
    return Path(str(files("coachhook.facts") / "demo.jsonl"))


def chosen_facts(facts: Path | None, first: int, edits: int) -> tuple[Path, list[EditRequest]]:
    """The file (by default the demo's), and at most `edits` of its records from number `first` on.

    Raises `RecordError` if the file cannot be read, and `typer.BadParameter` as `part_of` does.
    """
    path = facts or demo_facts()
    return path, part_of(path, load_requests(path).requests, first, edits)


def part_of(
    path: Path, requests: Sequence[EditRequest], first: int, edits: int
) -> list[EditRequest]:
    """At most `edits` of a file's requests, from number `first` on. Raises `typer.BadParameter` if
    there are none."""
    chosen = list(requests[first : first + edits])
    if not chosen:
        raise typer.BadParameter(f"{path} has no facts from number {first} on")
    return chosen


def in_batches(requests: Sequence[EditRequest], size: int) -> list[Sequence[EditRequest]]:
    """The requests in order, `size` at a time."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]
