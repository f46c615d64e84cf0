"""The preparation of edits: plans, key statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coachhook.cli.views.console import (
    Document,
    console,
    new_table,
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
