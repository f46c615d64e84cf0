"""The three parts of an edit against plain baselines, in one run: values, update, statistics.

    python -m bench.editing.parts [FACTS] [--edits 10] [--d-in 6400] [--json]

FACTS is any file that `coachhook edit` reads; without it, facts of the demo. Target values against
the published procedure (target_values.py); the update of one layer against a direct solve
(update.py); key statistics against the bare forward pass (key_statistics.py). Each is described in
its module; the last two can be run by themselves.
"""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import coachhook as ch
from bench.editing.key_statistics import measure as measure_statistics
from bench.editing.target_values import PUBLISHED_STEPS
from bench.editing.target_values import measure as measure_values
from bench.editing.update import measure as measure_update
from bench.harness.facts import demo_facts, part_of
from bench.harness.machine import device_name, machine, use_threads
from bench.harness.script import Count, Facts, First, Json, Threads, only_right_results, run_script
from coachhook.facts.remaining import latest
from coachhook.system.progress import track


def main(
    facts: Facts = None,
    edits: Count = 10,
    first: First = 0,
    model: str = "smollm2",
    steps: Annotated[int, typer.Option(help="of the published procedure")] = PUBLISHED_STEPS,
    d_in: int = 6400,
    keys: int = 100,
    batches: Annotated[int, typer.Option(help="in a row, for the update's accuracy")] = 200,
    accuracy_d_in: int = 1536,
    rounds: int = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure all three; exit 1 if the update is wrong."""
    use_threads(threads)
    path = facts or demo_facts()
    requests = part_of(path, latest(ch.load_requests(path).requests), first, edits)
    with (
        ch.Editor.from_pretrained(model, config=ch.EditConfig(readout="delta")) as editor,
        track("published values", len(requests)) as advance,
    ):
        values = measure_values(editor, requests, steps, advance)
    with only_right_results(Console(stderr=True)):
        update = measure_update(
            d_in=d_in, n_keys=keys, rounds=rounds, batches=batches, accuracy_d_in=accuracy_d_in
        )
    statistics = measure_statistics(model, rounds)
    result: dict[str, Any] = {
        "values_speedup": values["values_speedup"],
        "update_speedup": update["update_speedup"],
        "statistics_overhead": statistics["statistics_overhead"],
        "model": model,
        "facts": path.name,
        "device": device_name(),
        **machine(),
        "values": values,
        "update": update,
        "statistics": statistics,
    }
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    console = Console()
    where = f"{result['model']}, {result['device']}, {result['threads']} threads"
    parts = Table(title=f"against plain baselines: {where}")
    parts.add_column("part")
    parts.add_column("ratio", justify="right")
    parts.add_column("of")
    update, statistics = result["update"], result["statistics"]
    parts.add_row(
        "values_speedup",
        f"{result['values_speedup']:.1f}",
        "edits a second, ours by the published procedure's",
    )
    parts.add_row(
        "",
        f"{result['values']['values_speedup_if_it_stopped']:.1f}",
        "the same, had that stopped at our loss",
    )
    parts.add_row(
        "update_speedup",
        f"{update['update_speedup']:.1f}",
        f"d_in {update['d_in']}, {update['keys']} keys; Δ off by {update['update_error']:.0e} "
        f"after {update['batches']} batches",
    )
    parts.add_row(
        "statistics_overhead",
        f"{statistics['statistics_overhead']:.2f}",
        "tokens a second, with statistics by without",
    )
    console.print(parts)
    table = Table(title=f"target values of {result['values']['edits']} edits")
    for column in ("procedure", "s an edit", "loss, nats", "reliability", "speed-up"):
        table.add_column(column, justify="left" if column == "procedure" else "right")
    for name, row in result["values"]["rows"].items():
        table.add_row(
            name,
            f"{row['seconds_per_edit']:.2f}",
            f"{row['loss']:.3f}",
            f"{row['reliability']:.2f}",
            f"{row['speedup']:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    run_script(main)
