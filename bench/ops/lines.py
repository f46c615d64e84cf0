"""The table's lines in a file, one JSON object each, written as they come; and what they say about
which cases come next."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.ops.cases import Case

Line = dict[str, Any]
FAULT = "WRONG"
"""Begins the verdict of a case whose result is wrong or that failed."""


def key_of(case: Case) -> str:
    return f"{case.op} | {case.name} | {case.d_in}→{case.d_out} | {case.rows} rows"


def append(path: Path, line: Line) -> None:
    """One line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, ensure_ascii=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                # The end of a line that was cut, which would take this one with it.
                text = "\n" + text
        file.write(text.encode())


def read(path: Path) -> list[Line]:
    """The lines of a file that may have been cut at any moment, or may not be there."""
    found: list[Line] = []
    if not path.exists():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def says_outcome(line: Line) -> bool:
    """Whether it is the line that a case is done with, of whichever phase."""
    return "key" in line and ("verdict" in line or "outcome" in line)


def done(lines: Iterable[Line]) -> set[str]:
    """The cases of which the outcome is known."""
    return {line["key"] for line in lines if says_outcome(line)}


def unfinished(lines: Iterable[Line]) -> list[str]:
    """The cases that were begun and of which no outcome was heard, except for those forgiven."""
    begun: dict[str, None] = {}
    for line in lines:
        if "begun" in line:
            begun[line["begun"]] = None
        elif "forgiven" in line:
            begun.clear()
        elif says_outcome(line):
            begun.pop(line["key"], None)
    return list(begun)


def forgive(path: Path) -> None:
    """Give another chance to the cases that an earlier run left unfinished: most likely it was the
    run that was cut."""
    left = unfinished(read(path))
    if left:
        append(path, {"forgiven": left})


def excess(line: Line) -> float:
    """How far a line is from its target: the ratio as a multiple of the most allowed."""
    verdict = line.get("verdict", "")
    if verdict.startswith(FAULT) or "MISSED" not in verdict:
        return 0.0
    return float(line["ratio"]) / float(line.get("must") or 1.0)


def missed_cases(path: Path, cases: Sequence[Case]) -> list[Case]:
    """Those whose line in the file says that they missed their target, the worst first."""
    by_key = {key_of(case): case for case in cases}
    worst = {line["key"]: excess(line) for line in read(path) if excess(line) > 0}
    return [by_key[key] for key in sorted(worst, key=lambda k: -worst[k]) if key in by_key]


def one_of_each_first(cases: Sequence[Case]) -> list[Case]:
    """All cases, in rounds: one of each operation and kind before the second of any."""
    rounds: dict[tuple[str, str], int] = {}
    order = []
    for index, case in enumerate(cases):
        kind = (case.op, case.name)
        order.append((rounds.setdefault(kind, 0), index))
        rounds[kind] += 1
    return [cases[index] for _, index in sorted(order)]
