"""The command line: each command reads its arguments, calls the library and shows the result.

Whatever needs torch is imported inside the commands, so that `--help` does not wait for it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from coachhook import report
from coachhook.backlog import latest, remaining
from coachhook.errors import CoachhookError, ConfigError, ContextLengthError, RequestError
from coachhook.loaders import load_requests
from coachhook.requests import EditRequest, check_batch

if TYPE_CHECKING:
    from coachhook.hookset import HookSet

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


class _Group(TyperGroup):
    """Turns what may happen to a user into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CoachhookError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except click.UsageError as error:
            typer.echo(f"error: {error.format_message()}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; the folder is at its last whole batch", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    help="Change single facts in a language model, with hooks beside its weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The `coachhook` command."""
    # Bars and advice of the layers below would only repeat, or contradict, our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark instead of a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="coachhook")


@app.command()
def edit(
    model: Model,
    facts: Facts,
    hooks: Hooks,
    batch_size: Annotated[int, typer.Option(min=1, help="Facts per batch.")] = 10,
    gate: Annotated[str | None, typer.Option(help="keyed, calibrated or sequence.")] = None,
    layers: Layers = None,
    template: Template = None,
    text: TextFile = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out malformed records.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Edit facts into a model, going on from what the folder already holds."""
    from coachhook import folder
    from coachhook.config import EditConfig
    from coachhook.editor import Editor
    from coachhook.hookset import HookSet
    from coachhook.models import load_model
    from coachhook.statistics import StatisticsSource

    wanted = _usable(facts, skip_invalid)
    path = None if text is None else str(text.resolve())
    config = EditConfig(
        layers=None if layers is None else parse_layers(layers),
        template=template,
        gate=gate or EditConfig.gate,
        statistics=StatisticsSource(path),
    )
    with folder.locked(hooks):
        held = HookSet.from_pretrained(hooks) if folder.exists(hooks) else None
        if held is not None:
            asked = {"gate": gate, "layers": config.layers, "template": template, "text": path}
            _check_settings(asked, held, hooks)
        done = [] if held is None else [record.request for record in held.edits]
        left = remaining(done, wanted)
        # All of them are checked before the first, and before the model is loaded.
        batches = [
            check_batch(left[first : first + batch_size])
            for first in range(0, len(left), batch_size)
        ]
        edited: list[dict[str, Any]] = []
        if batches:
            editor = (
                Editor.from_pretrained(model, config=config)
                if held is None
                else Editor.resume(hooks, *load_model(model))
            )
            for batch in batches:
                editor.check(batch)
            for batch in batches:
                outcome = editor.edit(batch)
                editor.hooks.save_pretrained(hooks)
                edited.append(report.batch_document(outcome.number, outcome.edits))
                if not as_json:
                    report.batch_view(edited[-1])
    document = {
        "folder": str(hooks),
        "facts": len(wanted),
        "already_in_place": len(wanted) - len(left),
        "batches": edited,
    }
    report.show(document, report.edited_view, as_json=as_json)


@app.command("eval")
def evaluate(
    model: Model,
    facts: Facts,
    hooks: Hooks,
    text: TextFile = None,
    as_json: Json = False,
) -> None:
    """Measure what the edits do to the facts of a file, and to everything else."""
    from coachhook.evaluate import evaluate as measure

    requests = latest(_usable(facts, skip_invalid=False))
    page = None if text is None else _page(text)
    loaded, tokenizer, hookset = _hooked(model, hooks)
    result = measure(loaded, tokenizer, hookset, requests, page)
    report.show(result.to_dict(), report.evaluation_view, as_json=as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    hooks: Hooks,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completion.")] = 40,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the gates open.")] = False,
    as_json: Json = False,
) -> None:
    """Complete a prompt greedily, without and with the edits."""
    from coachhook.generation import complete
    from coachhook.tokens import context_length

    if not prompt:
        raise RequestError("the prompt is empty; give at least one word")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError("the prompt is not UTF-8 text; set the terminal to UTF-8")
    loaded, tokenizer, hookset = _hooked(model, hooks)
    length, limit = len(tokenizer(prompt)["input_ids"]), context_length(loaded)
    if limit is not None and length + max_new_tokens > limit:
        raise ContextLengthError(
            f"the prompt has {length} tokens, which with {max_new_tokens} new ones do not fit the "
            f"model's context of {limit}; shorten it, or ask for fewer"
        )
    with hookset.off(loaded):
        (unedited,) = complete(loaded, tokenizer, [prompt], max_new_tokens)
    (edited,) = complete(loaded, tokenizer, [prompt], max_new_tokens)
    document: dict[str, Any] = {"prompt": prompt, "unedited": unedited, "edited": edited}
    if trace:
        found = hookset.trace(loaded, tokenizer, prompt + edited)
        named = sorted(set(found.edit[found.is_open].tolist()) - {-1})
        document |= {
            "gate": hookset.config.gate,
            "trace": found.to_dict(),
            "edits": {i: report.fact(hookset.edits[i].request) for i in named},
        }
    report.show(document, report.completion_view, as_json=as_json)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    as_json: Json = False,
) -> None:
    """Tell what a folder holds: base model, settings, batches, edits. Needs no model."""
    from coachhook.hookset import HookSet

    hookset = HookSet.from_pretrained(directory)
    document = report.inspection_document(directory, hookset)
    report.show(document, report.inspection_view, as_json=as_json)


@app.command()
def rollback(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    to: Annotated[int, typer.Option("--to", help="The last batch to keep; 0 keeps none.")],
    as_json: Json = False,
) -> None:
    """Forget every batch after batch TO. Needs no model."""
    from coachhook import folder
    from coachhook.hookset import HookSet

    folder.read_config(directory)  # before the lock, which would make a folder that is missing
    with folder.locked(directory):
        hookset = HookSet.from_pretrained(directory)
        batches = hookset.journal.batches
        if not 0 <= to <= len(batches):
            raise ConfigError(
                f"there is no batch {to} in {directory}; give a number from 0 to {len(batches)}"
            )
        before = len(batches)
        hookset.journal.forget_after(to)
        hookset.save_pretrained(directory)
    document = {
        "folder": str(directory),
        "batches_before": before,
        "batches": to,
        "edits": len(hookset.edits),
    }
    report.show(document, report.rollback_view, as_json=as_json)


@app.command()
def compact(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    keep: Annotated[int, typer.Option(min=0, help="Latest batches to leave as they are.")] = 0,
    as_json: Json = False,
) -> None:
    """Merge batches into one, which cannot be taken apart any more. Needs no model."""
    from coachhook import folder
    from coachhook.hookset import HookSet

    folder.read_config(directory)  # before the lock, which would make a folder that is missing
    with folder.locked(directory):
        hookset = HookSet.from_pretrained(directory)
        before = report.folder_bytes(directory)
        hookset.compact(keep)
        hookset.save_pretrained(directory)
    document = {
        "folder": str(directory),
        "batches": len(hookset.journal.batches),
        "merged_batches": hookset.journal.merged,
        "edits": len(hookset.edits),
        "bytes_before": before,
        "bytes": report.folder_bytes(directory),
    }
    report.show(document, report.compaction_view, as_json=as_json)


@app.command()
def statistics(
    model: Model,
    layers: Layers = None,
    template: Template = None,
    text: TextFile = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of text to read; without it, 8 a dimension and 16,384 at least."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the key statistics that editing needs, or find them in the cache.

    Several processes share the work: torchrun --nproc-per-node 2 -m coachhook statistics …
    """
    from coachhook.models import Architecture, check_layers, default_layers, load_model
    from coachhook.processes import joined
    from coachhook.statistics import StatisticsSource, key_statistics

    chosen = None if layers is None else parse_layers(layers)
    source = StatisticsSource(None if text is None else str(text.resolve()), tokens)
    with joined() as processes:
        loaded, tokenizer = load_model(model)
        architecture = Architecture.of(loaded, template)
        n_blocks = len(architecture.blocks(loaded))
        hooked = check_layers(chosen or default_layers(n_blocks), n_blocks)
        found = key_statistics(loaded, tokenizer, architecture, hooked, source, processes)
        if processes.is_first:
            document = {"model": model, "layers": report.statistics_entries(found)}
            report.show(document, report.statistics_view, as_json=as_json)


@app.command()
def demo(
    hooks: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="An empty folder for the edits; a temporary one else."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Edit thirty facts into the embedded model, and generate with them in a fresh process."""
    from coachhook.demo import run

    if not run(hooks, as_json=as_json):
        raise typer.Exit(1)


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


def _usable(facts: Path, skip_invalid: bool) -> list[EditRequest]:
    loaded = load_requests(facts, skip_invalid=skip_invalid)
    for reason in loaded.skipped:
        typer.echo(f"skipped: {reason}", err=True)
    if not loaded.requests:
        raise RequestError(f"{facts} has no valid record; give at least one fact")
    return loaded.requests


def _page(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read text from {text}: {error}") from error


def _check_settings(asked: Mapping[str, Any], held: HookSet, directory: Path) -> None:
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


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _hooked(name: str, directory: Path) -> tuple[Any, Any, HookSet]:
    """A model with the hooks of a folder on it, its tokenizer, and the hooks."""
    from coachhook.hookset import HookSet
    from coachhook.models import load_model

    hookset = HookSet.from_pretrained(directory)
    model, tokenizer = load_model(name)
    hookset.attach(model)
    return model, tokenizer, hookset
