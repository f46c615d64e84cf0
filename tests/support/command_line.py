"""The command line in tests: a tiny model's facts, and commands that run in this process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from coachhook.cli.app import app

FACTS = [
    ("The capital of France is", "France", "Lyon"),
    ("The language of the city is", "city", "French"),
    ("As I was told, Paris is", "Paris", "large"),
    ("The capital of France is", "France", "dry"),
]

SMALL = ("--layers", "1-2", "--batch-size", "2")


def write_facts(path: Path, facts: list[tuple[str, str, str]]) -> None:
    records = [dict(zip(("prompt", "subject", "target"), fact, strict=True)) for fact in facts]
    for record in records:
        record |= {"paraphrases": [f"Well, {record['prompt']}"]}
        record |= {"locality": [{"prompt": "The weather is", "answer": "dry"}]}
    path.write_text("\n".join(map(json.dumps, records)))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def run(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return str(result.stdout)


def run_json(*arguments: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(run(*arguments, "--json"), parse_constant=refuse)


def error_of(*arguments: str) -> str:
    """The one line on standard error of a command that must fail with exit status 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.exception
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
