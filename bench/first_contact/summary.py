"""What the lines of all phases say so far, in short."""

import json
from pathlib import Path
from typing import Any

from bench.ops import lines
from coachhook.system.files import write as write_whole

Line = dict[str, Any]
NO_TIMES = "NO GPU: Triton's interpreter on tiny shapes. The times below mean nothing."


def collect(out: Path) -> dict[str, Any]:
    """The summary, JSON-ready. wrong: what gave a wrong result or failed, with the reason."""
    facts: Line = {}
    for line in lines.read(out / "facts.jsonl"):
        facts |= line
    # Of what was done again, the last word counts.
    checks = latest(lines.read(out / "check.jsonl"))
    rows = [line for line in latest(lines.read(out / "table.jsonl")) if line.get("verdict")]
    models = lines.read(out / "inference.jsonl")
    wrong = [f"{line['key']}: {line['why']}" for line in checks if line.get("outcome") == "failed"]
    wrong += [f"{row['key']}: {row['verdict']}" for row in rows if is_wrong(row)]
    wrong += [f"whole model, {line['gate']}: {line['fault']}" for line in models if "fault" in line]
    return {
        "times_mean_nothing": not facts.get("gpu", False),
        "facts": facts,
        "phases": lines.read(out / "phases.jsonl"),
        "not_compiled": not_compiled(lines.read(out / "compile.jsonl")),
        "checks_passed": sum(line.get("outcome") == "passed" for line in checks),
        "wrong": wrong,
        "reached": [row for row in rows if not is_wrong(row) and "MISSED" not in row["verdict"]],
        "missed": sorted(
            (row for row in rows if lines.excess(row)), key=lambda r: -lines.excess(r)
        ),
        "models": models,
        "tuned": lines.read(out / "tune.jsonl"),
    }


def latest(found: list[Line]) -> list[Line]:
    """The last line of each contender of each case, or of each check, that says what came of it."""
    return list(
        {
            (line["key"], line.get("contender")): line for line in found if lines.says_outcome(line)
        }.values()
    )


def not_compiled(found: list[Line]) -> list[Line]:
    """The faults of the last compilation, which ends with how many were `compiled`."""
    before = [i + 1 for i, line in enumerate(found[:-1]) if "compiled" in line]
    begin = max(before, default=0)
    return [line for line in found[begin:] if "fault" in line]


def is_wrong(row: Line) -> bool:
    return str(row["verdict"]).startswith(lines.FAULT)


def text_of(found: dict[str, Any]) -> str:
    """The summary for people."""
    facts = found["facts"]
    told = [NO_TIMES] if found["times_mean_nothing"] else []
    told += [
        f"{facts.get('device')}, torch {facts.get('torch')}, Triton {facts.get('triton')}",
        f"copy {facts.get('copy_gb_s', 0):.0f} GB/s, "
        f"products {facts.get('matmul_tflop_s', 0):.1f} TFLOP/s",
    ]
    told += ["", "Phases"]
    told += [
        f"  {line['phase']}: {line['seconds']} s of {line['limit']}, exit code {line['exit_code']}"
        for line in found["phases"]
    ]
    told += ["", f"Checks passed: {found['checks_passed']}; wrong: {len(found['wrong'])}"]
    told += [f"  {line}" for line in found["wrong"]]
    told += [f"  not compiled: {line['key']}: {line['fault']}" for line in found["not_compiled"]]
    for name in ("missed", "reached"):
        told += ["", f"Targets {name}: {len(found[name])}"]
        told += [
            f"  {row['key']} | {row['microseconds']:.1f} µs | "
            f"×{row['ratio']:.3f} | {row['verdict']}"
            for row in found[name]
        ]
    told += ["", "Whole model, speed against unhooked"]
    told += [
        f"  {line['model']} {line['gate']}, {line['edits']} edits, Δ {line['delta']}: "
        f"{row['case']}, batch {row['batch']}: {row['ratio']:.3f}"
        for line in found["models"]
        for row in line.get("rows", ())
    ]
    told += ["", "Tuned: time over the default's"]
    told += [
        f"  {line['kernel']} {line['when']}: {line.get('config') or 'default'} "
        f"×{line.get('ratio', 1):.3f} {line.get('fault', '')}"
        for line in found["tuned"]
    ]
    return "\n".join(told) + "\n"


def write(out: Path) -> None:
    """`summary.json` and `summary.txt`, each whole or as it was."""
    found = collect(out)
    write_whole(out / "summary.json", f"{json.dumps(found, indent=1)}\n".encode())
    write_whole(out / "summary.txt", text_of(found).encode())
