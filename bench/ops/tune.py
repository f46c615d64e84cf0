"""Search of launch configurations on the GPU at hand.

    python -m bench.ops.tune [--match TEXT] [--minutes N] [--only-missed LINES] [--again]

Problems are what the bench's cases look up. From the default, the search goes to the fastest
configuration one change away, as long as that gains; the candidates of a step are compiled side by
side first, and one that does not compile or gives a wrong result is dropped. Written after every
problem, where `coachhook_kernels.launch.tuning` looks; the same command goes on with the rest.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console

from bench.harness.machine import main_device
from bench.harness.script import WrongResultError, run_script
from bench.harness.timing import Step, captured, take_turns
from bench.ops import memory
from bench.ops.cases import Case, all_cases, contenders
from bench.ops.compiling import NOT_IN_TIME, Compilers, Variant, forced, own_name
from bench.ops.layers import SKETCH
from bench.ops.lines import key_of, missed_cases, one_of_each_first
from coachhook.system.files import write
from coachhook_kernels.launch import runtime, tuning
from coachhook_kernels.launch.tuning import Config

SETS = 4
ROUNDS = 5
STEPS = 4
GAIN = 0.99
"""A step is worth it only for less than this share of the time."""

FLAGS = ("triangle", "tma")
NO_GPU = 2

Measured = Callable[[Sequence[Config]], list[float]]
Put = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Problem:
    """A search. described: how the configuration is looked up; case: to be fast in."""

    kernel: str
    described: tuple[tuple[str, int | str], ...]
    default: Config
    case: Case


def problems_of(case: Case, device: torch.device) -> list[Problem]:
    """What the case looks up, from running it once."""
    if case.op == memory.LAYER:
        # It looks up what its gate does, whose time would drown in the layer's.
        case = replace(case, op=memory.GATE, d_out=SKETCH)
    found: list[Problem] = []
    measured = tuning._measured

    def record(folder: str, kernel: str, described: Any, default: Config) -> Config | None:
        problem = Problem(kernel, described, default, case)
        if problem not in found:
            found.append(problem)
        return measured(folder, kernel, described, default)

    with mock.patch.object(tuning, "_measured", record):
        calls = contenders(case, device, check=False)
        calls[own_name(case, calls)]()
    return found


def neighbours(config: Config) -> Iterator[Config]:
    """Every configuration with one parameter changed: tiles and bounds halved or doubled, up to two
    stages more or less, half or twice the warps, flags the other way round."""
    for name, value in config.items():
        others: Iterable[int] = (value // 2, value * 2) if value > 1 else ()
        if name in FLAGS:
            others = (1 - value,)
        elif name == "num_stages":
            others = range(max(1, value - 2), value + 3)
        for other in others:
            if other != value:
                yield config | {name: other}


class UnusableDefaultError(Exception):
    """The default configuration fails or errs: there is nothing to compare with."""


def search(default: Config, measured: Measured) -> tuple[Config | None, float]:
    """The fastest configuration found, None for the default, and its time over the default's.

    measured: seconds of several, in turns; infinity for one that cannot be used. Raises
    UnusableDefaultError if the default is one.
    """
    best, ratio = default, 1.0
    tried = [default]
    for _ in range(STEPS):
        step = [config for config in neighbours(best) if config not in tried]
        tried += step
        of_default, of_best, *times = measured([default, best, *step])
        if of_default == float("inf"):
            raise UnusableDefaultError
        least = min(times, default=float("inf"))
        if not least < GAIN * of_best:
            break
        best, ratio = step[times.index(least)], least / of_default
    return (None, 1.0) if best == default else (best, ratio)


def seconds(problem: Problem, configs: Sequence[Config], device: torch.device) -> list[float]:
    """Seconds a call of each, in turns; infinity for one that fails or errs."""
    torch.manual_seed(0)
    sets = [contenders(problem.case, device, check=False) for _ in range(SETS)]
    name = own_name(problem.case, sets[0])
    steps: dict[str, Step] = {}
    for index, config in enumerate(configs):
        runtime.forget_failures()
        try:
            with forced(problem.kernel, config):
                contenders(problem.case, device, check=True)
                step = captured([one[name] for one in sets], device)
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except (WrongResultError, RuntimeError, ValueError, AssertionError):
            continue
        # What did not compile or fit has run in another form, whose time means nothing.
        if not runtime.failures():
            steps[str(index)] = step
    runtime.forget_failures()
    take_turns(steps, 1, device)
    timings = take_turns(steps, ROUNDS, device)
    return [
        timings[str(i)].median / SETS if str(i) in timings else float("inf")
        for i in range(len(configs))
    ]


def path_of(kernel: str, device: torch.device) -> Path:
    return tuning.CONFIGS / tuning.device_folder(device) / f"{kernel}.json"


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def entries(path: Path) -> list[dict[str, Any]]:
    try:
        return tuning.read_entries(path)
    except (OSError, ValueError):
        return []


def is_known(problem: Problem, device: torch.device) -> bool:
    """Whether the problem was searched with the torch and Triton at hand."""
    return any(
        entry["when"] == dict(problem.described)
        and versions().items() <= dict(entry.get("measured", {})).items()
        for entry in entries(path_of(problem.kernel, device))
    )


def keep(problem: Problem, config: Config | None, ratio: float, device: torch.device) -> Path:
    """Write the result of one search into the kernel's file, in place of an older one."""
    path, when = path_of(problem.kernel, device), dict(problem.described)
    others = [entry for entry in entries(path) if entry["when"] != when]
    new = {"when": when, "config": config, "measured": versions() | {"ratio": round(ratio, 4)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, f"{json.dumps([*others, new], indent=1)}\n".encode())
    for cache in (tuning._entries, tuning._nearest):
        cache.cache_clear()
    return path


def tune(
    cases: Iterable[Case],
    device: torch.device,
    until: float,
    put: Put,
    again: bool = False,
    most: int | None = None,
    processes: int | None = None,
) -> None:
    """Search what the cases look up, in their order, up to the time `until` of `time.monotonic`.
    put: is told the result, or the fault, of each problem. most: problems."""
    done: set[tuple[str, Any]] = set()
    with Compilers(processes) as compilers:
        for case in cases:
            try:
                problems = problems_of(case, device)
            except (torch.OutOfMemoryError, ValueError) as error:
                put({"kernel": case.op, "when": {"case": key_of(case)}, "fault": str(error)})
                continue
            for problem in problems:
                key = (problem.kernel, problem.described)
                if key in done or (not again and is_known(problem, device)):
                    continue
                if time.monotonic() > until or len(done) == most:
                    return
                done.add(key)
                put(_searched(problem, device, until, compilers))
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _searched(
    problem: Problem, device: torch.device, until: float, compilers: Compilers
) -> dict[str, Any]:
    """Search one problem and keep the result; a line that says what came of it. A search that the
    time cuts short is not kept."""
    dropped: dict[str, str] = {}

    def measured(configs: Sequence[Config]) -> list[float]:
        variants = [Variant(problem.case, problem.kernel, config) for config in configs]
        faults = compilers.compile(variants, until)
        dropped.update({str(configs[i]): why for i, why in faults.items()})
        if NOT_IN_TIME in faults.values():
            return [float("inf")] * len(configs)
        usable = [i for i in range(len(configs)) if i not in faults]
        times = seconds(problem, [configs[i] for i in usable], device)
        found = dict(zip(usable, times, strict=True))
        return [found.get(i, float("inf")) for i in range(len(configs))]

    line: dict[str, Any] = {"kernel": problem.kernel, "when": dict(problem.described)}
    try:
        config, ratio = search(problem.default, measured)
    except torch.OutOfMemoryError as error:
        return line | {"fault": str(error)}
    except UnusableDefaultError:
        if NOT_IN_TIME in dropped.values():
            return line | {"fault": NOT_IN_TIME}
        why = dropped.get(str(problem.default), "wrong result")
        return line | {"fault": f"the default cannot be used: {why}"}
    if NOT_IN_TIME in dropped.values():
        return line | {"fault": NOT_IN_TIME}
    keep(problem, config, ratio, device)
    return line | {"config": config, "ratio": ratio, "dropped": dropped}


def main(
    match: Annotated[str, typer.Option(help="only cases whose name or operation has it")] = "",
    minutes: Annotated[float, typer.Option(help="no problem is begun after that")] = 60.0,
    only_missed: Annotated[
        Path | None, typer.Option(help="lines of the table: what missed its target, worst first")
    ] = None,
    again: Annotated[bool, typer.Option(help="also what is already in the files")] = False,
) -> None:
    """Search launch configurations on this machine's GPU and write them beside the kernels."""
    messages = Console(stderr=True)
    if not torch.cuda.is_available():
        messages.print("no GPU: nothing to tune for")
        raise typer.Exit(NO_GPU)
    until = time.monotonic() + 60 * minutes
    chosen = [case for case in all_cases() if match in f"{case.op} {case.name}"]
    if only_missed is not None:
        chosen = missed_cases(only_missed, chosen)
    else:
        # A kernel that only open rows keep busy would be searched by noise in a case without any.
        chosen = sorted(one_of_each_first(chosen), key=lambda case: case.n_open == 0)

    def tell(line: dict[str, Any]) -> None:
        messages.print(
            f"{line['kernel']} {line['when']}: {line.get('config') or 'default'}", end=""
        )
        messages.print(f", {line['fault']}" if "fault" in line else f", ×{line['ratio']:.3f}")

    with torch.inference_mode():
        tune(chosen, main_device(), until, tell, again)


if __name__ == "__main__":
    run_script(main)
