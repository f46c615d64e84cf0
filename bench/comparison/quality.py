"""The protocol: consecutive batch editing, every editor on the same facts, scored as it goes.

    python -m bench.comparison.quality [FACTS] [--first 0] [--edits 200] [--batch-size 10]
        [--every 10] [--editor NAME]... [--run DIR] [--json]

FACTS is any file that `coachhook edit` reads; without it, the 30 facts of the demo. One batch of
all edits is single-round editing. After every `every` batches, and at the end, the last request of
every fact so far is evaluated by the code of `coachhook eval`, even if an editor refused it. Target
values are optimised once, on the unedited model, and given to every editor that takes them. NAME is
an editor of bench/comparison/editors, optionally with @ and a number in place of its default. With
--run the values and each editor's result are kept in DIR, and the same command goes on with the
editors that are missing.
"""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import coachhook as ch
from bench.comparison.editors import (
    EDITORS_VERSION,
    MAKERS,
    Setting,
    hooked_layers,
    make_editor,
    named,
    takes_values,
)
from bench.harness.facts import chosen_facts, in_batches
from bench.harness.machine import device_name, machine
from bench.harness.memory import peak_memory
from bench.harness.run_folder import checksum, damaged, kept, run_folder, write
from bench.harness.script import FAILURES, Count, Facts, First, Json, Run, run_script
from bench.harness.timing import Timings, take_turns
from coachhook.editing.values import optimise_values
from coachhook.errors import NotEnoughMemoryError
from coachhook.evaluation.bootstrap import METRICS, harmonic, interval, lead, mean_of
from coachhook.evaluation.evaluate import Edits, before_edits, evaluate
from coachhook.evaluation.ordinary_text import ordinary_text
from coachhook.facts.remaining import latest
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import greedy
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model
from coachhook.report.runs import VERSION
from coachhook.system.progress import track

# For the speeds: tokens read, tokens decoded, and turns.
_PROMPT, _DECODED, _ROUNDS = 64, 16, 5


@dataclass(frozen=True)
class Values:
    """hidden: target values at the last hooked block, float32 `(n, d)`; seconds: for all."""

    hidden: Tensor
    seconds: float


def main(
    facts: Facts = None,
    first: First = 0,
    edits: Count = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 10,
    every: Annotated[int, typer.Option(min=1)] = 10,
    editor: Annotated[list[str] | None, typer.Option()] = None,
    model: str = "smollm2",
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Put every editor through the same edits."""
    try:
        names = list(dict.fromkeys(named(name) for name in editor or MAKERS))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    path, requests = chosen_facts(facts, first, edits)
    protocol = protocol_of(path, requests, batch_size, every, model)
    with tempfile.TemporaryDirectory() as temporary:
        results = compare(protocol, requests, names, run or Path(temporary))
    document = {"protocol": protocol, "editors": results}
    if as_json:
        print(json.dumps(document))
    else:
        show(document)


def protocol_of(
    facts: Path, requests: Sequence[EditRequest], batch_size: int, every: int, model: str
) -> dict[str, Any]:
    """The facts and settings that identify a comparison."""
    return {
        "version": VERSION,
        "facts": facts.name,
        "sha256": checksum(requests),
        "edits": len(requests),
        "batch_size": batch_size,
        "every": every,
        "model": model,
        "config": ch.EditConfig(readout="delta").to_dict(),
        "editors": EDITORS_VERSION,
        "device": device_name(),
    }


def compare(
    protocol: dict[str, Any], requests: Sequence[EditRequest], names: Sequence[str], place: Path
) -> dict[str, Any]:
    """Each editor's result, read from `place` where it is kept there."""
    config = ch.EditConfig.from_dict(protocol["config"])
    with run_folder(place, protocol):
        lm = load_model(protocol["model"], dtype=torch.float32)
        # First, since it refuses prompts that do not fit the model, and the rest takes hours.
        known = before_edits(lm, requests)
        values = target_values(lm, requests, config, place)
        with ch.Editor.from_pretrained(*lm, config=config) as engine:
            sinks = frozenset(engine.sinks(requests))
        del lm, engine
        measured = partial(measure, protocol, requests, values, known, sinks)
        return {name: kept(place / f"{name}.json", partial(measured, name)) for name in names}


def measure(
    protocol: dict[str, Any],
    requests: Sequence[EditRequest],
    values: Values,
    known: dict[EditRequest, Any],
    sinks: frozenset[EditRequest],
    name: str,
) -> dict[str, Any]:
    """One editor on a fresh model: seconds of its batches, peak memory while editing (model
    included), and scores along the way; after a failure, its reason and what was measured before.
    Raises `NotEnoughMemoryError`, which depends on the machine, not on the editor."""
    # The previous editor may hold reference cycles, and must not count as this one's memory.
    gc.collect()
    # For the adapters, whose initial weights are random.
    torch.manual_seed(0)
    lm = load_model(protocol["model"], dtype=torch.float32)
    config = ch.EditConfig.from_dict(protocol["config"])
    subject = make_editor(name, Setting.of(lm, config, sinks))
    ahead = values.seconds / len(requests) if takes_values(name) else 0.0
    row_of = {request: i for i, request in enumerate(requests)}
    batches = consecutive(requests, protocol["batch_size"])
    seconds: list[float] = []
    points: list[dict[str, Any]] = []
    failure, asked, peak = None, 0, 0
    with track(name, len(requests)) as advance:
        for number, (batch, wanted) in enumerate(batches, 1):
            peak_memory(lm.model.device)
            began = time.perf_counter()
            try:
                subject.edit(wanted, values.hidden[[row_of[request] for request in wanted]])
            except NotEnoughMemoryError:
                raise
            except FAILURES as error:
                failure = f"batch {number}: {error}"
                break
            asked += len(batch)
            seconds.append(time.perf_counter() - began + ahead * len(batch))
            peak = max(peak, peak_memory(lm.model.device))
            if number % protocol["every"] == 0 or number == len(batches):
                so_far = latest(requests[:asked])
                scores = evaluate(lm, subject.edits, so_far, known=known)
                first = [
                    record.reliability.teacher_forced or 0.0
                    for request, record in zip(so_far, scores.records, strict=True)
                    if request in batches[0][0]
                ]
                kept_on = fmean(first) if first else None
                points.append({"edits": asked, "first_batch": kept_on, **scores.to_dict()})
            advance(len(batch))
    return {
        "editor": name,
        "failure": failure,
        "machine": machine(),
        "seconds_per_edit": sum(seconds) / asked if asked else None,
        "batch_seconds": seconds,
        "bytes_held": subject.held(),
        "peak_bytes": peak,
        "overhead": overhead(lm, subject.edits),
        "points": points,
    }


def overhead(lm: LanguageModel, edits: Edits) -> dict[str, Any]:
    """Seconds to the first token after `_PROMPT` tokens, and tokens a second of greedy decoding,
    with and without the edits, as medians of `_ROUNDS` turns. Ratios: speed with the edits to speed
    without, medians of the ratios within turns."""
    ids = lm.tokenizer(ordinary_text(), return_tensors="pt")["input_ids"].to(lm.model.device)
    prompt = ids[:, :_PROMPT]
    mask = torch.ones_like(prompt)

    def first_token() -> None:
        with torch.no_grad():
            lm.model(input_ids=prompt, attention_mask=mask, logits_to_keep=1)

    # Tokens decoded in each state; a model may stop before `_DECODED`.
    decoded = {"unedited": 0, "edited": 0}
    turn = ""

    def decode() -> None:
        decoded[turn] = greedy(lm, prompt[:, :8], mask[:, :8], _DECODED).shape[1]

    with ExitStack() as state:

        def before(name: str) -> None:
            nonlocal turn
            turn = name
            state.close()
            if name == "unedited":
                state.enter_context(edits.off(lm.model))

        def turns(step: Callable[[], None]) -> dict[str, Timings]:
            steps = {"unedited": step, "edited": step}
            take_turns(steps, 1, lm.model.device, before)
            return take_turns(steps, _ROUNDS, lm.model.device, before)

        first, decoding = turns(first_token), turns(decode)
    return {
        "first_token_seconds": {name: timings.median for name, timings in first.items()},
        "first_token_ratio": first["unedited"].over(first["edited"])[0],
        "tokens_per_second": {name: decoded[name] / t.median for name, t in decoding.items()},
        "tokens_per_second_ratio": decoding["unedited"].over(decoding["edited"])[0]
        * (decoded["edited"] / decoded["unedited"]),
    }


def consecutive(
    requests: Sequence[EditRequest], size: int
) -> list[tuple[Sequence[EditRequest], list[EditRequest]]]:
    """Batches in order, each with the requests that editors are given: one for each fact."""
    return [(batch, latest(batch)) for batch in in_batches(requests, size)]


def target_values(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: ch.EditConfig,
    place: Path,
) -> Values:
    """The target values of all requests, from `place`, or optimised now and kept there.

    Raises `typer.BadParameter` if the kept file is damaged or has another number of values.
    """
    path = place / "values.safetensors"
    if not path.exists():
        architecture, layers = hooked_layers(lm.model, config)
        began = time.perf_counter()
        with track("target values", len(requests)) as advance:
            optimised = optimise_values(
                lm,
                architecture,
                layers[-1],
                requests,
                config.values,
                advance,
            )
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        write(path, save({"hidden": optimised.hidden.contiguous(), "seconds": took}))
    try:
        tensors = load_file(path)
        values = Values(tensors["hidden"], float(tensors["seconds"]))
    except (SafetensorError, KeyError):
        raise damaged(path) from None
    if len(values.hidden) != len(requests):
        raise damaged(path)
    return values


def show(document: dict[str, Any]) -> None:
    protocol = document["protocol"]
    title = f"{protocol['edits']} edits of {protocol['facts']}, {protocol['batch_size']} a batch"
    table = Table(title=f"{title}: greedy, in brackets teacher-forced")
    columns = ("editor", *METRICS, "harmonic mean, 95 %", "first leads by, 95 %")
    for column in (*columns, "perplexity", "KL", "s an edit"):
        table.add_column(column, justify="left" if column == "editor" else "right")
    best: list[Any] = []
    for name, result in document["editors"].items():
        if result["failure"]:
            table.add_row(name, f"failed: {result['failure']}")
            continue
        last = result["points"][-1]
        records = last["records"]
        best = best or records
        cells = [
            f"{shown(mean_of(records, metric, 'greedy'))} "
            f"({shown(mean_of(records, metric, 'teacher_forced'))})"
            for metric in METRICS
        ]
        middle = interval(records, lambda some: harmonic(some, "greedy"))
        table.add_row(
            name,
            *cells,
            f"{shown(harmonic(records, 'greedy'))}, {spread(middle)}",
            "" if records is best else spread(lead(best, records, "greedy")),
            f"{last['perplexity_after'] / last['perplexity_before'] - 1:+.2%}",
            f"{last['divergence']:.4f}",
            f"{result['seconds_per_edit']:.2f}",
        )
    # Wide enough for all columns, even when written to a file.
    Console(width=max(Console().width, 160)).print(table)


def shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"


def spread(found: tuple[float, float] | None) -> str:
    return "absent" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"


if __name__ == "__main__":
    run_script(main)
