"""The arguments of the commands, and the checks before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coachhook.cli.views.preparation import plan_view
from coachhook.errors import ConfigError, RequestError
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest

if TYPE_CHECKING:
    from coachhook.plan import Plan

Model = Annotated[str, typer.Argument(help="smollm2, a folder with a checkpoint, or a hub id.")]
Facts = Annotated[Path, typer.Argument(help="A .jsonl, .json or .csv file of facts.")]
Hooks = Annotated[Path, typer.Option("--hooks", file_okay=False, help="The folder of edits.")]
Readout = Annotated[
    str | None,
    typer.Option(help="memory (a row of its own for every subject), or delta (the paper's)."),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Blocks to hook, which means --readout delta: 8,9,10 or 8-12. "
        "With --readout memory: the gate's, and those written to."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(help="Name of the down-projections, as in 'model.layers.{}.mlp.down_proj'."),
]
TextFile = Annotated[
    Path | None, typer.Option("--text", exists=True, dir_okay=False, help="Ordinary text.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


_MOST_LAYERS = 10_000


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """The layers in "8,9,10", "8-12" or a mixture, in ascending order; None where nothing is asked
    for. Raises `ConfigError`."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            span = range(0)
        if not span or span[-1] > _MOST_LAYERS:
            raise ConfigError(f"cannot read layers {text!r}; write them as 8,9,10 or 8-12")
        layers.update(span)
    return tuple(sorted(layers))


def usable(facts: Path, skip_invalid: bool) -> list[EditRequest]:
    """The facts of a file, with a line on standard error for each record that is left out. Raises
    `RequestError` if nothing is left."""
    loaded = load_requests(facts, skip_invalid=skip_invalid)
    for reason in loaded.skipped:
        typer.echo(f"skipped: {reason}", err=True)
    if not loaded.requests:
        raise RequestError(f"{facts} has no valid record; give at least one fact")
    return loaded.requests


def checked(plan: Plan, *, shown: bool) -> dict[str, Any]:
    """The plan for a command's document. Raises `NotEnoughMemoryError` if it cannot fit."""
    document = plan.to_dict()
    if shown:
        plan_view(document)
    plan.check()
    return document
