"""The effect of edits: metrics, completions before and after, and where gates open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from coachhook.cli.views.console import Document, console, layer_span, new_table, percent, say

# One per set of layers that open together, in order of appearance.
_PALETTE = ("green", "yellow", "magenta", "cyan", "blue", "red")


def evaluation_view(document: Document) -> None:
    """The metrics of an `Evaluation`, in per cent where they are shares."""
    table = new_table(
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
        before = percent(document["before_reliability"]) if metric == "reliability" else ""
        forms = (percent(scores[form]) for form in ("teacher_forced", "greedy", "exact"))
        table.add_row(metric, before, *forms)
    console.print(table)
    gate = document["gate"]
    gates = new_table(None, "tokens whose gate is open", "%", numeric=1)
    for label, key in (
        ("subjects in the edited prompts (recall)", "recall"),
        ("subjects in paraphrases (recall)", "paraphrase_recall"),
        ("of all open tokens, subjects (precision)", "precision"),
        ("ordinary text (false alarms)", "ordinary"),
        ("locality prompts (false alarms)", "locality"),
    ):
        gates.add_row(label, percent(gate[key]))
    console.print(gates)
    for line in memory_lines(document["memory"]):
        say(line)
    before, after = document["perplexity_before"], document["perplexity_after"]
    say(
        f"perplexity of ordinary text {before:.3f} → {after:.3f} ({after / before - 1:+.2%}), "
        f"divergence {document['divergence']:.4f} nats a token"
    )
    likelier, former = document["preferences"], document["before_preferences"]
    if any(value is not None for value in likelier.values()):
        told = (f"{k} {percent(v)} % (before {percent(former[k])})" for k, v in likelier.items())
        say(f"the likelier of two answers: {', '.join(told)}")
    kept = ", ".join(f"{n}: {percent(score)} %" for n, score in document["retention"].items())
    say(f"reliability by batch (retention) {kept or '–'}")


def memory_lines(memory: Document | None) -> list[str]:
    """The least cosines that paraphrases need, and the greatest that other texts reach; none for
    edits without a memory."""
    if memory is None:
        return []
    told = "no paraphrase names its subject"
    for found in memory["own"]:
        if found["kind"] == "paraphrase":
            least, of_99, of_95 = found["cosines"][:3]
            told = f"95 % of paraphrases have {of_95:.3f}, 99 % {of_99:.3f}, all {least:.3f}"
    reached = "; ".join(
        f"{found['kind']} {found['cosines'][-2]:.3f} (99 %), {found['cosines'][-1]:.3f} (all)"
        for found in memory["beside"]
    )
    return [
        f"an edit opens at a cosine of {memory['threshold']:.3f}; {told}",
        f"what else comes close, at most: {reached or 'nothing'}",
    ]


def completion_view(document: Document) -> None:
    """One prompt with its unedited and edited completions, and the gates' trace if there is one."""
    table = new_table(None, "", "completion")
    table.add_row("unedited", Text(document["unedited"]))
    table.add_row("edited", Text(document["edited"]))
    say(document["prompt"])
    console.print(table)
    if "trace" in document:
        trace_view(document["trace"], document["edits"])


def trace_view(trace: Document, edits: Mapping[int, str]) -> None:
    """The text with each token in the colour of the layers whose gates it opens, and a table of
    these tokens. trace: see `Trace`; edits: the fact of each edit that the trace names, by id."""
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
        console.print(Text(f"open at {layer_span(layers_open)}", style))
    if not fired:
        say("no gate opens")
        return
    measure = trace["compared"]
    table = new_table(None, "token", "layer", measure, "threshold", "edit", numeric=4)
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


def side_by_side_view(rows: Sequence[Document]) -> None:
    """Completions of many prompts before and after; green where the target is met."""
    table = new_table(None, "prompt", "before", "after")
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


def _one_line(text: str) -> str:
    return " ".join(text.split())
