"""What becomes of the first hundred edits of a memory as others follow.

    python -m bench.editing.memory_growth RUN [--others FILE ...] [--edits 3000] [--json]

RUN: the folder of a run of `bench.editing.memory`, which is not changed. The same hundred edits are
asked as they were when they were alone, among all of the run, and once others have joined them:
facts of the files OTHERS about subjects that have no edit yet, one each, and made-up ones for what
they lack: the first words of one edited subject and the last of another. The row of each is one
that the run found, so that it is as loud as any.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import coachhook as ch
from bench.harness.script import Json, run_script
from coachhook.evaluation.evaluate import evaluate
from coachhook.models.language_model import LanguageModel
from coachhook.system.progress import track

FIRST = 100


def main(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    others: Annotated[list[Path] | None, typer.Option(exists=True, dir_okay=False)] = None,
    edits: Annotated[int, typer.Option(min=1)] = 3000,
    batch_size: Annotated[int, typer.Option(min=1)] = 250,
    as_json: Json = False,
) -> None:
    """Ask the first hundred edits alone, among all, and among many more."""
    editor = ch.Editor.resume(run / "edits")
    journal = editor.hooks.journal
    live = [edit.request for edit in journal.live()]
    asked = live[:FIRST]
    rows = [scores(editor, asked)]
    more = joining(live, others or [])[: max(0, edits - len(live))]
    n_read = len(more)
    more += made_up([*live, *more], edits - len(live) - n_read)
    layer = editor.hooks.layers[0]
    blocks = editor.hooks.config.memory.write_blocks
    assert blocks is not None
    width = editor.hooks.base.shapes[layer][1]
    found = journal.rows(layer, len(blocks), width).float()
    found = found[[edit.id for edit in journal.live()]]
    with track("edits", len(more)) as advance:
        for start in range(0, len(more), batch_size):
            batch = more[start : start + batch_size]
            places = [(start + i) % len(found) for i in range(len(batch))]
            editor.edit(batch, values=found[places])
            advance(len(batch))
    rows.append(scores(editor, asked))
    alone = next(
        number
        for number in range(1, len(journal.batches) + 1)
        if journal.batches[number - 1].edits[-1].id + 1 >= FIRST
    )
    editor.rollback(alone)
    rows.insert(0, scores(editor, asked))
    editor.close()
    if as_json:
        counts = {"first": len(asked), "of other files": n_read, "made up": len(more) - n_read}
        print(json.dumps({**counts, "rows": rows}))
        return
    table = Table(title=f"The first {len(asked)} edits, greedy")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)


def scores(editor: ch.Editor, asked: Sequence[ch.EditRequest]) -> dict[str, Any]:
    """Of the asked edits among all that are in force."""
    found = evaluate(LanguageModel(editor.model, editor.tokenizer), editor.hooks, asked)
    hook = editor.hooks.modules(editor.model)[editor.hooks.layers[0]]
    return {
        "edits in force": len(editor.hooks.journal.live()),
        "threshold": hook.alpha,
        "reliability": found.reliability.greedy,
        "generality": found.generality.greedy if found.generality else None,
        "locality": found.locality.greedy if found.locality else None,
    }


def joining(live: Sequence[ch.EditRequest], files: Sequence[Path]) -> list[ch.EditRequest]:
    """The first fact of each subject of the files that has no edit yet."""
    taken = {request.subject.casefold() for request in live}
    found = []
    for path in files:
        for request in ch.load_requests(path).requests:
            if request.subject and request.subject.casefold() not in taken:
                taken.add(request.subject.casefold())
                found.append(request)
    return found


def made_up(requests: Sequence[ch.EditRequest], n: int) -> list[ch.EditRequest]:
    """Up to n requests about names that no request has: other first words before a subject's last
    one, with that subject's prompt and target."""
    taken = {request.subject.casefold() for request in requests}
    several = [request for request in requests if " " in request.subject]
    found: list[ch.EditRequest] = []
    for apart in range(1, len(several)):
        for number, request in enumerate(several):
            *first, _ = several[(number + apart) % len(several)].subject.split(" ")
            name = " ".join([*first, request.subject.split(" ")[-1]])
            if len(found) == n:
                return found
            if name.casefold() not in taken:
                taken.add(name.casefold())
                prompt = request.prompt.replace(request.subject, "{}", 1)
                found.append(ch.EditRequest(prompt, name, request.target))
    return found


if __name__ == "__main__":
    run_script(main)
