"""What one readout does to a thousand facts: their answers, paraphrases, neighbours, texts, forms.

    python -m bench.editing.memory [FACTS] [--edits 1000] [--batch-size 50] [--readout memory]
        [--run DIR] [--text FILE ...] [--json]

Edits as `bench.editing.consecutive` does, with which it shares its run folders, and looks closer at
the result: locality and perplexity apart where an edited subject literally stands, which entry
opens for a paraphrase, and in which forms a subject opens its entry. Without --text the page that
comes with the package is read alone.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import coachhook as ch
from bench.editing.consecutive import edit_all
from bench.harness.facts import chosen_facts
from bench.harness.script import Count, Facts, First, Json, Run, run_script
from coachhook.evaluation.evaluate import Evaluation, evaluate
from coachhook.evaluation.memory_forms import (
    LOCALITY,
    PARAPHRASE,
    Text,
    own_texts,
    texts_beside,
)
from coachhook.evaluation.ordinary_text import compare_text, ordinary_text
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_rows
from coachhook.models.tokens import Row
from coachhook.session import Options

FIRST_EDITS = 100


def main(
    facts: Facts = None,
    first: First = 0,
    edits: Count = 1000,
    batch_size: int = 50,
    readout: str = "memory",
    model: str = "smollm2",
    run: Run = None,
    text: Annotated[list[Path] | None, typer.Option(help="More ordinary text.")] = None,
    as_json: Json = False,
) -> None:
    """Edit the facts, and look closely at what became of them and of everything else."""
    path, requests = chosen_facts(facts, first, edits)
    with tempfile.TemporaryDirectory() as temporary:
        place = run or Path(temporary)
        editor, log = edit_all(requests, batch_size, model, Options(readout=readout), place)
        lm = LanguageModel(editor.model, editor.tokenizer)
        live = [edit.request for edit in editor.hooks.journal.live()]
        timed = [entry["seconds"] / entry["edits"] for entry in log if entry]
        folder = sum(f.stat().st_size for f in (place / "edits").iterdir())
        result = {
            "facts": path.name,
            "edits": len(live),
            "readout": readout,
            "verdicts": {str(v): sum(e["verdicts"][v] for e in log if e) for v in ch.Verdict},
            "seconds an edit": fmean(timed) if timed else None,
            "seconds an edit, last batch": timed[-1] if timed else None,
            "bytes an edit": folder / len(live),
            **answers(evaluate(lm, editor.hooks, live), live),
            **texts(lm, editor.hooks, live, text or []),
            **openings(lm, editor.hooks, live),
        }
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{result['edits']} edits of {path.name}, {readout} readout")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def answers(found: Evaluation, live: Sequence[ch.EditRequest]) -> dict[str, Any]:
    """Scores of all edits and of the first; locality also without prompts that name a subject."""
    subjects = {request.subject for request in live}
    apart = [
        record.locality
        for record, request in zip(found.records, live, strict=True)
        if not any(s in item.prompt for item in request.locality for s in subjects)
    ]
    early = found.records[:FIRST_EDITS]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return {
        "reliability": asdict(found.reliability),
        "reliability, first hundred": mean([r.reliability.greedy for r in early]),
        "generality": asdict(found.generality),
        "generality, first hundred": mean([r.generality.greedy for r in early]),
        "locality": asdict(found.locality),
        "locality where no subject stands": {
            "teacher_forced": mean([scores.teacher_forced for scores in apart]),
            "greedy": mean([scores.greedy for scores in apart]),
            "share of prompts": len(apart) / len(live),
        },
    }


def texts(
    lm: LanguageModel, hooks: ch.HookSet, live: Sequence[ch.EditRequest], more: Sequence[Path]
) -> dict[str, Any]:
    """Rise of perplexity on each text, in per cent, and how often a subject stands in it."""
    known = {"the page": ordinary_text()} | {p.name: p.read_text(encoding="utf-8") for p in more}
    found: dict[str, Any] = {}
    for name, text in known.items():
        scores = compare_text(lm, text, hooks.off)
        rise = 100 * (scores.perplexity_after / scores.perplexity_before - 1)
        found[f"perplexity of {name}, per cent"] = rise
        found[f"subjects in {name}"] = sum(text.count(request.subject) for request in live)
    return found


def openings(
    lm: LanguageModel, hooks: ch.HookSet, live: Sequence[ch.EditRequest]
) -> dict[str, Any]:
    """Shares of paraphrases and forms that open their own subject's edits at every layer, and of
    neighbours' prompts, in which no subject stands, that open any."""
    numbers: dict[str, int] = {}
    subject_of = {
        edit.id: numbers.setdefault(edit.request.subject, len(numbers)) for edit in hooks.edits
    }
    of_kind: dict[str, list[Text]] = {PARAPHRASE: []}
    for text in own_texts(lm, live):
        of_kind.setdefault(text.kind, []).append(text)
    shares = {}
    for kind, texts in of_kind.items():
        own = [numbers[live[text.request].subject] for text in texts]
        shares[kind] = _own(lm, hooks, [text.row for text in texts], own, subject_of)
    beside = [text.row for text in texts_beside(lm, live, live) if text.kind == LOCALITY]
    return {
        "paraphrases that open their own": shares.pop(PARAPHRASE),
        "neighbours that open any": _any(lm, hooks, beside),
        **{f"opens: {kind}": share for kind, share in shares.items()},
    }


def _own(
    lm: LanguageModel,
    hooks: ch.HookSet,
    rows: Sequence[Row],
    own: Sequence[int],
    subject_of: dict[int, int],
) -> float | None:
    if not rows:
        return None
    modules = list(hooks.modules(lm.model).values())

    def read(hook: Any, keys: Any, _: slice) -> Any:
        reading = hook.read(keys)
        return reading.is_open, reading.edit

    opened = [True] * len(rows)
    for is_open, edit in read_rows(lm, rows, modules, read, every=False):
        for i, (one, whose) in enumerate(zip(is_open.tolist(), edit.tolist(), strict=True)):
            # A gate that tells no edits apart says -1.
            opened[i] &= one and (whose < 0 or subject_of[whose] == own[i])
    return fmean(opened)


def _any(lm: LanguageModel, hooks: ch.HookSet, rows: Sequence[Row]) -> float | None:
    if not rows:
        return None
    modules = list(hooks.modules(lm.model).values())
    layers = read_rows(lm, rows, modules, lambda h, k, _: [h.read(k).is_open], every=True)
    at_all = layers[0][0]
    for (is_open,) in layers[1:]:
        at_all = at_all & is_open
    lengths = [len(row.ids) for row in rows]
    return fmean(bool(part.any()) for part in at_all.split(lengths))


if __name__ == "__main__":
    run_script(main)
