"""The table's lines in a file, one JSON object each, written as they come; and what they say about
which cases come next."""

import json
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
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(path: Path) -> list[Line]:
    """The lines of a file that may have been cut at any moment, or may not be there."""
    found: list[Line] = []
    if not path.exists():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def unfinished(lines: Iterable[Line]) -> list[str]:
    """The cases that were begun and of which nothing was heard."""
    begun: dict[str, None] = {}
    for line in lines:
        if "begun" in line:
            begun[line["begun"]] = None
        else:
            begun.pop(line.get("key", ""), None)
    return list(begun)


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
