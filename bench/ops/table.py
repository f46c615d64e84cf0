"""Every operation timed on a GPU against its speed target.

    python -m bench.ops.table [--json PATH or -]

Contenders take turns at replaying CUDA graphs, over enough sets of tensors to overflow the last
cache; ratios are medians over the rounds. Each case is checked before it is timed, and a wrong
result ends the run with exit code 1. `--tune` searches launch configurations first and writes them
beside the kernels. Without a GPU the exit code is 2.
"""

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.harness.output import put
from bench.harness.script import JsonTo, only_right_results, run_script
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
from bench.ops.tune import tune_all

ROTATED_BYTES = 2**28
MOST_SETS = 64
NO_GPU = 2
Row = dict[str, Any]


def sets_of(case: Case) -> int:
    """Number of sets of tensors that together hold some five times the last cache of a GPU."""
    return max(2, min(MOST_SETS, -(-ROTATED_BYTES // case.bytes_moved)))


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Timings]:
    """Check, then time: seconds a call of every contender."""
    sets = [contenders(case, device, check=i == 0) for i in range(sets_of(case))]
    steps: dict[str, Step] = {}
    for name in sets[0]:
        calls = [one[name] for one in sets]
        if name in UNCAPTURED:
            calls[0]()
            steps[name] = in_a_row(calls)
        else:
            steps[name] = captured(calls, device)
    take_turns(steps, 2, device)
    timings = take_turns(steps, rounds, device)
    return {
        name: Timings([seconds / len(sets) for seconds in found.seconds])
        for name, found in timings.items()
    }


def rows_of(case: Case, timings: dict[str, Timings], bandwidth: float, rate: float) -> list[Row]:
    """A line for each contender; those of the operation carry the verdict."""
    baseline = timings[case.baseline]
    moved, operations = case.bytes_moved, case.operations
    floor = max(moved / bandwidth, operations / rate)
    lines = []
    for name, found in timings.items():
        ratio, spread = found.over(baseline)
        line: Row = {
            "case": case.name,
            "contender": name,
            "shape": f"{case.d_in}→{case.d_out}",
            "rows": case.rows,
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
    tune: Annotated[bool, typer.Option(help="search configurations first")] = False,
    json_to: JsonTo = None,
) -> None:
    """Check and time every operation on this machine's GPU."""
    messages = Console(stderr=True)
    if not torch.cuda.is_available():
        messages.print("no GPU: these timings need one; pytest bench --benchmark-only runs on CPUs")
        raise typer.Exit(NO_GPU)
    device = torch.device("cuda")
    chosen = [case for case in all_cases() if match in f"{case.op} {case.name}"]
    lines: list[Row] = []
    with torch.inference_mode():
        if tune:
            for path in tune_all(device, messages):
                messages.print(f"wrote {path}")
        bandwidth = copy_bandwidth(device)
        rate = matmul_rate(device, torch.bfloat16)
        for case in track(chosen, console=messages, transient=True):
            torch.manual_seed(0)
            with only_right_results(messages, f"{case.name} {case.op}"):
                timings = measure(case, device, rounds)
            lines += rows_of(case, timings, bandwidth, rate)
            # Return the memory of this case's graphs and tensors for the next.
            torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_s": bandwidth / 1e9,
        "matmul_tflop_s": rate / 1e12,
        "rows": lines,
    }
    put(result, table_of(result), json_to)


if __name__ == "__main__":
    run_script(main)
