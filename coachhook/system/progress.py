"""Progress bars with time left, on standard error; silent where no person is watching."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)

Item = TypeVar("Item")
# As many steps of milliseconds are over before a bar could be read.
_QUICK = 100


@contextmanager
def track(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows a bar for `total` steps; the yielded function is told how many more are done.

    shown: false in all processes of a job but the one that prints.
    """
    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.advance(task, steps)


def each(what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Go through `items`, with a bar where there are many."""
    if len(items) <= _QUICK:
        yield from items
        return
    with track(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
