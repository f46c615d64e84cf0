"""The preparation of edits: plans, key statistics, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coachhook.cli.views.console import (
    Document,
    console,
    layer_span,
    new_table,
    percent,
    say,
    tell,
)
from coachhook.system.progress import console as progress_console

if TYPE_CHECKING:
    from coachhook.statistics.measure import KeyStatistics


def plan_view(plan: Document) -> None:
    """What a run will need; on standard error, since it is no part of the result."""
    table = new_table(None, "part", "on", "GB", "seconds at most", numeric=2)
    for part in plan["parts"]:
        seconds = f"{part['seconds']:.0f}" if part["seconds"] else ""
        table.add_row(part["name"], part["device"], f"{part['n_bytes'] / 1e9:.3f}", seconds)
    progress_console.print(table)
    for device, free in plan["free_bytes"].items():
        needed = plan["needed_bytes"][device] / 1e9
        weights = plan["weights_bytes"].get(device, 0) / 1e9
        beside = f" beside {weights:.2f} GB of weights" if weights else ""
        tell(f"needs {needed:.2f} GB of {free / 1e9:.1f} GB free on {device}{beside}")


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


def statistics_view(document: Document) -> None:
    """Key statistics layer by layer."""
    columns = ("layer", "d_in", "tokens", "trace of moment", "key norm", "first-position norm")
    table = new_table(None, *columns)
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


def calibration_view(document: Document) -> None:
    """The figures of the keys, the trials, and in green the chosen settings."""
    columns = ("layer", "recall", "firing", "floor", "ceiling", "sinks", "leverage")
    keys = new_table("keys of the probes, before any edit", *columns, numeric=7)
    for layer in document["layers"]:
        found = layer["separation"]
        keys.add_row(
            str(layer["layer"]),
            percent(found["recall"]),
            percent(found["firing"]),
            f"{found['floor']:.2f}",
            f"{found['ceiling']:.2f}",
            percent(layer["sinks"]),
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
    tried = new_table(f"{len(document['trials'])} trials", *headings, numeric=8)
    for trial in document["trials"]:
        settings, scores = trial["settings"], trial["scores"]
        chosen = settings == document["settings"]
        tried.add_row(
            layer_span(settings["layers"]),
            f"{settings['preservation']:g}",
            f"{settings['clamp']:g}",
            f"{settings['resemblance']:.2f}",
            *(percent(scores[name]) for name in ("reliability", "generality", "locality")),
            " ".join(map(percent, scores["teacher_forced"])),
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
