"""The first minutes with a GPU: one command, of use whenever it is cut.

    PYTHONPATH=.:kernels python -m bench.first_contact --out DIR [--minutes 10]

Facts of the machine, compilation side by side, correctness, the table of operations, a whole model,
a search of configurations for what missed its target, the worst first. Every phase is a process of
its own, ended with its children when its time is over. It writes its results to `DIR/PHASE.jsonl`
line by line and what it prints to `DIR/PHASE.log`; after each, `DIR/summary.txt` and `summary.json`
are new. Without a GPU everything runs through Triton's interpreter on tiny shapes, to try
the script itself: then no time means anything. Exit code 1 if any result was wrong.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from bench.first_contact import phases, summary
from bench.harness.orphans import end_with
from bench.harness.script import run_script
from bench.ops import lines
from coachhook.system.files import file_lock

ROOT = Path(__file__).parents[2]
RESERVE = 5.0
"""Seconds kept for the summary, and between a phase's last beginning of anything and its end."""
LEAST = 10.0
"""A phase with fewer seconds does not begin."""
ATTEMPTS = 5
"""Times that a phase which broke off is begun again; it leaves out what it has done."""


class Phase(NamedTuple):
    """share: of the time that is left when it begins."""

    name: str
    share: float


PLAN = (
    Phase("facts", 0.1),
    Phase("compile", 0.2),
    Phase("check", 0.3),
    Phase("table", 0.6),
    Phase("inference", 0.35),
    Phase("tune", 1.0),
)


def environment() -> dict[str, str]:
    """Of the phases: the packages of this folder, and the interpreter where there is no GPU."""
    found = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    # Set for tests on a machine like this, it would run the kernels of a GPU in the interpreter.
    found.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        found["TRITON_INTERPRET"] = "1"
    return found


def command(name: str, out: Path, until: float) -> list[str]:
    """Of one phase, which is to begin nothing after the time `until` of `time.monotonic`."""
    of_phase = ["--phase", name, "--until", str(until), "--parent", str(os.getpid())]
    return [sys.executable, "-m", "bench.first_contact", "--out", str(out.resolve()), *of_phase]


def run_phase(name: str, out: Path, limit: float) -> int | None:
    """Run one phase in a process group of its own. Its exit code; None if its time was over."""
    with (out / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command(name, out, time.monotonic() + limit - RESERVE),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # What the phase started ends with it, in good order or not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # The driver may hold a process that nothing ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(RESERVE)


def run_all(out: Path, minutes: float) -> None:
    """All phases in their order, as far as the time goes."""
    end = time.monotonic() + 60 * minutes
    for phase in PLAN:
        lines.forgive(out / f"{phase.name}.jsonl")
    for phase in PLAN:
        for _ in range(ATTEMPTS):
            before = len(lines.read(out / f"{phase.name}.jsonl"))
            left = end - RESERVE - time.monotonic()
            if left < LEAST:
                code: int | str | None = "no time left"
            else:
                limit = max(LEAST, phase.share * left)
                began = time.monotonic()
                code = run_phase(phase.name, out, limit)
                lines.append(
                    out / "phases.jsonl",
                    {
                        "phase": phase.name,
                        "seconds": round(time.monotonic() - began, 1),
                        "limit": round(limit, 1),
                        "exit_code": "its time was over" if code is None else code,
                    },
                )
            summary.write(out)
            # What left no line behind would only break off again at the same place.
            gained = len(lines.read(out / f"{phase.name}.jsonl")) > before
            if code in (0, None, "no time left") or not gained:
                break


def main(
    out: Annotated[Path, typer.Option(help="a folder for the results")],
    minutes: Annotated[float, typer.Option(min=1.0, help="for everything")] = 10.0,
    phase: Annotated[str | None, typer.Option(hidden=True)] = None,
    until: Annotated[float, typer.Option(hidden=True)] = 0.0,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Meet a GPU: is everything right, how fast is it, and which configurations suit it?"""
    if phase is not None:
        if parent is not None:
            # Killed, it could not end this phase, which would share the GPU with the next run.
            end_with(parent)
        phases.run(phase, out, until)
        return
    out.mkdir(parents=True, exist_ok=True)
    # As an exception, which ends the phase on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with file_lock(out / ".lock"):
            run_all(out, minutes)
    except BlockingIOError:
        sys.exit(f"error: another run writes to {out}; wait for it, or name another folder")
    print((out / "summary.txt").read_text(encoding="utf-8"))
    if summary.collect(out)["wrong"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
