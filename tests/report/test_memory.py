"""The report of a memory: forms and neighbours, edit by edit; the label of each gate's scores."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coachhook.cli.app import app
from coachhook.errors import ConfigError
from coachhook.report import page
from coachhook.report.page import render
from coachhook.report.runs import Run
from tests.report.test_page import Page, gate, point, result

COSINES = [0.5, 0.6, 0.7, 0.8, 0.9, 0.92, 0.94, 0.96, 0.98]


def close(kind: str, cosine: float, opens: bool) -> dict[str, Any]:
    return {"kind": kind, "text": f"a <{kind}>", "cosine": cosine, "opens": opens}


def entry(number: int, closed: int = 0, beside: float | None = 0.4, **others: Any) -> Any:
    forms = [close("its prompt", 1.0, True), close("text start", 0.95, True)]
    forms += [close("after a quote", 0.3125, False)] * closed
    nearest = None if beside is None else close("made-up name", beside, beside > 0.9)
    found = {"edit": number, "prompt": f"Edit {number} & <is>", "subject": "s", "enabled": True}
    return found | {"forms": forms, "nearest": nearest} | others


def memory(*entries: Any, **others: Any) -> dict[str, Any]:
    own = [
        {"kind": kind, "n": 7, "cosines": COSINES, "opens": 0.75}
        for kind in ("its prompt", "paraphrase")
    ]
    beside = [{"kind": "locality prompt", "n": 5, "cosines": COSINES, "opens": 0.125}]
    found = {"block": 5, "threshold": 0.875, "own": own, "beside": beside}
    return found | {"entries": list(entries)} | others


def shown(found: dict[str, Any] | None, **others: Any) -> str:
    of_gate = gate() | {"gate": "memory"}
    last = point(2, gate=of_gate, memory=found, **others)
    return render(Run("title", {}, {"a@1": result("a@1", last)}))


def test_kinds_of_texts_and_edits_are_shown() -> None:
    text = shown(memory(entry(3, closed=1), entry(4, beside=None)))
    told = " ".join(" ".join(Page(text).texts).split())
    assert "at the input of block 5's FFN" in told
    assert "from a cosine of 0.875 on" in told
    assert "paraphrase 7 0.750 0.500 0.600 0.700 0.900" in told
    assert "locality prompt 5 0.125 0.980 0.960 0.940 0.900" in told
    # Whatever a file says is text, never markup.
    assert "Edit 3 & <is>" in told
    assert "2 of 3 open" in told
    assert "after a quote 0.312" in told
    assert "a <made-up name> made-up name 0.400" in told
    assert ", opens it" not in told
    assert "2 of 2 open" in told
    assert told.count("nothing") == 1
    assert 'aria-label="Forms and neighbours: a@1"' in text
    assert ", opens it" in shown(memory(entry(3, beside=0.95)))


def test_the_worst_edits_come_first_and_the_rest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    off = entry(5, closed=9, enabled=False)
    entries = [entry(0), off, entry(1, beside=0.8), entry(2, closed=2), entry(3, closed=1)]
    text = shown(memory(*entries))
    assert sorted(range(4), key=lambda i: text.index(f"Edit {i} ")) == [2, 3, 1, 0]
    assert text.index("Edit 5 ") > text.index("Edit 0 ")
    assert "switched off" in text
    assert "run's JSON has all" not in text
    monkeypatch.setattr(page, "_MOST_ENTRIES", 2)
    text = shown(memory(*entries))
    assert "The first 2 of 5" in text
    assert "Edit 3 " in text
    assert "Edit 1 " not in text


def test_without_paraphrases_or_anything_beside() -> None:
    found = memory(entry(0, beside=None), beside=[])
    found["own"] = found["own"][:1]
    text = shown(found)
    assert "its prompt (7)" in text
    assert "open another edit" not in text


@pytest.mark.parametrize("known", [True, False])
def test_without_a_memory_there_is_no_such_section(known: bool) -> None:
    last = point(2, gate=gate(), memory=None)
    if not known:
        # As runs were before this readout.
        del last["memory"]
    text = render(Run("title", {}, {"a@1": result("a@1", last)}))
    assert "Forms and neighbours" not in text
    assert "z-scores: a@1" in text


@pytest.mark.parametrize(
    ("name", "title", "unit", "place"),
    [
        ("memory", "Cosines: a@1", "largest cosine to a fingerprint", "input of block 9's FFN"),
        ("keyed", "z-scores: a@1", "z-score of the largest cosine, among ordinary", "layer 9"),
        ("calibrated", "z-scores: a@1", "z-score of the difference norm, among", "layer 9"),
        ("sequence", "z-scores: a@1", "z-score of the difference norm, within its", "layer 9"),
        ("distance", "z-scores: a@1", "z-score<", "layer 9"),
        (None, "z-scores: a@1", "z-score<", "layer 9"),
    ],
)
def test_each_gate_says_what_it_scores_and_where(
    name: str | None, title: str, unit: str, place: str
) -> None:
    of_gate = gate() | ({} if name is None else {"gate": name})
    text = render(Run("title", {}, {"a@1": result("a@1", point(2, gate=of_gate))}))
    assert f'aria-label="{title}"' in text
    assert unit in text
    assert f">{place}<" in text
    assert "edited subjects" in text


@pytest.mark.parametrize("place", ["own", "beside", "forms"])
def test_a_memory_that_tells_too_little_is_refused(place: str) -> None:
    found = deepcopy(memory(entry(0)))
    if place == "forms":
        found["entries"][0]["forms"] = []
    else:
        found[place][0]["cosines"] = COSINES[:4]
    with pytest.raises(ConfigError, match="no run"):
        shown(found)


def test_the_command_says_what_paraphrases_have_and_others_reach(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(point(2, gate=gate(), memory=memory(entry(0)))))
    done = CliRunner().invoke(app, ["report", str(file)])
    assert done.stdout.strip() == str(tmp_path / "found.html")
    told = " ".join(done.stderr.split())
    assert "95 % of paraphrases have 0.700, 99 % 0.600, all 0.500" in told
    assert "locality prompt 0.960 (99 %), 0.980 (all)" in told
    file.write_text(json.dumps(point(2, gate=gate(), memory=None)))
    assert CliRunner().invoke(app, ["report", str(file)]).stderr == ""
