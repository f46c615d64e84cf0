"""The command that edits facts into a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coachhook.cli.arguments import (
    Facts,
    Hooks,
    Json,
    Layers,
    Model,
    Readout,
    Template,
    TextFile,
    checked,
    parse_layers,
    usable,
)
from coachhook.cli.views.console import show, tell
from coachhook.cli.views.edits import batch_document, batch_view, edited_view

if TYPE_CHECKING:
    from coachhook.session import Settings


def edit(
    model: Model,
    facts: Facts,
    hooks: Hooks,
    batch_size: Annotated[int, typer.Option(min=1, help="Facts per batch.")] = 10,
    readout: Readout = None,
    gate: Annotated[str | None, typer.Option(help="keyed, calibrated or sequence.")] = None,
    layers: Layers = None,
    template: Template = None,
    text: TextFile = None,
    profile: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Settings from 'calibrate --output'."),
    ] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out malformed records.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Edit facts into a model, going on from what the folder already holds.

    Several processes share the work: torchrun --nproc-per-node 2 -m coachhook edit …
    """
    from coachhook.editor import name_of
    from coachhook.models.loading import load_model
    from coachhook.plan import check_weights
    from coachhook.session import Options, opened
    from coachhook.system.processes import joined

    wanted = usable(facts, skip_invalid)
    source = None if text is None else str(text.resolve())
    options = Options(gate, parse_layers(layers), template, source, profile, readout)
    with joined() as processes, opened(hooks, wanted, batch_size, options, processes) as session:
        document: dict[str, Any] = {
            "folder": str(hooks),
            "facts": len(wanted),
            "already_in_place": len(wanted) - len(session.requests),
            "plan": None,
            "batches": [],
        }
        if not session.batches and session.held and session.held.base.name != name_of(model):
            # Nothing is left to do, if the folder is this model's.
            session.settings(load_model(model).model)
        if session.batches:
            check_weights(model)
            lm = load_model(model)
            settings = session.settings(lm.model)
            if processes.is_first and session.held is None:
                tell_settings(settings)
            shown = processes.is_first and not as_json
            plan = session.plan(lm, settings.config)
            document["plan"] = checked(plan, shown=shown)
            editor = session.editor(lm, settings.config)
            for report in session.edit(editor):
                batch = batch_document(report.number, report.edits)
                document["batches"].append(batch)
                if shown:
                    batch_view(batch)
        if processes.is_first:
            show(document, edited_view, as_json=as_json)


def tell_settings(settings: Settings) -> None:
    """Say where the settings of a new folder come from."""
    if settings.profile is None:
        tell("default settings; 'coachhook calibrate MODEL' finds this model's own")
        return
    if not settings.is_of_model:
        tell(f"warning: {settings.path} was made for another model ({settings.profile.model})")
    tell(f"settings from {settings.path}")
