"""Compile every shipped kernel configuration, without the GPUs it is for, and judge the code.

`python -m coachhook_kernels.compilation.report [--json] [--target sm_90] [--match TEXT]
[--module NAME]`. Exit code 1 where a configuration does not compile, spills, has a stack, asks for
more shared memory than there is, or lacks the tensor-core instructions it was written for; 2 where
there is nothing to report.
"""

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, TypeAlias

from coachhook_kernels.compilation.case import CompileCase
from coachhook_kernels.compilation.target import TARGETS, Resources, compile_resources, objections

MODULES = (
    "coachhook_kernels.dual_path.compile_cases",
    "coachhook_kernels.hook_linear.compile_cases",
    "coachhook_kernels.key_covariance.kernel",
    "coachhook_kernels.memory.compile_cases",
)
COLUMNS = ("case", "target", "registers", "stack", "spills", "shared", "tensor cores", "copies", "")

# The arguments of `compile_row`.
Job: TypeAlias = tuple[str, int, str, str]


@dataclass(frozen=True)
class Row:
    """One configuration for one target; `failures` says why it is not fit to ship."""

    module: str
    case: str
    target: str
    triton: str
    resources: Resources | None
    failures: list[str]

    def as_json(self) -> dict[str, Any]:
        """One flat object; the resources of a kernel that did not compile are null."""
        taken: dict[str, Any] = {field.name: None for field in fields(Resources)}
        if self.resources:
            taken = asdict(self.resources)
        return {
            "module": self.module,
            "case": self.case,
            "target": self.target,
            "triton": self.triton,
            **taken,
            "shared_limit": TARGETS[self.target].shared_limit,
            "failures": self.failures,
        }

    def as_cells(self) -> tuple[str, ...]:
        """The columns of the table; `shared` in KiB."""
        verdict = "FAILED" if self.failures else "ok"
        found = self.resources
        if found is None:
            return (self.case, self.target, *["-"] * (len(COLUMNS) - 3), verdict)
        registers = str(found.registers)
        if found.scalar_registers is not None:
            registers += f"+{found.scalar_registers}"
        return (
            self.case,
            self.target,
            registers,
            str(found.stack + (found.local or 0)),
            "/".join(map(str, found.spills.values())),
            f"{found.shared / 1024:.1f}",
            " ".join(f"{name} {count}" for name, count in found.tensor_cores.items()) or "-",
            str(found.async_copies),
            verdict,
        )


@functools.cache
def _cases(module: str) -> list[CompileCase]:
    found: list[CompileCase] = import_module(module).compile_cases()
    return found


def compile_row(module: str, index: int, name: str, target: str) -> Row:
    """The row of the case `name`, the `index`-th of `module`."""
    import triton

    row = functools.partial(Row, module, name, target, triton.__version__)
    case = _cases(module)[index]
    try:
        found = compile_resources(case, TARGETS[target])
    except Exception as error:
        # A kernel may fail in any way: it gets a row, and the report goes on.
        return row(None, [f"does not compile: {_reason(error)}"])
    return row(found, objections(case, target, found))


def _reason(error: BaseException) -> str:
    """The line of a compiler's message that says what is wrong."""
    # For an error in a function that the kernel calls, the innermost of the chain explains it.
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    assembler = [line for line in lines if re.search(r"(error|fatal)\s+:", line)]
    return f"{type(error).__name__}: {(assembler[:1] or lines[-1:] or ['no message'])[0]}"


@contextmanager
def _compiler_environment() -> Iterator[None]:
    """Remove TRITON_INTERPRET, which child processes inherit: a kernel defined for the interpreter
    cannot be compiled."""
    interpreter = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreter is not None:
            os.environ["TRITON_INTERPRET"] = interpreter


def _finished(jobs: Sequence[Job]) -> Iterator[tuple[Job, Row]]:
    """Each job with its row, as they finish; jobs whose process died are left out."""
    workers = min(os.cpu_count() or 1, len(jobs))
    # Workers fork from a server that imports torch and Triton, once; not from
    # this process, whose kernels may be defined for the interpreter.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", "coachhook_kernels.compilation.target"])
    with ProcessPoolExecutor(max(workers, 1), mp_context=context) as pool:
        running = {pool.submit(compile_row, *job): job for job in jobs}
        for future in as_completed(running):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield running[future], future.result()


def _rows(jobs: Sequence[Job]) -> list[Row]:
    """`compile_row(*job)` of every job, in the order of `jobs`."""
    done = {}
    for job, row in _finished(jobs):
        done[job] = row
        _progress(len(done), len(jobs))
    # A compiler that crashes breaks the pool: each job left over gets a pool of its own.
    for job in jobs:
        if job not in done:
            module, _, name, target = job
            crashed = Row(
                module, name, target, "", None, ["does not compile: the compiler crashed"]
            )
            done[job] = dict(_finished([job])).get(job, crashed)
            _progress(len(done), len(jobs))
    return [done[job] for job in jobs]


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rcompiling: {done} of {total}", end=end, file=sys.stderr, flush=True)


def make_report(modules: Sequence[str], targets: Sequence[str], match: Sequence[str]) -> list[Row]:
    """Rows of the cases whose name holds one of `match` (all, if empty), for each target.

    Raises LookupError where a module has no list of cases.
    """
    jobs = []
    for module in modules:
        try:
            cases = _cases(module)
        except Exception as error:
            raise LookupError(f"{module} lists no cases: {_reason(error)}") from error
        jobs += [
            (module, index, case.name, target)
            for index, case in enumerate(cases)
            if not match or any(text in case.name for text in match)
            for target in targets
            if target in case.targets
        ]
    with _compiler_environment():
        return _rows(jobs)


def _table(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, *(row.as_cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m coachhook_kernels.compilation.report",
        description="Compile the kernels for GPUs that need not be here, and judge the code.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list of rows, and no table")
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="only this GPU (repeatable)"
    )
    parser.add_argument(
        "--match", action="append", default=[], help="only cases with this in the name (repeatable)"
    )
    parser.add_argument(
        "--module",
        action="append",
        help="this module's `compile_cases()` in place of the shipped kernels (repeatable)",
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    arguments = _arguments(given)
    if find_spec("triton") is None:
        print("Triton is not installed, and nothing compiles: pip install triton", file=sys.stderr)
        return 2
    modules = list(dict.fromkeys(arguments.module or MODULES))
    targets = list(dict.fromkeys(arguments.target or TARGETS))
    try:
        rows = make_report(modules, targets, arguments.match)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if not rows:
        print("No case matches: nothing was compiled.", file=sys.stderr)
        return 2
    failed = [row for row in rows if row.failures]
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    else:
        print(_table(rows))
        print(f"\n{len(rows)} rows, {len(failed)} failed (Triton {rows[0].triton or 'unknown'})")
    for row in failed:
        print(f"FAILED {row.case} [{row.target}]: {'; '.join(row.failures)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
