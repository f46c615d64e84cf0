"""The phases of the first contact, each run in a process of its own: `run(name, out, until)`.

until: the time of `time.monotonic` to begin nothing more after. A phase that is begun again in the
same folder leaves out what its lines say is done.
"""

import faulthandler
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

from bench.harness.machine import device_name, machine, main_device
from bench.harness.script import WrongResultError
from bench.harness.timing import copy_bandwidth, matmul_rate
from bench.ops import cases as ops_cases
from bench.ops import lines, memory, table, tune
from bench.ops.cases import Case, all_cases, contenders
from bench.ops.compiling import Compilers, Variant
from bench.ops.interpreted import TINY, interpreted
from coachhook_kernels.launch import tuning

HANGS = 60
"""Seconds after which a case that is not done ends the process."""
HUNG = "it hung, or took its process down"
MOST_PROCESSES = 12
TESTS = ("tests/kernels",)
MODELS = (
    {"gate": "keyed", "edits": 1000, "dense": True},
    {"gate": "memory", "edits": 10_000},
    {"gate": "keyed", "edits": 1000, "dense": False},
    {"gate": "calibrated", "edits": 1000, "dense": False},
    {"gate": "memory", "edits": 100_000},
)

Phase = Callable[[Path, float], None]


def run(name: str, out: Path, until: float) -> None:
    """Run one phase; its lines go to `out/name.jsonl`."""
    # Inductor takes ten seconds for each shape of a contender that no target speaks of.
    uncompiled = mock.patch.object(ops_cases, "compiled", lambda form: form)
    # A whole model is checked bit for bit, which the interpreter's products do not keep.
    kernels = nullcontext() if name == "inference" else interpreted()
    with torch.inference_mode(), kernels, uncompiled:
        PHASES[name](out / f"{name}.jsonl", until)


def on_gpu() -> bool:
    return main_device().type == "cuda"


def chosen() -> list[Case]:
    if not on_gpu():
        return list(TINY)
    return lines.one_of_each_first([case for case in all_cases() if is_early(case)])


def is_early(case: Case) -> bool:
    """Whether the first contact has a look at it: of the memory readout, which has more cases than
    kinds of work, an 8B model's with 10,000 entries."""
    if case.op not in memory.OPERATIONS:
        return True
    usual = case.d_in == ops_cases.FFN[0] and case.dtype == torch.bfloat16
    return usual and (case.op == memory.ADD or case.edits == 10_000)


def processes() -> int:
    return min(MOST_PROCESSES, os.cpu_count() or 1) if on_gpu() else 1


def _facts(path: Path, until: float) -> None:
    line: dict[str, Any] = {"device": device_name(), "gpu": on_gpu(), **machine()}
    line |= tune.versions() | {"python": platform.python_version(), "system": platform.platform()}
    if on_gpu():
        properties = torch.cuda.get_device_properties(main_device())
        line |= {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
        }
    lines.append(path, line)
    rounds = 20 if on_gpu() else 1
    bandwidth = copy_bandwidth(main_device(), rounds)
    lines.append(path, {"copy_gb_s": bandwidth / 1e9})
    rate = matmul_rate(main_device(), torch.bfloat16, rounds)
    lines.append(path, {"matmul_tflop_s": rate / 1e12})


def _compile(path: Path, until: float) -> None:
    cases = chosen()
    began = time.monotonic()
    with Compilers(processes()) as compilers:
        faults = compilers.compile([Variant(case) for case in cases], until)
    for index, reason in faults.items():
        lines.append(path, {"key": lines.key_of(cases[index]), "fault": reason})
    seconds = round(time.monotonic() - began, 1)
    lines.append(path, {"compiled": len(cases) - len(faults), "seconds": seconds})


def _check(path: Path, until: float) -> None:
    needed = all(find_spec(name) for name in ("pytest", "hypothesis"))
    if on_gpu() and needed and all(Path(folder).is_dir() for folder in TESTS):
        _run_tests(path)
        return
    for key in lines.unfinished(lines.read(path)):
        lines.append(path, {"key": key, "outcome": "failed", "why": HUNG})
    done = lines.done(lines.read(path))
    for case in chosen():
        key = lines.key_of(case)
        if key in done or time.monotonic() > until:
            continue
        lines.append(path, {"begun": key})
        faulthandler.dump_traceback_later(HANGS, exit=True)
        lines.append(path, {"key": key} | _outcome(case))
    faulthandler.cancel_dump_traceback_later()


def _outcome(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        contenders(case, main_device(), check=True)
    except torch.AcceleratorError:
        # Nothing runs any more in this process: the phase is begun again behind this case.
        raise
    except (WrongResultError, RuntimeError, ValueError, AssertionError) as error:
        return {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
    return {"outcome": "passed"}


def _run_tests(path: Path) -> None:
    """The GPU's tests in several processes, each of which runs every so manieth and says what came
    of it as soon as it knows."""
    # It imports pytest.
    from bench.first_contact import shard

    running = []
    for index in range(processes()):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
        command += ["-p", "no:cacheprovider", "-p", shard.__name__]
        command += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={HANGS}"]
        if find_spec("pytest_timeout"):
            command += [f"--timeout={2 * HANGS}"]
        asked = {shard.PART: f"{index}/{processes()}", shard.LINES: str(path)}
        running.append(subprocess.Popen(command, env=os.environ | asked))
    for index, process in enumerate(running):
        # Otherwise every test passed, some failed, or this part had none.
        if process.wait() not in (0, 1, 5):
            why = f"pytest ended with exit code {process.returncode}"
            lines.append(path, {"key": f"part {index}", "outcome": "failed", "why": why})


def _table(path: Path, until: float) -> None:
    seen = lines.read(path)
    by_key = {lines.key_of(case): case for case in chosen()}
    for key in lines.unfinished(seen):
        if key in by_key:
            lines.append(path, table.fault_row(by_key[key], HUNG))
    done = lines.done(lines.read(path))
    facts: dict[str, float] = {}
    for line in lines.read(path.with_name("facts.jsonl")):
        facts |= line
    rates = (facts.get("copy_gb_s", 1.0) * 1e9, facts.get("matmul_tflop_s", 1.0) * 1e12)

    def remaining() -> Iterator[Case]:
        for key, case in by_key.items():
            if time.monotonic() > until:
                break
            if key not in done:
                faulthandler.dump_traceback_later(HANGS, exit=True)
                yield case
        faulthandler.cancel_dump_traceback_later()

    rounds = 15 if on_gpu() else 1
    table.time_all(remaining(), main_device(), rounds, rates, lambda line: lines.append(path, line))


def _inference(path: Path, until: float) -> None:
    from bench.inference.__main__ import main

    seen = lines.read(path)
    done = [model for model in MODELS if any(model.items() <= line.items() for line in seen)]
    shape, rounds, tokens = ("llama-3-8b", 9, 48) if on_gpu() else ("tiny", 1, 2)
    result = path.with_suffix(".json")
    for model in MODELS if on_gpu() else MODELS[:2]:
        if model in done or time.monotonic() > until:
            continue
        fault = None
        try:
            main(shape=shape, rounds=rounds, tokens=tokens, json_to=str(result), **model)  # type: ignore[arg-type]
        except typer.Exit:
            fault = "wrong result"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:500]
            if isinstance(error, torch.AcceleratorError):
                lines.append(path, {**model, "fault": fault})
                raise
        if fault is not None:
            lines.append(path, {**model, "fault": fault})
            torch.cuda.empty_cache()
            continue
        lines.append(path, {**model, **json.loads(result.read_text(encoding="utf-8"))})
        result.unlink()
        torch.cuda.empty_cache()


def _tune(path: Path, until: float) -> None:
    missed = lines.missed_cases(path.with_name("table.jsonl"), chosen())
    if not on_gpu():
        tune.SETS = tune.ROUNDS = tune.STEPS = 1
    with mock.patch.object(tuning, "CONFIGS", path.with_name("configs")):
        tune.tune(
            missed,
            main_device(),
            until,
            lambda line: lines.append(path, line),
            most=None if on_gpu() else 1,
            processes=processes(),
        )


PHASES: dict[str, Phase] = {
    "facts": _facts,
    "compile": _compile,
    "check": _check,
    "table": _table,
    "inference": _inference,
    "tune": _tune,
}
