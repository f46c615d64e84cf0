"""The protocol: consecutive batch editing, every editor on the same facts, scored as it goes.

    python bench/quality.py [FACTS] [--first 0] [--edits 200] [--batch-size 10] [--every 10]
        [--editor NAME]... [--run DIR] [--json]

FACTS is any file that `coachhook edit` reads; without it, the 30 facts of the demo. A batch as wide
as the edits is single-round editing. After every `every` batches, and at the end, all edits in
force are evaluated, by the code of `coachhook eval`. Target values are optimised once, on the
unedited model, and given to every editor that takes them. NAME is one of bench/editors, with @ and
a number behind it where its own strength is not wanted. With --run the values and each editor's
result are kept in DIR, and the same command goes on with the editors that are missing.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from consecutive import demo_facts
from editors import MAKERS, Setting, make_editor, named
from intervals import METRICS, harmonic, interval, mean_of
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import coachhook as ch
from coachhook.evaluate import before_edits, evaluate
from coachhook.models import load_model
from coachhook.progress import track
from coachhook.requests import EditRequest
from coachhook.values import optimise_values

VERSION = 1


def main(
    facts: Annotated[Path | None, typer.Argument()] = None,
    first: int = 0,
    edits: int = 200,
    batch_size: int = 10,
    every: int = 10,
    editor: Annotated[list[str] | None, typer.Option()] = None,
    model: str = "smollm2",
    run: Annotated[Path | None, typer.Option(file_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    names = list(dict.fromkeys(editor or MAKERS))
    try:
        _ = [named(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    path = facts or demo_facts()
    requests = ch.load_requests(path).requests[first : first + edits]
    if not requests:
        raise typer.BadParameter(f"{path} has no facts from number {first} on")
    protocol = {
        "version": VERSION,
        "facts": path.name,
        "sha256": hashlib.sha256(json.dumps([r.to_dict() for r in requests]).encode()).hexdigest(),
        "edits": len(requests),
        "batch_size": batch_size,
        "every": every,
        "model": model,
        "config": ch.EditConfig().to_dict(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        results = compare(protocol, requests, names, run or Path(temporary))
    document = {"protocol": protocol, "editors": results}
    if as_json:
        print(json.dumps(document))
    else:
        show(document)


def compare(
    protocol: dict[str, Any], requests: Sequence[EditRequest], names: Sequence[str], place: Path
) -> dict[str, Any]:
    """Each editor's result; those that `place` has are read. Raises `typer.BadParameter` if `place`
    belongs to another protocol."""
    place.mkdir(parents=True, exist_ok=True)
    description = place / "protocol.json"
    if description.exists() and json.loads(description.read_text()) != jsonable(protocol):
        raise typer.BadParameter(
            f"{place} holds a run of another version, of other facts or settings; take another "
            "folder"
        )
    write(description, protocol)
    model, tokenizer = load_model(protocol["model"])
    values = target_values(model, tokenizer, requests, place)
    known = before_edits(model, tokenizer, requests)
    results = {}
    for name in names:
        done = place / f"{name}.json"
        if not done.exists():
            write(done, measure(name, protocol, requests, values, known))
        results[name] = json.loads(done.read_text())
    return results


def measure(
    name: str,
    protocol: dict[str, Any],
    requests: Sequence[EditRequest],
    values: Tensor,
    known: dict[EditRequest, Any],
) -> dict[str, Any]:
    """One editor on a fresh model: seconds and memory of its batches, and scores along the way."""
    # Adapters and fine-tuning draw and train; nothing else depends on it.
    torch.manual_seed(0)
    model, tokenizer = load_model(protocol["model"])
    setting = Setting.of(model, tokenizer, ch.EditConfig())
    subject = make_editor(name, setting)
    size, every = protocol["batch_size"], protocol["every"]
    starts = range(0, len(requests), size)
    seconds, points = [], []
    with track(name, len(requests)) as advance:
        for number, start in enumerate(starts, 1):
            rows = slice(start, start + size)
            began = time.perf_counter()
            subject.edit(requests[rows], values[rows])
            seconds.append(time.perf_counter() - began)
            if number % every == 0 or number == len(starts):
                asked = in_question(requests[: rows.stop])
                found = evaluate(model, tokenizer, subject.edits, asked, known=known)
                points.append({"edits": min(rows.stop, len(requests)), **found.to_dict()})
            advance(len(requests[rows]))
    return {
        "seconds_per_edit": sum(seconds) / len(requests),
        "batch_seconds": seconds,
        "bytes_held": subject.held(),
        "memory_gb": psutil.Process().memory_info().rss / 2**30,
        "points": points,
    }


def in_question(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The last request of every fact; those that an editor refused count, as failed."""
    return list({request.fact: request for request in requests}.values())


def target_values(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], place: Path
) -> Tensor:
    """Wanted outputs of the last hooked block, float32 `(n, d)`, kept in `place`."""
    kept = place / "values.safetensors"
    if not kept.exists():
        setting = Setting.of(model, tokenizer, ch.EditConfig())
        with track("target values", len(requests)) as advance:
            found = optimise_values(
                model,
                tokenizer,
                setting.architecture,
                setting.layers[-1],
                requests,
                setting.config.values,
                advance,
            )
        staging = kept.with_suffix(".writing")
        save_file({"hidden": found.hidden.contiguous()}, staging)
        staging.replace(kept)
    return load_file(kept)["hidden"]


def jsonable(document: Any) -> Any:
    return json.loads(json.dumps(document))


def write(path: Path, document: Any) -> None:
    """Whole or not at all."""
    staging = path.with_suffix(".writing")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    staging.replace(path)


def show(document: dict[str, Any]) -> None:
    protocol = document["protocol"]
    title = f"{protocol['edits']} edits of {protocol['facts']}, {protocol['batch_size']} a batch"
    table = Table(title=f"{title}: greedy, in brackets teacher-forced")
    for column in ("editor", *METRICS, "harmonic mean, 95 %", "perplexity", "KL", "s an edit"):
        table.add_column(column, justify="left" if column == "editor" else "right")
    for name, result in document["editors"].items():
        last = result["points"][-1]
        records = last["records"]
        cells = [
            f"{shown(mean_of(records, metric, 'greedy'))} "
            f"({shown(mean_of(records, metric, 'teacher_forced'))})"
            for metric in METRICS
        ]
        middle = interval(records, lambda some: harmonic(some, "greedy"))
        spread = "absent" if middle is None else f"{middle[0]:.3f}–{middle[1]:.3f}"
        table.add_row(
            name,
            *cells,
            f"{shown(harmonic(records, 'greedy'))}, {spread}",
            f"{last['perplexity_after'] / last['perplexity_before'] - 1:+.2%}",
            f"{last['divergence']:.4f}",
            f"{result['seconds_per_edit']:.2f}",
        )
    # As wide as it needs to be, also into a file.
    Console(width=max(Console().width, 140)).print(table)


def shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    typer.run(main)
