import json
import subprocess
import sys
from pathlib import Path

import pytest

from coachhook.cli.arguments import parse_layers
from coachhook.cli.views.console import say, show
from coachhook.cli.views.edits import edited_view
from coachhook.errors import ConfigError
from tests.support.command_line import (
    environment,
    error_of,
    run,
)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, coachhook.cli.app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(coachhook.cli.app.app, ['--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


@pytest.mark.parametrize(
    "command", ["edit", "eval", "generate", "inspect", "rollback", "compact", "demo"]
)
def test_help_of_a_command(command: str) -> None:
    assert "--json" in run(command, "--help")


@pytest.mark.parametrize(
    ("text", "layers"),
    [("8", (8,)), ("8,9,10", (8, 9, 10)), ("8-12", (8, 9, 10, 11, 12)), ("3, 0-1", (0, 1, 3))],
)
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "8-", "-8", "12-8", "8,,9", "8.5", "1-2-3"])
def test_bad_layers(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read layers"):
        parse_layers(text)


def test_errors_are_one_line(edited: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert "no such file" in error_of("edit", "tiny", "none.jsonl", "--hooks", missing)
    assert "holds no hooks" in error_of("generate", "tiny", "Hello", "--hooks", missing)
    assert "holds no hooks" in error_of("eval", "tiny", "facts.jsonl", "--hooks", missing)
    assert "holds no hooks" in error_of("inspect", missing)
    assert "holds no hooks" in error_of("rollback", missing, "--to", "0")
    assert "holds no hooks" in error_of("compact", missing)
    assert not Path(missing).exists()
    assert "prompt is empty" in error_of("generate", "tiny", "", "--hooks", str(edited))
    long = ("generate", "tiny", "Hello", "--hooks", str(edited), "--max-new-tokens", "128")
    assert "context of 128" in error_of(*long)
    assert "layers [7]" in error_of("statistics", "tiny", "--layers", "7")
    assert "256 tokens" in error_of("statistics", "tiny", "--tokens", "3")
    line = error_of("generate", "other", "Hello", "--hooks", str(edited))
    assert "were made for" in line
    assert "/tiny'" in line
    assert "cannot load model" in error_of("statistics", str(tmp_path))
    assert "already holds edits" in error_of("demo", "--hooks", str(edited))


def test_markup_and_infinities_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say("a [bold]bracket[/bold]")
    show({"a": (float("inf"), float("nan"), 1.5)}, edited_view, as_json=True)
    bracket, _, document = capsys.readouterr().out.partition("\n")
    assert bracket == "a [bold]bracket[/bold]"
    assert json.loads(document) == {"a": [None, None, 1.5]}
