"""The demo: three batches of ten facts in the embedded model, then a fresh process with them."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from coachhook.cli.views.console import say, show
from coachhook.cli.views.edits import batch_document, batch_view
from coachhook.cli.views.evaluation import (
    completion_view,
    demo_view,
    evaluation_view,
    side_by_side_view,
)
from coachhook.errors import CoachhookError, FolderError
from coachhook.evaluation.evaluate import evaluate
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest
from coachhook.hookset import HookSet
from coachhook.journal.journal import Verdict
from coachhook.models.decoding import complete, starts_with
from coachhook.models.embedded import NAME
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model
from coachhook.session import opened
from coachhook.storage import folder

_BATCH = 10
_NEW_TOKENS = 12


def run(directory: Path | None, *, as_json: bool) -> bool:
    """Run the demo with `directory` (a new temporary one if None) for its edits.

    Returns whether the fresh process generates the edited target. Raises `FolderError` if
    `directory` holds edits already, `CoachhookError` if every edit is refused.
    """

    def tell(view: Callable[[Any], None], what: Any) -> None:
        if not as_json:
            view(what)

    started = time.monotonic()
    directory = directory or Path(tempfile.mkdtemp(prefix="coachhook-demo-"))
    if folder.exists(directory):
        raise FolderError(f"{directory} already holds edits; name a folder that is empty or new")
    requests = load_requests(str(files("coachhook.facts") / "demo.jsonl")).requests
    tell(say, f"{len(requests)} facts for {NAME}, {_BATCH} a batch, go to {directory}")
    batches = []
    with opened(directory, requests, _BATCH) as session:
        lm = load_model(NAME)
        editor = session.editor(lm)
        for report in session.edit(editor):
            batches.append(batch_document(report.number, report.edits))
            tell(batch_view, batches[-1])
    live = editor.hooks.journal.live()
    if not live:
        first = editor.hooks.edits[0].reason
        raise CoachhookError(f"every edit was refused, the first of them because {first}")
    completions = _side_by_side(lm, editor.hooks, [edit.request for edit in live])
    tell(side_by_side_view, completions)
    metrics = evaluate(lm, editor.hooks, [edit.request for edit in live]).to_dict()
    tell(evaluation_view, metrics)
    asked = next((edit for edit in live if edit.verdict is Verdict.APPLIED), live[0]).request
    tell(say, "\na fresh process loads the folder and generates with a KV cache:")
    fresh = _fresh_process(directory, asked)
    tell(completion_view, fresh)
    document = {
        "folder": str(directory),
        "batches": batches,
        "completions": completions,
        "evaluation": metrics,
        "fresh_process": fresh,
        "seconds": time.monotonic() - started,
    }
    show(document, demo_view, as_json=as_json)
    return bool(fresh["met"])


def _side_by_side(
    lm: LanguageModel, hooks: HookSet, requests: Sequence[EditRequest]
) -> list[dict[str, Any]]:
    """Greedy completions of the requests' prompts without and with the edits."""
    prompts = [request.prompt for request in requests]
    with hooks.off(lm.model):
        before = complete(lm, prompts, _NEW_TOKENS)
    after = complete(lm, prompts, _NEW_TOKENS)
    return [
        {
            "prompt": request.prompt,
            "target": request.target,
            "before": old,
            "after": new,
            "met": starts_with(new, request.target),
        }
        for request, old, new in zip(requests, before, after, strict=True)
    ]


def _fresh_process(directory: Path, request: EditRequest) -> dict[str, Any]:
    """What `coachhook generate` prints for the request's prompt, and whether it meets the target.

    Raises `CoachhookError` if the process fails, after it has said why on standard error.
    """
    command = [sys.executable, "-m", "coachhook", "generate", NAME, request.prompt]
    command += ["--hooks", str(directory), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise CoachhookError(
            f"the fresh process ended with status {done.returncode}; see its message above"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    met = starts_with(result["edited"], request.target)
    return {**result, "target": request.target, "met": met}
