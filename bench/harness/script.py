"""What the scripts share: their options, and how they end when something is wrong."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from coachhook.errors import CoachhookError

Facts = Annotated[
    Path | None,
    typer.Argument(help="Any file that 'coachhook edit' reads; by default the demo's 30 facts."),
]
First = Annotated[int, typer.Option(min=0, help="Records to leave out at the start of the file.")]
Count = Annotated[int, typer.Option(min=1, help="Records to take from there.")]
Run = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="A folder that keeps results; the same command goes on."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
JsonTo = Annotated[str | None, typer.Option("--json", help="A path, or - for standard output.")]

# Errors by which one editor or setting fails while the others of a comparison go on.
FAILURES = (CoachhookError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


class WrongResultError(AssertionError):
    """An operation to be timed does not give the reference's result."""


def run_script(main: Callable[..., Any]) -> None:
    """Run `main` with the command line's arguments. A `CoachhookError` or `OSError` ends it with
    one line and exit status 2, without a traceback."""
    try:
        typer.run(main)
    except (CoachhookError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def only_right_results(messages: Console, of: str = "") -> Iterator[None]:
    """Print a `WrongResultError` of the block to `messages`, after the name `of` the measurement,
    and end the script with exit status 1."""
    try:
        yield
    except WrongResultError as error:
        where = f"{of}: " if of else ""
        messages.print(f"[red]wrong result, nothing timed from here:[/red] {where}{error}")
        raise typer.Exit(1) from None
