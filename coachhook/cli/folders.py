"""Commands that inspect, roll back or compact a folder of edits. They need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coachhook.cli.arguments import Json
from coachhook.cli.views.console import show
from coachhook.cli.views.edits import (
    compaction_view,
    folder_bytes,
    inspection_document,
    inspection_view,
    rollback_view,
)
from coachhook.errors import ConfigError


def inspect(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    as_json: Json = False,
) -> None:
    """Tell what a folder holds: base model, settings, batches, edits. Needs no model."""
    from coachhook.hookset import HookSet

    hookset = HookSet.from_pretrained(directory)
    document = inspection_document(directory, hookset)
    show(document, inspection_view, as_json=as_json)


def rollback(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    to: Annotated[int, typer.Option("--to", help="The last batch to keep; 0 keeps none.")],
    as_json: Json = False,
) -> None:
    """Forget every batch after batch TO. Needs no model."""
    from coachhook.hookset import HookSet
    from coachhook.storage import folder

    folder.read_config(directory)  # before the lock, which would make a folder that is missing
    with folder.locked(directory):
        hookset = HookSet.from_pretrained(directory)
        batches = hookset.journal.batches
        if not 0 <= to <= len(batches):
            raise ConfigError(
                f"there is no batch {to} in {directory}; give a number from 0 to {len(batches)}"
            )
        before = len(batches)
        hookset.journal.forget_after(to)
        hookset.save_pretrained(directory)
    document = {
        "folder": str(directory),
        "batches_before": before,
        "batches": to,
        "edits": len(hookset.edits),
    }
    show(document, rollback_view, as_json=as_json)


def compact(
    directory: Annotated[Path, typer.Argument(help="The folder of edits.")],
    keep: Annotated[int, typer.Option(min=0, help="Latest batches to leave as they are.")] = 0,
    as_json: Json = False,
) -> None:
    """Merge batches into one, which cannot be taken apart any more. Needs no model."""
    from coachhook.hookset import HookSet
    from coachhook.storage import folder

    folder.read_config(directory)  # before the lock, which would make a folder that is missing
    with folder.locked(directory):
        hookset = HookSet.from_pretrained(directory)
        before = folder_bytes(directory)
        hookset.compact(keep)
        hookset.save_pretrained(directory)
    document = {
        "folder": str(directory),
        "batches": len(hookset.journal.batches),
        "merged_batches": hookset.journal.merged,
        "edits": len(hookset.edits),
        "bytes_before": before,
        "bytes": folder_bytes(directory),
    }
    show(document, compaction_view, as_json=as_json)
