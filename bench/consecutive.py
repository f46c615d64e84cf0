"""Consecutive batch editing, end to end: seconds an edit, peak memory, and what the edits do.

    python bench/consecutive.py [FACTS] [--edits 100] [--batch-size 10] [--gate keyed] [--json]

FACTS is any file that `coachhook edit` reads; without it, the 30 facts of the demo. Values,
writing and verdicts are timed; loading, key statistics and the evaluation are not.
"""

import json
import resource
import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import coachhook as ch
from coachhook.evaluate import evaluate


def main(
    facts: Annotated[Path | None, typer.Argument()] = None,
    first: int = 0,
    edits: int = 100,
    batch_size: int = 10,
    gate: str = "keyed",
    model: str = "smollm2",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    path = facts or Path(str(files("coachhook").joinpath("data", "demo.jsonl")))
    requests = ch.load_requests(path).requests[first : first + edits]
    editor = ch.Editor.from_pretrained(model, config=ch.EditConfig(gate=gate))
    seconds, verdicts = [], dict.fromkeys(map(str, ch.Verdict), 0)
    for start in range(0, len(requests), batch_size):
        started = time.perf_counter()
        report = editor.edit(requests[start : start + batch_size])
        seconds.append(time.perf_counter() - started)
        for edit in report.edits:
            verdicts[edit.verdict] += 1
    live = [edit.request for edit in editor.hooks.journal.live()]
    scores = evaluate(editor.model, editor.tokenizer, editor.hooks, live)
    result: dict[str, Any] = {
        "facts": str(path.name),
        "edits": len(requests),
        "batch_size": batch_size,
        "gate": gate,
        "seconds_per_edit": sum(seconds) / len(requests),
        "seconds_per_batch": seconds,
        # Linux counts it in KiB.
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "verdicts": verdicts,
        "scores": asdict(scores),
    }
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{len(requests)} edits of {path.name}, {batch_size} a batch, {gate} gate")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name in ("seconds_per_edit", "peak_memory_gb"):
        table.add_row(name.replace("_", " "), f"{result[name]:.2f}")
    table.add_row("verdicts", ", ".join(f"{n} {v}" for v, n in verdicts.items()))
    for name in ("reliability", "generality", "locality"):
        for form, value in result["scores"][name].items():
            shown = "absent" if value is None else f"{value:.3f}"
            table.add_row(f"{name}, {form.replace('_', ' ')}", shown)
    table.add_row("perplexity before", f"{scores.perplexity_before:.3f}")
    table.add_row("perplexity after", f"{scores.perplexity_after:.3f}")
    table.add_row("ordinary tokens open", f"{scores.gate.ordinary:.4f}")
    table.add_row("first batch at the end", f"{scores.retention[1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
