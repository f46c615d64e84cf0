"""What the commands of `coachhook.cli.app` take, and what they check before they work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coachhook.cli import views
from coachhook.errors import ConfigError, RequestError
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest

if TYPE_CHECKING:
    from coachhook.config import EditConfig
    from coachhook.hookset import HookSet
    from coachhook.plan import Plan

Model = Annotated[str, typer.Argument(help="smollm2, a folder with a checkpoint, or a hub id.")]
Facts = Annotated[Path, typer.Argument(help="A .jsonl, .json or .csv file of facts.")]
Hooks = Annotated[Path, typer.Option("--hooks", file_okay=False, help="The folder of edits.")]
Layers = Annotated[str | None, typer.Option(help="Blocks to hook: 8,9,10 or 8-12.")]
Template = Annotated[
    str | None,
    typer.Option(help="Name of the down-projections, as in 'model.layers.{}.mlp.down_proj'."),
]
TextFile = Annotated[
    Path | None, typer.Option("--text", exists=True, dir_okay=False, help="Ordinary text.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


_MOST_LAYERS = 10_000


def parse_layers(text: str) -> tuple[int, ...]:
    """The layers in "8,9,10", "8-12" or a mixture, in order. Raises `ConfigError`."""
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
    """The facts of a file; what is left out is told. Raises `RequestError` if nothing is left."""
    loaded = load_requests(facts, skip_invalid=skip_invalid)
    for reason in loaded.skipped:
        typer.echo(f"skipped: {reason}", err=True)
    if not loaded.requests:
        raise RequestError(f"{facts} has no valid record; give at least one fact")
    return loaded.requests


def page_of(text: Path) -> str:
    """The contents of a text file. Raises `ConfigError` if it cannot be read."""
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read text from {text}: {error}") from error


def check_settings(asked: Mapping[str, Any], held: HookSet, directory: Path) -> None:
    """Raise `ConfigError` if an option that was given is not what `directory` was made with."""
    settings = {
        "gate": held.config.gate,
        "layers": held.layers,
        "template": held.base.template,
        "text": held.config.statistics.path,
    }
    for name, value in asked.items():
        if value is not None and value != settings[name]:
            raise ConfigError(
                f"--{name} {_shown(value)} was asked for, but {directory} was made with "
                f"{_shown(settings[name])}; leave --{name} out, or use another folder"
            )


def profiled(config: EditConfig, model: Any, given: Path | None, *, shown: bool) -> EditConfig:
    """`config` with the settings of a profile, the one that is given or the model's own; which one
    is told, if `shown`."""
    from coachhook.calibration import profiles
    from coachhook.models.architecture import Architecture

    identity = profiles.identity(model, Architecture.of(model, config.template))
    found = profiles.find(identity) if given is None else profiles.load(given)
    tell = views.tell if shown else lambda _: None
    if found is None:
        tell("default settings; 'coachhook calibrate MODEL' finds this model's own")
        return config
    if found.identity != identity:
        tell(f"warning: {given} was made for another model ({found.model})")
    tell(f"settings from {given or profiles.default_path(identity)}")
    return found.settings.applied(config)


def checked(plan: Plan, *, shown: bool) -> dict[str, Any]:
    """The plan as it goes into a command's document. Refuses what cannot fit."""
    document = plan.to_dict()
    if shown:
        views.plan_view(document)
    plan.check()
    return document


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def with_hooks(name: str, directory: Path) -> tuple[Any, Any, HookSet]:
    """A model with the hooks of a folder on it, its tokenizer, and the hooks."""
    from coachhook.hookset import HookSet
    from coachhook.models.loading import load_model

    hookset = HookSet.from_pretrained(directory)
    model, tokenizer = load_model(name)
    hookset.attach(model)
    return model, tokenizer, hookset
