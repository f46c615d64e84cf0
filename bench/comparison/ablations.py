"""The worth of each setting: one is changed at a time, and all others keep their defaults.

    python -m bench.comparison.ablations [FACTS] [--first 0] [--edits 50] [--only GROUP]...
        [--text FILE] [--run DIR] [--json]

FACTS is any file that `coachhook edit` reads; without it, the 30 facts of the demo. Edits go in
batches of 10 where the batch is not what changes, and are evaluated at the end by the code of
`coachhook eval`. --text gives the statistics a corpus to compare with the model's own samples. With
--run every variant's result is kept in DIR, and the same command goes on.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import coachhook as ch
from bench.harness.facts import chosen_facts, in_batches
from bench.harness.run_folder import checksum, kept, run_folder
from bench.harness.script import FAILURES, Count, Facts, First, Json, Run, run_script
from coachhook.editing.values import optimise_values
from coachhook.errors import NotEnoughMemoryError
from coachhook.evaluation.bootstrap import METRICS, harmonic, interval, mean_of
from coachhook.evaluation.evaluate import evaluate
from coachhook.facts.remaining import latest
from coachhook.facts.request import EditRequest
from coachhook.models.architecture import Architecture, default_layers
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model
from coachhook.system.progress import track

VERSION = 2
_PREFIXES = (
    "As I was told yesterday, {}",
    "In other news, {} what? The answer is",
    "It is well known: {}",
    "Question: {} which one? Answer:",
)


@dataclass(frozen=True)
class Variant:
    """One run. group: the setting that changes; name: its value."""

    group: str
    name: str
    config: ch.EditConfig
    batch_size: int = 10
    dtype: torch.dtype = torch.float32


def variants(n_blocks: int, text: Path | None) -> list[Variant]:
    """All variants, the default first."""
    default = ch.EditConfig(readout="delta")
    layers = default_layers(n_blocks)
    last = layers[-1]
    found = [Variant("default", "", default)]

    def add(group: str, name: str, **settings: Any) -> None:
        found.append(Variant(group, name, replace(default, **settings)))

    for cosine in (0.5, 0.55, 0.7):
        add("gate", f"keyed, floor {cosine}", resemblance=cosine)
    for alpha in (3.0, 5.0, 8.0):
        add("gate", f"calibrated, α {alpha:g}", gate="calibrated", calibrated_alpha=alpha)
    for alpha in (1.5, 2.2):
        add("gate", f"sequence, α {alpha:g}", gate="sequence", sequence_alpha=alpha)
    for rate in (1e-4, 5e-3):
        add("false alarms", f"{rate:g}", false_alarms=rate)
    for first, end in (
        (last, last),
        (last - 1, last),
        (last - 4, last),
        (3, 5),
        (last + 3, last + 5),
    ):
        if first >= 0 and end < n_blocks:
            add("layers", f"{first} to {end}", layers=tuple(range(first, end + 1)))
    for preservation in (1.5, 150.0, 1500.0):
        add("λ", f"{preservation:g}", preservation=preservation)
    for size in (1, 50):
        found.append(Variant("batch", f"{size}", default, batch_size=size))
    for n in (1, 4):
        values = replace(default.values, contexts=_PREFIXES[:n])
        add("prefixes", f"{n}", values=values)
    add("stop", "full stop", values=replace(default.values, stop="."))
    for n_tokens in (4096, 65536):
        source = ch.StatisticsSource(n_tokens=n_tokens)
        add("statistics", f"{n_tokens} sampled tokens", statistics=source)
    if text is not None:
        source = ch.StatisticsSource(path=str(text))
        add("statistics", f"corpus {text.name}", statistics=source)
    for size in (16, 256):
        add("fingerprints", f"{size} numbers", fingerprint_size=size)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found.append(Variant("dtype", name, default, dtype=dtype))
    return found


class Values:
    """Target values on the unedited model, computed once for all variants that share them."""

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self._requests = requests
        self._known: dict[Any, Any] = {}

    def of(self, lm: LanguageModel, variant: Variant) -> dict[EditRequest, Any]:
        layers = variant.config.layers or default_layers(lm.model.config.num_hidden_layers)
        key = (layers[-1], variant.config.values, variant.dtype)
        if key not in self._known:
            with track("target values", len(self._requests)) as advance:
                optimised = optimise_values(
                    lm,
                    Architecture.of(lm.model),
                    layers[-1],
                    self._requests,
                    variant.config.values,
                    advance,
                )
            self._known[key] = dict(zip(self._requests, optimised.hidden, strict=True))
        wanted: dict[EditRequest, Any] = self._known[key]
        return wanted


def measure(
    variant: Variant, model_name: str, requests: Sequence[EditRequest], values: Values
) -> dict[str, Any]:
    """The result of one variant. One that fails has its reason instead, and the others go on.

    Raises `NotEnoughMemoryError`, which depends on the machine, not on the variant.
    """
    found: dict[str, Any] = {"group": variant.group, "name": variant.name}
    try:
        return found | edited(variant, model_name, requests, values)
    except NotEnoughMemoryError:
        raise
    except FAILURES as error:
        return found | {"failure": str(error)}


def edited(
    variant: Variant, model_name: str, requests: Sequence[EditRequest], values: Values
) -> dict[str, Any]:
    lm = load_model(model_name, dtype=variant.dtype)
    wanted = values.of(lm, variant)
    batches = [latest(batch) for batch in in_batches(requests, variant.batch_size)]
    with ch.Editor.from_pretrained(*lm, config=variant.config) as editor:
        began = time.perf_counter()
        verdicts = dict.fromkeys(map(str, ch.Verdict), 0)
        with track(f"{variant.group} {variant.name}", len(batches)) as advance:
            for batch in batches:
                report = editor.edit(batch, torch.stack([wanted[r] for r in batch]))
                for verdict in ch.Verdict:
                    verdicts[str(verdict)] += report.count(verdict)
                advance(1)
        seconds = time.perf_counter() - began
        scores = evaluate(lm, editor.hooks, latest(requests))
    return {
        "failure": None,
        "verdicts": verdicts,
        "writing_seconds_per_edit": seconds / len(requests),
        **scores.to_dict(),
    }


def main(
    facts: Facts = None,
    first: First = 0,
    edits: Count = 50,
    only: Annotated[list[str] | None, typer.Option()] = None,
    text: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None,
    model: str = "smollm2",
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Edit the same facts under every variant."""
    path, requests = chosen_facts(facts, first, edits)
    chosen = variants(load_model(model)[0].config.num_hidden_layers, text)
    groups = list(dict.fromkeys(variant.group for variant in chosen))
    if unknown := set(only or ()) - set(groups):
        raise typer.BadParameter(f"{sorted(unknown)} are none of {', '.join(groups)}")
    wanted = {"default", *(only or groups)}
    protocol = {
        "version": VERSION,
        "facts": path.name,
        "sha256": checksum(requests),
        "edits": len(requests),
        "model": model,
        "text": text and hashlib.sha256(text.read_bytes()).hexdigest(),
        "config": ch.EditConfig(readout="delta").to_dict(),
    }
    values = Values(requests)
    rows = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        run_folder(place := run or Path(temporary), protocol),
    ):
        for variant in (v for v in chosen if v.group in wanted):
            file = place / f"{variant.group} {variant.name}".strip().replace("/", "-")
            work = partial(measure, variant, model, requests, values)
            rows.append(kept(file.with_name(f"{file.name}.json"), work))
    document = {"protocol": protocol, "variants": rows}
    if as_json:
        print(json.dumps(document))
    else:
        show(document)


def show(document: dict[str, Any]) -> None:
    protocol = document["protocol"]
    table = Table(title=f"{protocol['edits']} edits of {protocol['facts']}, greedy")
    names = (*METRICS, "harmonic mean, 95 %", "open in ordinary text", "perplexity", "applied")
    for column in ("what changes", "to", *names):
        table.add_column(column, justify="right" if column in names else "left")
    for row in document["variants"]:
        if row["failure"]:
            table.add_row(row["group"], row["name"], f"failed: {row['failure']}")
            continue
        records = row["records"]
        middle, spread = harmonic(records, "greedy"), interval(records, _harmonic)
        between = "" if spread is None else f", {spread[0]:.3f} to {spread[1]:.3f}"
        table.add_row(
            row["group"],
            row["name"],
            *(shown(mean_of(records, metric, "greedy")) for metric in METRICS),
            shown(middle) + between,
            f"{row['gate']['ordinary']:.2%}",
            f"{row['perplexity_after'] / row['perplexity_before'] - 1:+.2%}",
            str(row["verdicts"]["applied"]),
        )
    Console(width=max(Console().width, 150)).print(table)


def _harmonic(records: Sequence[dict[str, Any]]) -> float | None:
    return harmonic(records, "greedy")


def shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run_script(main)
