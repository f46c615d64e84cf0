"""The command line: each command reads its arguments, calls the library and shows the result.

Whatever needs torch is imported inside the commands, so that `--help` does not wait for it.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from coachhook.cli import views
from coachhook.cli.arguments import (
    Facts,
    Hooks,
    Json,
    Layers,
    Model,
    Template,
    TextFile,
    check_settings,
    checked,
    page_of,
    parse_layers,
    profiled,
    usable,
    with_hooks,
)
from coachhook.errors import CoachhookError, ConfigError, ContextLengthError, RequestError
from coachhook.facts.remaining import latest, remaining
from coachhook.facts.request import check_batch


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
            typer.echo(
                "interrupted; a folder that was being edited is at its last whole batch", err=True
            )
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
    from coachhook.calibration import profiles
    from coachhook.config import EditConfig
    from coachhook.editor import Editor
    from coachhook.hookset import HookSet
    from coachhook.journal import folder
    from coachhook.models.architecture import Architecture, check_layers, default_layers
    from coachhook.models.loading import load_model
    from coachhook.plan import Sizes, check_weights, edit_plan
    from coachhook.statistics.source import StatisticsSource
    from coachhook.system.processes import joined

    wanted = usable(facts, skip_invalid)
    path = None if text is None else str(text.resolve())
    config = EditConfig(
        layers=None if layers is None else parse_layers(layers),
        template=template,
        gate=gate or EditConfig.gate,
        statistics=StatisticsSource(path),
    )
    with joined() as processes, ExitStack() as holding:
        first = processes.is_first
        if first:
            holding.enter_context(folder.locked(hooks))
        # The others look into the folder once the first has it.
        processes.everyone(True)
        held = HookSet.from_pretrained(hooks) if folder.exists(hooks) else None
        if held is not None:
            asked = {"gate": gate, "layers": config.layers, "template": template, "text": path}
            check_settings(asked, held, hooks)
            if profile is not None and profiles.load(profile).settings.applied(held.config) != (
                held.config
            ):
                raise ConfigError(
                    f"{hooks} was made with other settings than those of {profile}; "
                    "leave --profile out, or use another folder"
                )
        done = [] if held is None else [record.request for record in held.edits]
        left = remaining(done, wanted)
        # All of them are checked before the first, and before the model is loaded.
        batches = [
            check_batch(left[start : start + batch_size])
            for start in range(0, len(left), batch_size)
        ]
        edited: list[dict[str, Any]] = []
        plan = None
        if batches:
            check_weights(model)
            loaded, tokenizer = load_model(model)
            if held is not None:
                held.check_base(loaded)
                config = held.config
            else:
                config = profiled(config, loaded, profile, shown=first)
            architecture = Architecture.of(loaded, config.template)
            n_blocks = len(architecture.blocks(loaded))
            hooked = check_layers(config.layers or default_layers(n_blocks), n_blocks)
            sizes = Sizes.of(loaded, architecture)
            plan = checked(
                edit_plan(sizes, hooked, config, tokenizer, left, batch_size, len(done)),
                shown=first and not as_json,
            )
            editor = (
                Editor.from_pretrained(loaded, tokenizer, config=config, processes=processes)
                if held is None
                else Editor.resume(hooks, loaded, tokenizer, processes=processes)
            )
            for batch in batches:
                editor.check(batch)
            for batch in batches:
                outcome = editor.edit(batch)
                editor.save_pretrained(hooks)
                if first:
                    edited.append(views.batch_document(outcome.number, outcome.edits))
                    if not as_json:
                        views.batch_view(edited[-1])
        if first:
            document = {
                "folder": str(hooks),
                "facts": len(wanted),
                "already_in_place": len(wanted) - len(left),
                "plan": plan,
                "batches": edited,
            }
            views.show(document, views.edited_view, as_json=as_json)


@app.command("eval")
def evaluate(
    model: Model,
    facts: Facts,
    hooks: Hooks,
    text: TextFile = None,
    as_json: Json = False,
) -> None:
    """Measure what the edits do to the facts of a file, and to everything else."""
    from coachhook.evaluation.evaluate import evaluate as measure

    requests = latest(usable(facts, skip_invalid=False))
    page = None if text is None else page_of(text)
    loaded, tokenizer, hookset = with_hooks(model, hooks)
    result = measure(loaded, tokenizer, hookset, requests, page)
    views.show(result.to_dict(), views.evaluation_view, as_json=as_json)


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
    from coachhook.models.decoding import complete
    from coachhook.models.tokens import context_length

    if not prompt:
        raise RequestError("the prompt is empty; give at least one word")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError("the prompt is not UTF-8 text; set the terminal to UTF-8")
    loaded, tokenizer, hookset = with_hooks(model, hooks)
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
            "edits": {i: views.fact(hookset.edits[i].request) for i in named},
        }
    views.show(document, views.completion_view, as_json=as_json)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    as_json: Json = False,
) -> None:
    """Tell what a folder holds: base model, settings, batches, edits. Needs no model."""
    from coachhook.hookset import HookSet

    hookset = HookSet.from_pretrained(directory)
    document = views.inspection_document(directory, hookset)
    views.show(document, views.inspection_view, as_json=as_json)


@app.command()
def rollback(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    to: Annotated[int, typer.Option("--to", help="The last batch to keep; 0 keeps none.")],
    as_json: Json = False,
) -> None:
    """Forget every batch after batch TO. Needs no model."""
    from coachhook.hookset import HookSet
    from coachhook.journal import folder

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
    views.show(document, views.rollback_view, as_json=as_json)


@app.command()
def compact(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    keep: Annotated[int, typer.Option(min=0, help="Latest batches to leave as they are.")] = 0,
    as_json: Json = False,
) -> None:
    """Merge batches into one, which cannot be taken apart any more. Needs no model."""
    from coachhook.hookset import HookSet
    from coachhook.journal import folder

    folder.read_config(directory)  # before the lock, which would make a folder that is missing
    with folder.locked(directory):
        hookset = HookSet.from_pretrained(directory)
        before = views.folder_bytes(directory)
        hookset.compact(keep)
        hookset.save_pretrained(directory)
    document = {
        "folder": str(directory),
        "batches": len(hookset.journal.batches),
        "merged_batches": hookset.journal.merged,
        "edits": len(hookset.edits),
        "bytes_before": before,
        "bytes": views.folder_bytes(directory),
    }
    views.show(document, views.compaction_view, as_json=as_json)


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
    from coachhook.models.architecture import Architecture, check_layers, default_layers
    from coachhook.models.loading import load_model
    from coachhook.plan import Sizes, check_weights, statistics_plan
    from coachhook.statistics.measure import key_statistics
    from coachhook.statistics.source import StatisticsSource
    from coachhook.system.processes import joined

    chosen = None if layers is None else parse_layers(layers)
    source = StatisticsSource(None if text is None else str(text.resolve()), tokens)
    check_weights(model)
    with joined() as processes:
        loaded, tokenizer = load_model(model)
        architecture = Architecture.of(loaded, template)
        n_blocks = len(architecture.blocks(loaded))
        hooked = check_layers(chosen or default_layers(n_blocks), n_blocks)
        plan = checked(
            statistics_plan(Sizes.of(loaded, architecture), hooked, source),
            shown=processes.is_first and not as_json,
        )
        found = key_statistics(loaded, tokenizer, architecture, hooked, source, processes)
        if processes.is_first:
            document = {"model": model, "plan": plan, "layers": views.statistics_entries(found)}
            views.show(document, views.statistics_view, as_json=as_json)


@app.command()
def calibrate(
    model: Model,
    layers: Layers = None,
    template: Template = None,
    text: TextFile = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Minutes; it ends at the first trial after them.")
    ] = 6,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the profile here; 'edit' must then be told."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the settings that suit a model by probe edits; 'edit' uses them from then on."""
    from dataclasses import asdict

    from coachhook.calibration import profiles
    from coachhook.calibration.probe_edits import probe_requests
    from coachhook.calibration.search import MOST_TRIALS, layers_to_read
    from coachhook.calibration.search import calibrate as search
    from coachhook.models.architecture import Architecture
    from coachhook.models.loading import load_model
    from coachhook.plan import Sizes, calibration_plan, check_weights
    from coachhook.statistics.source import StatisticsSource

    chosen = None if layers is None else parse_layers(layers)
    source = StatisticsSource(None if text is None else str(text.resolve()))
    check_weights(model)
    loaded, tokenizer = load_model(model)
    architecture = Architecture.of(loaded, template)
    read = layers_to_read(loaded, architecture, chosen, source)
    sizes = Sizes.of(loaded, architecture)
    needed = calibration_plan(sizes, read, source, tokenizer, probe_requests(), MOST_TRIALS)
    plan = checked(needed, shown=not as_json)
    result = search(
        loaded, tokenizer, layers=chosen, template=template, source=source, minutes=budget
    )
    path = output or profiles.default_path(result.profile.identity)
    profiles.save(result.profile, path)
    if not result.took:
        views.tell(
            "warning: under no settings did half of the probe edits take; these are the best found"
        )
    document = {
        "model": model,
        "profile": str(path),
        "plan": plan,
        "settings": result.profile.to_dict()["settings"],
        "layers": [asdict(layer) for layer in result.layers],
        "trials": [asdict(trial) for trial in result.trials],
        "seconds": result.seconds,
        "cut_short": result.cut_short,
    }
    views.show(document, views.calibration_view, as_json=as_json)


@app.command("report")
def report_page(
    run: Annotated[
        Path,
        typer.Argument(
            exists=True,
            metavar="RUN",
            help="A folder of bench.comparison.quality --run, its JSON, or that of eval or demo.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The HTML file; beside RUN by default.")
    ] = None,
) -> None:
    """Write what a run found as one HTML file to look at, and name it."""
    from coachhook.report.page import write_report
    from coachhook.report.runs import load_run

    target = output or (run / "report.html" if run.is_dir() else run.with_suffix(".html"))
    place = target.resolve()
    if place == run.resolve() or (place.suffix != ".html" and place.parent == run.resolve()):
        raise ConfigError(f"{target} is what the page is made of; name another file with --output")
    write_report(load_run(run), target)
    typer.echo(str(target))


@app.command()
def demo(
    hooks: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="An empty folder for the edits; a temporary one else."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Edit thirty facts into the embedded model, and generate with them in a fresh process."""
    from coachhook.cli.demo import run

    if not run(hooks, as_json=as_json):
        raise typer.Exit(1)
