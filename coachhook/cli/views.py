"""What the commands show: one JSON document, or tables and side-by-side views for people.

Every view takes the same plain document that `--json` would print.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coachhook.facts.request import EditRequest
from coachhook.system.progress import console as progress_console

if TYPE_CHECKING:
    from coachhook.hookset import HookSet
    from coachhook.journal.journal import EditRecord
    from coachhook.statistics.measure import KeyStatistics

console = Console(highlight=False)

Document = Mapping[str, Any]

_VERDICT_STYLES = {"applied": "green", "weak": "yellow", "refused": "red"}
# One per set of layers that open together, in order of appearance.
_PALETTE = ("green", "yellow", "magenta", "cyan", "blue", "red")


def show(document: Document, view: Callable[[Document], None], *, as_json: bool) -> None:
    """Print `document` as JSON on standard output, or as `view` draws it."""
    if as_json:
        print(json.dumps(_finite(document), indent=1, allow_nan=False))
    else:
        view(document)


def say(text: str) -> None:
    """Print one plain line, wrapped to the width of the terminal."""
    console.print(Text(text))


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
    """What `folder` holds, which are `hooks`."""
    superseded = hooks.journal.superseded()
    batches = []
    for number, batch in enumerate(hooks.journal.batches, 1):
        batches.append(batch_document(number, batch.edits))
        for edit, entry in zip(batch.edits, batches[-1]["edits"], strict=True):
            entry |= {"enabled": edit.enabled, "superseded_by": superseded.get(edit.id)}
    return {
        "folder": str(folder),
        "bytes": folder_bytes(folder),
        "base_model": {"name": hooks.base.name, "checksums": dict(hooks.base.checksums)},
        "gate": hooks.config.gate,
        "layers": hooks.layers,
        "merged_batches": hooks.journal.merged,
        "batches": batches,
    }


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def statistics_entries(statistics: KeyStatistics) -> list[dict[str, Any]]:
    """A summary of each layer."""
    return [
        {
            "layer": layer,
            "d_in": len(found.moment),
            "tokens": found.n_tokens,
            "background_keys": len(found.background),
            "moment_trace": found.moment.trace().item(),
            "mean_key_norm": found.background.float().norm(dim=-1).mean().item(),
            "first_key_norm": found.first.float().norm(dim=-1).mean().item(),
        }
        for layer, found in statistics.items()
    ]


def batch_view(batch: Document) -> None:
    """One edited batch: a line per edit."""
    edits = batch["edits"]
    table = _table(f"batch {batch['batch']}: {_counted(edits)}", "verdict", "fact", "reason")
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


def rollback_view(document: Document) -> None:
    """What a rollback left."""
    say(
        f"{document['folder']} is back at batch {document['batches']} "
        f"(it had {document['batches_before']}); edits left: {document['edits']}"
    )


def compaction_view(document: Document) -> None:
    """What compaction left."""
    merged, batches = document["merged_batches"], document["batches"]
    say(
        f"{document['folder']}: {merged} of {batches} batches are merged into one; "
        f"{document['bytes_before'] / 1e6:.2f} MB before, {document['bytes'] / 1e6:.2f} MB now"
    )


def evaluation_view(document: Document) -> None:
    """The metrics of an `Evaluation`, in per cent where they are shares."""
    table = _table(
        f"{document['n_requests']} facts, {document['already_true']} of them true before",
        "%",
        "before",
        "teacher-forced",
        "greedy",
        "exact",
        numeric=4,
    )
    for metric in ("reliability", "generality", "locality"):
        scores = document[metric]
        before = _percent(document["before_reliability"]) if metric == "reliability" else ""
        forms = (_percent(scores[form]) for form in ("teacher_forced", "greedy", "exact"))
        table.add_row(metric, before, *forms)
    console.print(table)
    gate = document["gate"]
    gates = _table(None, "tokens whose gate is open", "%", numeric=1)
    for label, key in (
        ("subjects in the edited prompts (recall)", "recall"),
        ("subjects in paraphrases (recall)", "paraphrase_recall"),
        ("of all open tokens, subjects (precision)", "precision"),
        ("ordinary text (false alarms)", "ordinary"),
        ("locality prompts (false alarms)", "locality"),
    ):
        gates.add_row(label, _percent(gate[key]))
    console.print(gates)
    before, after = document["perplexity_before"], document["perplexity_after"]
    say(
        f"perplexity of ordinary text {before:.3f} → {after:.3f} ({after / before - 1:+.2%}), "
        f"divergence {document['divergence']:.4f} nats a token"
    )
    likelier, former = document["preferences"], document["before_preferences"]
    if any(value is not None for value in likelier.values()):
        told = (f"{k} {_percent(v)} % (before {_percent(former[k])})" for k, v in likelier.items())
        say(f"the likelier of two answers: {', '.join(told)}")
    kept = ", ".join(f"{n}: {_percent(score)} %" for n, score in document["retention"].items())
    say(f"reliability by batch (retention) {kept or '–'}")


def completion_view(document: Document) -> None:
    """One prompt with its unedited and edited completions, and the gates' trace if there is one."""
    table = _table(None, "", "completion")
    table.add_row("unedited", Text(document["unedited"]))
    table.add_row("edited", Text(document["edited"]))
    say(document["prompt"])
    console.print(table)
    if "trace" in document:
        trace_view(document["trace"], document["gate"], document["edits"])


def side_by_side_view(rows: Sequence[Document]) -> None:
    """Completions of many prompts before and after; a target that is met stands in green."""
    table = _table(None, "prompt", "before", "after")
    for row in rows:
        style = "green" if row["met"] else "yellow"
        table.add_row(
            Text(row["prompt"]),
            Text(_one_line(row["before"])),
            Text(_one_line(row["after"]), style),
        )
    console.print(table)


def demo_view(document: Document) -> None:
    """The end of the demo, whose steps have been shown already."""
    fresh = document["fresh_process"]
    outcome = "meets" if fresh["met"] else "does NOT meet"
    say(f"this {outcome} the edited target {fresh['target']!r}")
    say(f"{document['seconds']:.0f} seconds in all; the edits stay in {document['folder']}")


def trace_view(trace: Document, gate: str, edits: Mapping[int, str]) -> None:
    """The text with each token in the colour of the layers whose gates it opens, and a table of
    these tokens. trace: see `Trace`; edits: what each edit that it names says."""
    tokens, layers = trace["tokens"], trace["layers"]
    fired = [
        (position, i)
        for position in range(len(tokens))
        for i in range(len(layers))
        if trace["is_open"][i][position]
    ]
    opened: dict[int, tuple[int, ...]] = {}
    for position, i in fired:
        opened[position] = (*opened.get(position, ()), layers[i])
    sets = dict.fromkeys(opened.values())
    styles = {s: f"bold {_PALETTE[i % len(_PALETTE)]}" for i, s in enumerate(sets)}
    text = Text()
    for position, token in enumerate(tokens):
        text.append(token, styles[opened[position]] if position in opened else None)
    console.print(text)
    for layers_open, style in styles.items():
        console.print(Text(f"open at {_layers(layers_open)}", style))
    if not fired:
        say("no gate opens")
        return
    # The sequence gate's threshold is one of z-scores.
    measure = "z" if gate == "sequence" else "score"
    table = _table(None, "token", "layer", measure, "threshold", "edit", numeric=4)
    for position, i in fired:
        edit = trace["edit"][i][position]
        table.add_row(
            Text(repr(tokens[position])),
            str(layers[i]),
            f"{trace[measure][i][position]:.3f}",
            f"{trace['threshold'][i]:.3f}",
            "–" if edit < 0 else str(edit),
        )
    console.print(table)
    for edit, fact in edits.items():
        say(f"edit {edit}: {fact}")


def inspection_view(document: Document) -> None:
    """What a folder holds."""
    base = document["base_model"]
    say(f"{document['folder']}: {document['bytes'] / 1e6:.2f} MB")
    say(f"base model {base['name']}, checksum {base['checksums']['bfloat16'][:16]}")
    say(f"gate {document['gate']}, {_layers(document['layers'])}")
    if document["merged_batches"]:
        say(f"batches 1 to {document['merged_batches']} are merged into one")
    table = _table(None, "edit", "batch", "verdict", "fact", "remarks")
    for batch in document["batches"]:
        say(f"batch {batch['batch']}: {_counted(batch['edits'])}")
        for edit in batch["edits"]:
            number, replaced = edit["id"], edit["superseded_by"]
            remarks = [edit["reason"]] if edit["reason"] else []
            remarks += [] if replaced is None else [f"superseded by edit {replaced}"]
            remarks += [] if edit["enabled"] else ["disabled"]
            about = Text("; ".join(remarks))
            table.add_row(str(number), str(batch["batch"]), _verdict(edit), _fact(edit), about)
    if document["batches"]:
        console.print(table)


def statistics_view(document: Document) -> None:
    """Key statistics layer by layer."""
    columns = ("layer", "d_in", "tokens", "trace of moment", "key norm", "first-position norm")
    table = _table(None, *columns)
    for layer in document["layers"]:
        table.add_row(
            str(layer["layer"]),
            str(layer["d_in"]),
            str(layer["tokens"]),
            f"{layer['moment_trace']:.4g}",
            f"{layer['mean_key_norm']:.4g}",
            f"{layer['first_key_norm']:.4g}",
        )
    console.print(table)


def plan_view(plan: Document) -> None:
    """What a run will need, on standard error: it is no part of the result."""
    table = _table(None, "part", "on", "GB", "seconds at most", numeric=2)
    for part in plan["parts"]:
        seconds = f"{part['seconds']:.0f}" if part["seconds"] else ""
        table.add_row(part["name"], part["device"], f"{part['n_bytes'] / 1e9:.3f}", seconds)
    progress_console.print(table)
    for device, free in plan["free_bytes"].items():
        needed = plan["needed_bytes"][device] / 1e9
        weights = plan["weights_bytes"].get(device, 0) / 1e9
        beside = f" beside {weights:.2f} GB of weights" if weights else ""
        tell(f"needs {needed:.2f} GB of {free / 1e9:.1f} GB free on {device}{beside}")


def tell(text: str) -> None:
    """Print one plain line on standard error."""
    progress_console.print(Text(text), soft_wrap=True)


def calibration_view(document: Document) -> None:
    """What the keys said, what was tried, and what was chosen."""
    columns = ("layer", "recall", "firing", "floor", "ceiling", "sinks", "leverage")
    keys = _table("keys of the probes, before any edit", *columns, numeric=7)
    for layer in document["layers"]:
        found = layer["separation"]
        keys.add_row(
            str(layer["layer"]),
            _percent(found["recall"]),
            _percent(found["firing"]),
            f"{found['floor']:.2f}",
            f"{found['ceiling']:.2f}",
            _percent(layer["sinks"]),
            f"{layer['leverage']:.3g}",
        )
    console.print(keys)
    headings = (
        "layers",
        "λ",
        "clamp",
        "floor",
        "reliability",
        "generality",
        "locality",
        "forced",
        "s",
    )
    tried = _table(f"{len(document['trials'])} trials", *headings, numeric=8)
    for trial in document["trials"]:
        settings, scores = trial["settings"], trial["scores"]
        chosen = settings == document["settings"]
        tried.add_row(
            _layers(settings["layers"]),
            f"{settings['preservation']:g}",
            f"{settings['clamp']:g}",
            f"{settings['resemblance']:.2f}",
            *(_percent(scores[name]) for name in ("reliability", "generality", "locality")),
            " ".join(map(_percent, scores["teacher_forced"])),
            f"{trial['seconds']:.0f}",
            style="green" if chosen else "",
        )
    console.print(tried)
    say(
        f"fingerprints of {document['settings']['fingerprint_size']} numbers; "
        f"{document['seconds']:.0f} seconds"
        + (", when the time was over" if document["cut_short"] else "")
    )
    say(f"saved in {document['profile']}")


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(title: str | None, *columns: str, numeric: int = 0) -> Table:
    """A table; its last `numeric` columns hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        right = i >= len(columns) - numeric
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _counted(edits: Sequence[Document]) -> str:
    found = [edit["verdict"] for edit in edits]
    counts = (f"{found.count(name)} {name}" for name in _VERDICT_STYLES if name in found)
    return f"{len(edits)} edit{'s' * (len(edits) != 1)} ({', '.join(counts)})"


def _verdict(edit: Document) -> Text:
    return Text(edit["verdict"], _VERDICT_STYLES[edit["verdict"]])


def _fact(edit: Document) -> Text:
    return Text(f"{edit['prompt']} → {edit['target']}")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _layers(layers: Sequence[int]) -> str:
    """ "layer 8", "layers 8-12", or "layers 8, 10, 11"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
