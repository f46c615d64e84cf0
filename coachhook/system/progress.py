"""Progress bars with time left, on standard error; silent unless that is a terminal."""

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
# So few steps of milliseconds are over before a bar could be read.
_QUICK = 100


@contextmanager
def track(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar for `total` steps; call the yielded function with the number of steps just done.

    shown: false in every process of a job except the one that prints.
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
    """Iterate over `items`, with a bar if there are more than `_QUICK`."""
    if len(items) <= _QUICK:
        yield from items
        return
    with track(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
