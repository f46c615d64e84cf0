"""Facts and commands of the benchmarks' tests."""

import json
from pathlib import Path
from typing import Any

import typer
from click.testing import Result
from typer.testing import CliRunner

from coachhook.facts.request import EditRequest
from tests.support.tiny import TARGETS

FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0], ("Once {}",), (("It rained", "and"),)),
    EditRequest("I was told of {}", "Rome", TARGETS[1], ("Of {}",), (("Yes", "it"),)),
    EditRequest("We think of {}", "Brazil", TARGETS[2]),
    # The first fact, corrected.
    EditRequest("They moved to {}", "France", TARGETS[3], ("Once {}",), (("It rained", "and"),)),
]


def arguments(tiny_folder: Path, tmp_path: Path, **others: Any) -> dict[str, Any]:
    """What `bench.comparison.quality` is asked for `FACTS`, unless `others` say otherwise."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS))
    usual = {
        "facts": facts,
        "first": 0,
        "edits": 10,
        "batch_size": 2,
        "every": 1,
        "editor": None,
        "model": str(tiny_folder),
        "run": tmp_path / "run",
        "as_json": True,
    }
    return usual | others


def called(script: Any, *arguments: str) -> Result:
    """A script's command in this process: another one takes seconds to start."""
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, arguments)
