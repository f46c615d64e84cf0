"""Search of launch configurations on the GPU at hand, written where
`coachhook_kernels.launch.tuning` looks: `configs/<device>/<kernel>.json`.

A candidate that does not compile or gives a wrong result is dropped; of the others, and the
default, the one with the least time over the problem's cases wins.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from bench.harness.run_folder import write
from bench.harness.script import WrongResultError
from bench.harness.timing import captured, take_turns
from bench.ops.cases import LARGE, RANK, SMALL, Case, contenders
from coachhook_kernels.launch import runtime, tuning
from coachhook_kernels.launch.tuning import Config

SETS = 4
ROUNDS = 5


@dataclass(frozen=True)
class Problem:
    """A search. when: sizes that the configuration is looked up by; cases: to be fast in."""

    kernel: str
    when: dict[str, int]
    cases: tuple[Case, ...]
    candidates: tuple[Config, ...]


def grid(**values: tuple[int, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


ONE_ROW = grid(BN=(2, 4, 8), BK=(1024, 2048), SLICES=(1, 2), num_warps=(4, 8), num_stages=(3,))
FEW_ROWS = tuple(
    config
    for config in grid(
        BN=(16, 32, 64),
        BK=(64, 128, 256),
        SLICES=(1, 2, 4, 8),
        num_warps=(4, 8),
        num_stages=(3, 4, 5),
    )
    # Bytes of bfloat16 weights in flight: fewer starve the memory, more do not fit.
    if 2**12 <= config["BN"] * config["BK"] * config["num_stages"] <= 2**16
)
FLOOD = {"FEW": 256, "BM": 128, "BN": 128, "BK": 64}
TILES = grid(BM=(64, 128), BN=(64, 128), BK=(64, 128), num_warps=(4, 8), num_stages=(3, 4))
# The measured cases open one row in a hundred, so the tiles for many open rows stay as they are.
OPEN = tuple(
    FLOOD | config
    for config in grid(
        FEW_BM=(32, 64), FEW_BN=(16, 32, 64), FEW_BK=(64, 128), num_warps=(4, 8), num_stages=(3, 4)
    )
)
SQUARES = grid(BM=(128,), BN=(128, 256), BK=(64,), num_warps=(4, 8), num_stages=(3, 4))
DUAL = (
    *grid(BT=(16,), BN=(16, 32, 64), BK=(128, 256), num_warps=(2, 4), num_stages=(3, 4, 5, 6)),
    *grid(BT=(32, 64, 128), BN=(32, 64, 128), BK=(32, 64), num_warps=(4, 8), num_stages=(3, 4, 5)),
)
TRIANGLE: tuple[Config, ...] = (
    {"triangle": 0},
    *grid(
        triangle=(1,),
        tma=(0, 1),
        block_i=(128,),
        block_j=(128, 256),
        block_n=(64,),
        group=(8, 16),
        num_warps=(4, 8),
        num_stages=(3, 4),
    ),
)


def problems() -> Iterator[Problem]:
    keyed, calibrated = "keyed", "calibrated"
    for d_in, d_out in SMALL + LARGE:
        case = partial(Case, "tuning", "hook_linear", d_in, d_out)
        shape = {"d_in": d_in, "d_out": d_out}
        for rows in (1, 16, 64):
            few = (case(rows, keyed), case(rows, calibrated, RANK))
            few_rows = ONE_ROW if rows == 1 else FEW_ROWS
            yield Problem(f"hook_linear_decode{rows}_16bit", shape, few, few_rows)
        for rows in (256, 4096):
            many = shape | {"rows": rows}
            closed = (case(rows, keyed), case(rows, calibrated, RANK))
            yield Problem("hook_linear_score_16bit", many, closed, TILES)
            opened = (case(rows, keyed, n_open=rows // 100),)
            yield Problem("hook_linear_correct_16bit", many, opened, OPEN)
        squares = (case(4096, calibrated),)
        yield Problem("hook_linear_squares_16bit", shape | {"rows": 4096}, squares, SQUARES)
        for rows in (1, 16, 128, 512):
            both = (case(rows, calibrated),)
            fits = tuple(c for c in DUAL if (c["BT"] == 16) == (rows <= 16))
            yield Problem("dual_path_dense", shape | {"n_tokens": rows}, both, fits)
    for d in (1536, 4096, 14336):
        for rows in (1024, 4096, 16384):
            moment = Case("tuning", "key_covariance_", d, d, rows)
            yield Problem("key_covariance_16bit", {"rows": rows, "d": d}, (moment,), TRIANGLE)


@contextmanager
def forced(kernel: str, config: Config | None) -> Iterator[None]:
    """Inside the block every lookup of `kernel` finds `config`; if that is None, the default."""
    nearest = tuning._nearest

    def found(folder: str, name: str, sizes: tuple[tuple[str, int], ...]) -> Config | None:
        return config if name == kernel else nearest(folder, name, sizes)

    with mock.patch.object(tuning, "_nearest", found):
        yield


def seconds(problem: Problem, config: Config | None, device: torch.device) -> float:
    """Sum over the problem's cases; infinity for a candidate that fails or errs."""
    total = 0.0
    runtime._broken.clear()
    try:
        with forced(problem.kernel, config):
            for case in problem.cases:
                torch.manual_seed(0)
                sets = [contenders(case, device, check=i == 0) for i in range(SETS)]
                step = captured([one[case.op] for one in sets], device)
                total += take_turns({case.op: step}, ROUNDS, device)[case.op].median
    except WrongResultError:
        return float("inf")
    # An operation that did not compile has run in plain torch, and its time means nothing.
    return float("inf") if runtime._broken else total


def best(
    problem: Problem, measured: Callable[[Config | None], float]
) -> tuple[Config | None, float]:
    """The fastest candidate, None for the default, and its time over the default's."""
    default = measured(None)
    times = {i: measured(config) for i, config in enumerate(problem.candidates)}
    least = min(times, key=lambda i: times[i])
    if times[least] >= default:
        return None, 1.0
    return problem.candidates[least], times[least] / default


def tune_all(device: torch.device, console: Console) -> list[Path]:
    """Search every problem and write the winners. Returns the files written."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for problem in problems():
        config, ratio = best(problem, partial(seconds, problem, device=device))
        console.print(f"{problem.kernel} {problem.when}: {config or 'default'}, ×{ratio:.3f}")
        entries.setdefault(problem.kernel, []).append({"when": problem.when, "config": config})
    folder = tuning.CONFIGS / tuning.device_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kernel, found in entries.items():
        path = folder / f"{kernel}.json"
        write(path, f"{json.dumps(found, indent=1)}\n".encode())
        written.append(path)
    tuning._entries.cache_clear()
    tuning._nearest.cache_clear()
    runtime._broken.clear()
    return written
