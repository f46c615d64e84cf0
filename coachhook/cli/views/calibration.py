"""What a calibration found, by readout."""

from __future__ import annotations

from coachhook.cli.views.console import Document, console, layer_span, new_table, percent, say


def delta_view(document: Document) -> None:
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
    say(f"fingerprints of {document['settings']['fingerprint_size']} numbers; {_ended(document)}")
    say(f"saved in {document['profile']}")


def memory_view(document: Document) -> None:
    """The same of the memory readout: the gate at every block, and the trials of write blocks."""
    settings = document["settings"]
    columns = (
        *("gate", "recall", "forms", "neighbours", "alike", "ordinary"),
        *("paraphrases need", "neighbours reach", "threshold"),
    )
    gates = new_table("gate at the FFN of a block, before any edit", *columns, numeric=9)
    for found in document["layers"]:
        gates.add_row(
            str(found["block"]),
            *(percent(found[name]) for name in ("recall", "forms", "neighbours", "alike")),
            f"{100 * found['ordinary']:.2g} %",
            *(f"{found[name]:.2f}" for name in ("need", "reach", "threshold")),
            style="green" if found["block"] == settings["gate_block"] else "",
        )
    console.print(gates)
    counts = document["figures"]
    say(
        f"of {counts['paraphrases']} paraphrases, {counts['neighbours']} neighbours' prompts and "
        f"{counts['alike']} names that end alike, with {counts['entries']} entries"
    )
    headings = ("rows after", "reliability", "generality", "locality", "forced", "s")
    tried = new_table(f"{len(document['trials'])} trials", *headings, numeric=6)
    for trial in document["trials"]:
        tried.add_row(
            ",".join(map(str, trial["settings"]["write_blocks"])),
            *(percent(trial["scores"][name]) for name in ("reliability", "generality", "locality")),
            " ".join(map(percent, trial["scores"]["teacher_forced"])),
            f"{trial['seconds']:.0f}",
            style="green" if trial["settings"] == settings else "",
        )
    console.print(tried)
    say(f"least threshold {settings['least']:g}; {_ended(document)}")
    say(f"saved in {document['profile']}")


def _ended(document: Document) -> str:
    cut_short = ", when the time was over" if document["cut_short"] else ""
    return f"{document['seconds']:.0f} seconds{cut_short}"


VIEWS = {"delta": delta_view, "memory": memory_view}
