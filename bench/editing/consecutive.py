"""Consecutive batch editing, end to end: seconds an edit, memory, and the scores of the edits.

    python -m bench.editing.consecutive [FACTS] [--edits 1000] [--batch-size 50] [--run DIR]
        [--readout memory] [--json]

FACTS is any file that `coachhook edit` reads; without it, the 30 facts of the demo. Values,
writing, verdicts and saving are timed; loading, key statistics and the evaluation are not. With
--run every batch is saved to DIR/edits and its time and memory are noted in DIR/batches.jsonl, and
the same command goes on where it was stopped.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

import coachhook as ch
from bench.harness.facts import chosen_facts, in_batches
from bench.harness.run_folder import damaged, write
from bench.harness.script import Count, Facts, First, Json, Run, run_script
from coachhook.config import EditConfig
from coachhook.evaluation.evaluate import evaluate
from coachhook.facts.remaining import latest, remaining
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model
from coachhook.session import Options, opened
from coachhook.system.progress import track

FIRST_EDITS = 100


def main(
    facts: Facts = None,
    first: First = 0,
    edits: Count = 100,
    batch_size: int = 10,
    gate: str = "keyed",
    readout: str = EditConfig.readout,
    model: str = "smollm2",
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Edit the facts, and measure what each batch took and what all of them do."""
    path, requests = chosen_facts(facts, first, edits)
    with tempfile.TemporaryDirectory() as temporary:
        options = Options(gate=gate, readout=readout)
        editor, log = edit_all(requests, batch_size, model, options, run or Path(temporary))
        result = {
            "facts": path.name,
            "edits": len(requests),
            "batch_size": batch_size,
            "readout": readout,
            "gate": gate,
            **outcome(editor, log, requests),
        }
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def edit_all(
    requests: Sequence[ch.EditRequest], batch_size: int, model: str, options: Options, place: Path
) -> tuple[ch.Editor, list[dict[str, Any]]]:
    """The editor after the last batch, and the time and memory of each; resumes from `place`."""
    lines = place / "batches.jsonl"
    with opened(place / "edits", requests, batch_size, options) as session:
        if session.held is not None:
            check_same_run(session.held, in_batches(remaining([], requests), batch_size), place)
        editor = session.editor(load_model(model))
        done = len(editor.hooks.journal.batches)
        # A batch may have been saved and not noted, or noted and then rolled back.
        log = (noted(lines) + [{}] * done)[:done]
        with track("editing", len(requests)) as advance:
            advance(len(editor.hooks.edits))
            reports = session.edit(editor)
            started = time.perf_counter()
            for report in reports:
                log.append(
                    {
                        "seconds": time.perf_counter() - started,
                        "edits": len(report.edits),
                        "memory_gb": psutil.Process().memory_info().rss / 2**30,
                        "verdicts": {str(v): report.count(v) for v in ch.Verdict},
                    }
                )
                write(lines, "".join(f"{json.dumps(entry)}\n" for entry in log).encode())
                advance(len(report.edits))
                started = time.perf_counter()
    return editor, log


def check_same_run(
    hooks: ch.HookSet, batches: Sequence[Sequence[ch.EditRequest]], place: Path
) -> None:
    """Raise `typer.BadParameter` unless the batches made so far are the first of `batches`."""
    made = [{edit.request for edit in batch.edits} for batch in hooks.journal.batches]
    if made != [set(batch) for batch in batches[: len(made)]]:
        raise typer.BadParameter(
            f"{place} holds a run of other facts or batches; take another folder"
        )


def noted(lines: Path) -> list[dict[str, Any]]:
    """The log of an interrupted run's batches. Raises `typer.BadParameter` if it is damaged."""
    try:
        return [json.loads(line) for line in lines.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        raise damaged(lines) from None


def outcome(
    editor: ch.Editor, log: Sequence[dict[str, Any]], requests: Sequence[ch.EditRequest]
) -> dict[str, Any]:
    """Figures of the whole run, measured after its last batch over all facts that are in force."""
    timed = [entry for entry in log if entry]
    seconds, n_timed = sum(e["seconds"] for e in timed), sum(e["edits"] for e in timed)
    journal = editor.hooks.journal
    wanted = set(latest(requests))
    # Where a correction was refused, an earlier edit of its fact is still in force.
    live = [edit.request for edit in journal.live() if edit.request in wanted]
    lm = LanguageModel(editor.model, editor.tokenizer)
    scores = evaluate(lm, editor.hooks, live)
    held = scores.reliability.teacher_forced or 0.0
    # Retention of the first batches, weighted by how many of their facts are in force.
    in_force = {id(request) for request in live}
    early, total = 0.0, 0
    for number, batch in enumerate(journal.batches, 1):
        if batch.edits[0].id < FIRST_EDITS:
            n = sum(id(edit.request) in in_force for edit in batch.edits)
            early, total = early + n * scores.retention.get(number, 0.0), total + n
    return {
        "seconds_per_edit": seconds / n_timed if n_timed else None,
        "batches": list(log),
        "verdicts": {str(v): sum(e["verdicts"][v] for e in timed) for v in ch.Verdict},
        "reliability_of_all_asked": held * len(live) / len(wanted),
        "first_edits_at_the_end": early / total if total else None,
        "scores": asdict(scores),
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['edits']} edits of {result['facts']}, {result['batch_size']} a batch"
    table = Table(title=f"{title}, {result['readout']} readout, {result['gate']} gate")
    table.add_column("figure")
    table.add_column("value", justify="right")
    scores = result["scores"]
    pace = result["seconds_per_edit"]
    table.add_row("seconds per edit", "absent" if pace is None else f"{pace:.2f}")
    table.add_row("verdicts", ", ".join(f"{n} {v}" for v, n in result["verdicts"].items()))
    for name in ("reliability", "generality", "locality"):
        for form, value in scores[name].items():
            shown = "absent" if value is None else f"{value:.3f}"
            table.add_row(f"{name}, {form.replace('_', ' ')}", shown)
    table.add_row("reliability, refused ones counted", f"{result['reliability_of_all_asked']:.3f}")
    early = result["first_edits_at_the_end"]
    table.add_row(f"first {FIRST_EDITS} at the end", "absent" if early is None else f"{early:.3f}")
    table.add_row("perplexity before", f"{scores['perplexity_before']:.3f}")
    table.add_row("perplexity after", f"{scores['perplexity_after']:.3f}")
    table.add_row("ordinary tokens open", f"{scores['gate']['ordinary']:.4f}")
    console = Console()
    console.print(table)
    curve = Table(title="from the first batch to the last")
    for column in ("edits so far", "seconds an edit", "memory, GB"):
        curve.add_column(column, justify="right")
    so_far = 0
    for entry in result["batches"]:
        if entry:
            so_far += entry["edits"]
            pace = entry["seconds"] / entry["edits"]
            curve.add_row(str(so_far), f"{pace:.2f}", f"{entry['memory_gb']:.2f}")
    console.print(curve)


if __name__ == "__main__":
    run_script(main)
