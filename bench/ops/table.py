"""Every operation timed on a GPU against its speed target.

    python -m bench.ops.table [--lines PATH] [--json PATH or -]

Contenders take turns at replaying CUDA graphs, over enough sets of tensors to overflow the last
cache; ratios are medians over the rounds. Each case is checked before it is timed; a wrong result
or an error is its verdict, the others go on, and the exit code is 1 in the end. `--lines` keeps
every row as soon as it is there. Without a GPU the exit code is 2.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.harness.output import put
from bench.harness.script import JsonTo, WrongResultError, run_script
from bench.harness.timing import (
    Step,
    Timings,
    captured,
    copy_bandwidth,
    in_a_row,
    matmul_rate,
    take_turns,
)
from bench.ops.cases import UNCAPTURED, Case, all_cases, contenders
from bench.ops.lines import FAULT, append, key_of

ROTATED_BYTES = 2**28
MOST_SETS = 64
NO_GPU = 2
Row = dict[str, Any]


def sets_of(case: Case, device: torch.device) -> int:
    """Number of sets of tensors that together hold some five times the last cache of a GPU."""
    if device.type != "cuda":
        return 1
    return max(2, min(MOST_SETS, -(-ROTATED_BYTES // case.work[0])))


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Timings]:
    """Check, then time: seconds a call of every contender."""
    sets = [contenders(case, device, check=i == 0) for i in range(sets_of(case, device))]
    steps: dict[str, Step] = {}
    for name in sets[0]:
        calls = [one[name] for one in sets]
        if name in UNCAPTURED:
            calls[0]()
            steps[name] = in_a_row(calls)
        else:
            steps[name] = captured(calls, device)
    take_turns(steps, min(2, rounds), device)
    timings = take_turns(steps, rounds, device)
    return {
        name: Timings([seconds / len(sets) for seconds in found.seconds])
        for name, found in timings.items()
    }


def rows_of(case: Case, timings: dict[str, Timings], bandwidth: float, rate: float) -> list[Row]:
    """A line for each contender; those of the operation carry the verdict."""
    baseline = timings[case.baseline]
    moved, operations = case.work
    floor = max(moved / bandwidth, operations / rate)
    lines = []
    for name, found in timings.items():
        ratio, spread = found.over(baseline)
        line: Row = {
            **heading(case, name),
            "microseconds": found.median * 1e6,
            "spread": found.spread,
            "ratio": ratio,
            "ratio_spread": spread,
        }
        work = case.baseline_work if name == case.baseline else (moved, operations)
        if name == case.baseline or case.op in name:
            line |= {
                "gb_s": work[0] / found.median / 1e9,
                "bandwidth_share": work[0] / found.median / bandwidth,
                "tflop_s": work[1] / found.median / 1e12,
                "rate_share": work[1] / found.median / rate,
            }
        if case.op in name:
            line |= {"floor_ratio": found.median / floor, "must": case.must, "aim": case.aim}
            line["verdict"] = verdict(case, line, timings)
        lines.append(line)
    return lines


def heading(case: Case, contender: str) -> Row:
    """What a row is about."""
    return {
        "key": key_of(case),
        "case": case.name,
        "contender": contender,
        "shape": f"{case.d_in}→{case.d_out}",
        "rows": case.rows,
    }


def verdict(case: Case, line: Row, timings: dict[str, Timings]) -> str:
    """The speed targets of the case and whether each was reached; empty where it has none."""
    said = []
    if case.must is not None:
        met = line["ratio"] <= case.must
        reached_aim = case.aim is not None and line["ratio"] <= case.aim
        said.append(f"×{case.must:.2f} {'aim reached' if reached_aim else _word(met)}")
    if case.share is not None:
        said.append(f"{case.share:.0%} of copy {_word(line['bandwidth_share'] >= case.share)}")
    if case.faster is not None:
        times, _ = timings["published"].over(timings[case.op])
        said.append(f"{times:.1f}× published {_word(times >= case.faster)}")
    return "; ".join(said)


def _word(met: bool) -> str:
    return "reached" if met else "MISSED"


def rows_or_fault(
    case: Case, device: torch.device, rounds: int, bandwidth: float, rate: float
) -> list[Row]:
    """`rows_of` the case; one row with the reason where its result is wrong or it fails.

    Errors of the device are raised, since nothing runs on it any more.
    """
    try:
        torch.manual_seed(0)
        return rows_of(case, measure(case, device, rounds), bandwidth, rate)
    except torch.AcceleratorError:
        raise
    except WrongResultError as error:
        reason = str(error)
    except Exception as error:
        # Any: the other cases are worth as much as before.
        reason = f"{type(error).__name__}: {error}"[:500]
    return [fault_row(case, reason)]


def fault_row(case: Case, reason: str) -> Row:
    return heading(case, case.op) | {"verdict": f"{FAULT}: {reason}"}


def time_all(
    cases: Iterable[Case],
    device: torch.device,
    rounds: int,
    rates: tuple[float, float],
    put: Callable[[Row], object],
) -> list[Row]:
    """The rows of all cases; put: is told when a case begins, and each row. rates: bytes and
    operations a second. An error of the device is put, and raised."""
    lines: list[Row] = []
    for case in cases:
        put({"begun": key_of(case)})
        try:
            found = rows_or_fault(case, device, rounds, *rates)
        except torch.AcceleratorError as error:
            put(fault_row(case, str(error)))
            raise
        for line in found:
            put(line)
        lines += found
        if device.type == "cuda":
            # Return the memory of this case's graphs and tensors for the next.
            torch.cuda.empty_cache()
    return lines


def table_of(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['device']}, bfloat16, CUDA graphs where the host does not wait",
        caption=f"copy {result['copy_gb_s']:.0f} GB/s, products {result['matmul_tflop_s']:.0f} "
        "TFLOP/s; ± is the interquartile range of the ratio",
    )
    for name in ("case", "contender", "shape"):
        table.add_column(name)
    columns = ("rows", "µs", "ratio", "±", "×floor", "GB/s", "of copy", "TFLOP/s", "of products")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for line in result["rows"]:
        figures = (
            ("microseconds", ".1f"),
            ("ratio", ".3f"),
            ("ratio_spread", ".3f"),
            ("floor_ratio", ".2f"),
            ("gb_s", ".0f"),
            ("bandwidth_share", ".0%"),
            ("tflop_s", ".0f"),
            ("rate_share", ".0%"),
        )
        shown = [format(line[name], form) if name in line else "" for name, form in figures]
        first = (line["case"], line["contender"], line["shape"], str(line["rows"]))
        table.add_row(*first, *shown, line.get("verdict", ""))
    return table


def main(
    match: Annotated[str, typer.Option(help="only cases whose name or operation has it")] = "",
    rounds: int = 15,
    lines_to: Annotated[
        Path | None, typer.Option("--lines", help="JSON lines, each there as soon as measured")
    ] = None,
    json_to: JsonTo = None,
) -> None:
    """Check and time every operation on this machine's GPU."""
    messages = Console(stderr=True)
    if not torch.cuda.is_available():
        messages.print("no GPU: these timings need one; pytest bench --benchmark-only runs on CPUs")
        raise typer.Exit(NO_GPU)
    device = torch.device("cuda")
    chosen = [case for case in all_cases() if match in f"{case.op} {case.name}"]

    def put_line(line: Row) -> None:
        if lines_to is not None:
            append(lines_to, line)

    with torch.inference_mode():
        bandwidth = copy_bandwidth(device)
        rate = matmul_rate(device, torch.bfloat16)
        tracked = track(chosen, console=messages, transient=True)
        lines = time_all(tracked, device, rounds, (bandwidth, rate), put_line)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_s": bandwidth / 1e9,
        "matmul_tflop_s": rate / 1e12,
        "rows": lines,
    }
    put(result, table_of(result), json_to)
    if any(line.get("verdict", "").startswith(FAULT) for line in lines):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
