"""Batches of edits, and the folders that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from coachhook.cli.views.console import Document, console, layer_span, new_table, say
from coachhook.facts.request import EditRequest

if TYPE_CHECKING:
    from coachhook.hookset import HookSet
    from coachhook.journal.journal import EditRecord

_VERDICT_STYLES = {"applied": "green", "weak": "yellow", "refused": "red"}


def fact(request: EditRequest) -> str:
    """A fact as people read it."""
    return f"{request.prompt} → {request.target}"


def batch_document(number: int, edits: Sequence[EditRecord]) -> dict[str, Any]:
    """Batch `number`, from 1, and how each of its edits ended."""
    entries = [
        {
            "id": edit.id,
            "prompt": edit.request.prompt,
            "subject": edit.request.subject,
            "target": edit.request.target,
            "verdict": edit.verdict.value,
            "reason": edit.reason,
        }
        for edit in edits
    ]
    return {"batch": number, "edits": entries}


def inspection_document(folder: Path, hooks: HookSet) -> dict[str, Any]:
    """The document of `inspect`; `hooks` are those of `folder`."""
    superseded = hooks.journal.superseded()
    unsaid = {edit.id for edit in hooks.readout.unsaid()}
    batches = []
    for number, batch in enumerate(hooks.journal.batches, 1):
        batches.append(batch_document(number, batch.edits))
        for edit, entry in zip(batch.edits, batches[-1]["edits"], strict=True):
            entry |= {
                "enabled": edit.enabled,
                "superseded_by": superseded.get(edit.id),
                "unsaid": edit.id in unsaid,
            }
    return {
        "folder": str(folder),
        "bytes": folder_bytes(folder),
        "base_model": {"name": hooks.base.name, "checksums": dict(hooks.base.checksums)},
        "readout": hooks.config.readout,
        "gate": hooks.config.gate,
        "layers": hooks.layers,
        "write_blocks": hooks.config.memory.write_blocks,
        "merged_batches": hooks.journal.merged,
        "batches": batches,
    }


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def batch_view(batch: Document) -> None:
    """One edited batch: a line per edit."""
    edits = batch["edits"]
    table = new_table(f"batch {batch['batch']}: {_counted(edits)}", "verdict", "fact", "reason")
    for edit in edits:
        table.add_row(_verdict(edit), _fact(edit), Text(edit["reason"]))
    console.print(table)


def edited_view(document: Document) -> None:
    """The end of an editing run, whose batches have been shown already."""
    if not document["batches"]:
        say(f"all {document['facts']} facts are already in place")
        return
    edited = [edit for batch in document["batches"] for edit in batch["edits"]]
    say(f"{_counted(edited)} saved in {document['folder']}")
    if document["already_in_place"]:
        say(f"{document['already_in_place']} facts were already in place")


def inspection_view(document: Document) -> None:
    """The contents of a folder."""
    base = document["base_model"]
    say(f"{document['folder']}: {document['bytes'] / 1e6:.2f} MB")
    say(f"base model {base['name']}, checksum {base['checksums']['bfloat16'][:16]}")
    layers = layer_span(document["layers"])
    if document["readout"] == "memory":
        after = ", ".join(map(str, document["write_blocks"]))
        say(f"readout memory, gate at {layers}, rows after {after}")
    else:
        say(f"readout delta, gate {document['gate']}, {layers}")
    if document["merged_batches"]:
        say(f"batches 1 to {document['merged_batches']} are merged into one")
    table = new_table(None, "edit", "batch", "verdict", "fact", "remarks")
    for batch in document["batches"]:
        say(f"batch {batch['batch']}: {_counted(batch['edits'])}")
        for edit in batch["edits"]:
            number, replaced = edit["id"], edit["superseded_by"]
            remarks = [edit["reason"]] if edit["reason"] else []
            remarks += [] if replaced is None else [f"superseded by edit {replaced}"]
            remarks += [] if edit["enabled"] else ["disabled"]
            remarks += ["not said: no row in force says it"] if edit["unsaid"] else []
            about = Text("; ".join(remarks))
            table.add_row(str(number), str(batch["batch"]), _verdict(edit), _fact(edit), about)
    if document["batches"]:
        console.print(table)


def rollback_view(document: Document) -> None:
    """The result of a rollback."""
    say(
        f"{document['folder']} is back at batch {document['batches']} "
        f"(it had {document['batches_before']}); edits left: {document['edits']}"
    )


def compaction_view(document: Document) -> None:
    """The result of compaction."""
    merged, batches = document["merged_batches"], document["batches"]
    say(
        f"{document['folder']}: {merged} of {batches} batches are merged into one; "
        f"{document['bytes_before'] / 1e6:.2f} MB before, {document['bytes'] / 1e6:.2f} MB now"
    )


def _counted(edits: Sequence[Document]) -> str:
    found = [edit["verdict"] for edit in edits]
    counts = (f"{found.count(name)} {name}" for name in _VERDICT_STYLES if name in found)
    return f"{len(edits)} edit{'s' * (len(edits) != 1)} ({', '.join(counts)})"


def _verdict(edit: Document) -> Text:
    return Text(edit["verdict"], _VERDICT_STYLES[edit["verdict"]])


def _fact(edit: Document) -> Text:
    return Text(f"{edit['prompt']} → {edit['target']}")
