"""The command line: each command reads its arguments, calls the library and shows the result.

Whatever needs torch is imported inside the commands, so that `--help` does not wait for it.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coachhook.cli.arguments import Json
from coachhook.cli.edit import edit
from coachhook.cli.folders import compact, inspect, rollback
from coachhook.cli.inference import evaluate, generate
from coachhook.cli.preparation import calibrate, statistics
from coachhook.errors import CoachhookError, ConfigError

# A mistake in the arguments. typer carries a click of its own, and has no public name for it.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """Turns the errors that a user may run into into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CoachhookError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except _UsageError as error:
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
# In the order of the help page; `report` and `demo` follow.
app.command()(edit)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(inspect)
app.command()(rollback)
app.command()(compact)
app.command()(statistics)
app.command()(calibrate)


def main() -> None:
    """The `coachhook` command."""
    # The libraries' own progress bars and advice would repeat or contradict ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark instead of a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="coachhook")


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
    from coachhook.cli.views.console import tell
    from coachhook.cli.views.evaluation import memory_lines
    from coachhook.report.page import write_report
    from coachhook.report.runs import load_run

    target = output or (run / "report.html" if run.is_dir() else run.with_suffix(".html"))
    place = target.resolve()
    if place == run.resolve() or (place.suffix != ".html" and place.parent == run.resolve()):
        raise ConfigError(f"{target} is what the page is made of; name another file with --output")
    found = load_run(run)
    write_report(found, target)
    for name, result in found.editors.items():
        for point in result["points"][-1:]:
            for line in memory_lines(point.get("memory")):
                tell(f"{name}: {line}")
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
