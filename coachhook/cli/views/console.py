"""The console of the commands: one JSON document, or plain lines and tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coachhook.system.progress import console as progress_console

console = Console(highlight=False)

Document = Mapping[str, Any]


def show(document: Document, view: Callable[[Document], None], *, as_json: bool) -> None:
    """Print `document` as JSON on standard output, or as `view` draws it."""
    if as_json:
        print(json.dumps(_finite(document), indent=1, allow_nan=False))
    else:
        view(document)


def say(text: str) -> None:
    """Print one plain line, wrapped to the width of the terminal."""
    console.print(Text(text))


def tell(text: str) -> None:
    """Print one plain line on standard error."""
    progress_console.print(Text(text), soft_wrap=True)


def new_table(title: str | None, *columns: str, numeric: int = 0) -> Table:
    """A table; its last `numeric` columns hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        right = i >= len(columns) - numeric
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def layer_span(layers: Sequence[int]) -> str:
    """ "layer 8", "layers 8-12", or "layers 8, 10, 11"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def _finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
