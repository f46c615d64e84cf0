"""The HTML report: from the JSON of a comparison, of `eval` and of the demo; and bad input."""

import json
import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coachhook.cli.app import app
from coachhook.errors import ConfigError
from coachhook.report import figures
from coachhook.report.page import render, write_report
from coachhook.report.runs import VERSION, Run, load_run

SCORES = {"teacher_forced": 1.0, "greedy": 1.0, "exact": 0.0}
ABSENT = {"teacher_forced": None, "greedy": None, "exact": None}
Z = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0]


def record(number: int, **others: Any) -> dict[str, Any]:
    return {
        "prompt": f"The capital of <b>land {number}</b> & more is",
        "target": "Paris",
        "batch": 1,
        "verdict": "applied",
        "answer_before": "Rome",
        "answer": "Paris",
        "before": 0.0,
        "reliability": SCORES,
        "generality": ABSENT,
        "locality": ABSENT,
    } | others


def gate(alpha: float | None = 4.0) -> dict[str, Any]:
    layer = {
        "layer": 9,
        "alpha": alpha,
        "z": {"edited": [v + 9 for v in Z], "paraphrased": None, "beside": None, "ordinary": Z},
    }
    sample = {"kind": "edited", "tokens": ["The", " <i>", " land"], "n_open": [0, 0, 1]}
    return {
        "recall": 1.0,
        "paraphrase_recall": None,
        "precision": None,
        "ordinary": 0.0005,
        "by_layer": {"9": 0.0005},
        "locality": None,
        "layers": [layer],
        "samples": [sample],
    }


def point(edits: int, **others: Any) -> dict[str, Any]:
    return {
        "edits": edits,
        "n_requests": edits,
        "reliability": SCORES,
        "generality": ABSENT,
        "locality": ABSENT,
        "harmonic_mean": None,
        "preferences": {"efficacy": 1.0, "paraphrase": 0.25, "neighbourhood": None},
        "before_preferences": {"efficacy": 0.125, "paraphrase": 0.0, "neighbourhood": None},
        "before_reliability": 0.1,
        "already_true": 1,
        "gate": None,
        "perplexity_before": 20.0,
        "perplexity_after": 20.1,
        "divergence": 0.001,
        "retention": {"1": 1.0},
        "records": [record(i) for i in range(edits)],
    } | others


def result(name: str, *points: dict[str, Any], failure: str | None = None) -> dict[str, Any]:
    return {
        "editor": name,
        "failure": failure,
        "seconds_per_edit": 0.5,
        "bytes_held": 1000,
        "overhead": {"first_token_ratio": 0.99, "tokens_per_second_ratio": 0.95},
        "points": list(points),
    }


def protocol(**others: Any) -> dict[str, Any]:
    described = {"version": VERSION, "facts": "facts.jsonl", "edits": 4, "batch_size": 2}
    return described | {"every": 1, "model": "smollm2"} | others


class Page(HTMLParser):
    """The texts of a page by tag, and whether every element is closed."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v or "" for name, v in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for name, v in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of a hooked editor, one that failed half-way, and one that failed at once."""
    records = [record(0, before=1.0), *(record(i) for i in range(1, 4))]
    last = point(4, gate=gate(), records=records)
    hooked = result("keyed@15", point(2, gate=gate(None)), last)
    failed = result("memit@150", point(2), failure="batch 2: not <finite>")
    nothing = result("grace@1", failure="batch 1: no")
    for document in (hooked, failed, nothing):
        (tmp_path / f"{document['editor']}.json").write_text(json.dumps(document))
    (tmp_path / "protocol.json").write_text(json.dumps(protocol()))
    return tmp_path


def test_a_comparison(folder: Path) -> None:
    text = render(load_run(folder))
    page = Page(text)
    shown = " ".join(page.texts)
    # Whatever a model or a file says is text, never markup.
    assert "The capital of <b>land 3</b> & more is" in shown
    assert "not <finite>" in shown
    assert "grace@1" in shown
    assert page.texts.count("true before") == 1
    # Half of the requests answered is no score beside those of all.
    assert text.count("<td>memit@150</td>") == 1
    assert "memit@150" not in text[text.index("To the natural stop") :]
    # Nothing is fetched: every reference is to the page itself.
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert "http" not in text.replace("http://www.w3.org", "")
    # What no record has is absent, never a number.
    row = text[text.index("<tr><td>keyed@15</td>") :]
    assert row[: row.index("</tr>")].count("absent") == 5
    preferred = text[text.index("The likelier of two answers") :]
    assert "<td>0.250</td>" in preferred[: preferred.index("</table>")]
    for picture in ("Reliability, greedy", "Retention: keyed@15", "z-scores: keyed@15"):
        assert f'aria-label="{picture}"' in text
    assert 'aria-label="Generality, greedy"' not in text
    assert "#0300" not in text
    assert "#0101" not in text


def test_one_document_says_the_same_as_the_folder(folder: Path, tmp_path: Path) -> None:
    editors = [json.loads(file.read_text()) for file in sorted(folder.glob("*@*.json"))]
    document = {"protocol": protocol(), "editors": {e["editor"]: e for e in editors}}
    file = tmp_path / "document"
    file.write_text(json.dumps(document))
    assert render(load_run(file)) == render(load_run(folder))


@pytest.mark.parametrize("kind", ["eval", "demo"])
def test_a_single_evaluation(tmp_path: Path, kind: str) -> None:
    evaluation = point(3, gate=gate())
    del evaluation["edits"]
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"evaluation": evaluation} if kind == "demo" else evaluation))
    target = tmp_path / "page.html"
    write_report(load_run(file), target)
    page = Page(target.read_text(encoding="utf-8"))
    assert "The demo" in page.texts if kind == "demo" else "Edits in force" in page.texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "page.html"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no protocol.json"),
        ({"protocol.json": "{"}, "cannot read"),
        ({"protocol.json": "[]"}, "Input should be an object, found"),
        ({"protocol.json": json.dumps(protocol(version=1))}, "version 1, and this is version"),
        ({"protocol.json": "{}"}, "has no 'version'"),
        ({"protocol.json": '{"version": 2, "edits": 3}'}, "compares no editors"),
        ({"protocol.json": json.dumps(protocol())}, "no finished editor"),
        ({"protocol.json": json.dumps(protocol()), "a@1.json": "{}"}, "has no 'editor'"),
    ],
)
def test_no_run(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_run(tmp_path)


def test_a_file_that_is_no_run(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"folder": "edits"}')
    with pytest.raises(ConfigError, match="holds no run"):
        load_run(file)


@pytest.mark.parametrize("part", ["gate", "records"])
def test_an_evaluation_of_an_earlier_version(tmp_path: Path, part: str) -> None:
    evaluation = point(2, gate=gate())
    if part == "gate":
        del evaluation["gate"]["layers"]
    else:
        del evaluation["records"][1]["answer_before"]
    file = tmp_path / "found.json"
    file.write_text(json.dumps(evaluation))
    with pytest.raises(ConfigError, match=r"another version: .+ is missing"):
        render(load_run(file))


def test_the_command_names_the_page(folder: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0
    assert done.output.strip() == str(folder / "report.html")
    assert "z-scores: keyed@15" in (folder / "report.html").read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["report", str(folder / "report.html")])
    assert refused.exit_code == 2
    assert "is what the page is made of" in refused.output
    # Nothing that was measured is written over.
    before = (folder / "keyed@15.json").read_bytes()
    around = folder / ".." / folder.name / "keyed@15.json"
    for run, output in ((folder / "keyed@15.json",) * 2, (folder, around)):
        refused = CliRunner().invoke(app, ["report", str(run), "--output", str(output)])
        assert refused.exit_code == 2
        assert "name another file" in refused.output
    assert (folder / "keyed@15.json").read_bytes() == before
    nowhere = folder / "keyed@15.json" / "page.html"
    refused = CliRunner().invoke(app, ["report", str(folder), "--output", str(nowhere)])
    assert refused.exit_code == 2
    assert "cannot write" in refused.output


def test_texts_that_no_page_can_hold(tmp_path: Path) -> None:
    odd = record(0, answer="\ud800 and \x00\x1b[0m", prompt="a\tb")
    (tmp_path / "found.json").write_text(json.dumps(point(1, records=[odd])))
    write_report(load_run(tmp_path / "found.json"), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\ufffd and \ufffd\ufffd[0m" in text
    assert "a\tb" in text


def test_without_the_libraries_of_the_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'coachhook\[report\]'"):
        render(load_run(folder))


@pytest.mark.parametrize(
    "document",
    [
        {"records": [1, 2]},
        {"protocol": protocol(), "editors": ["a"]},
        {"protocol": protocol(), "editors": {"a": 3}},
        {"protocol": protocol(edits="many"), "editors": {"a@1": result("a@1", point(2))}},
        {"protocol": protocol(), "editors": {"a@1": result("a@1", point(2, records=[3]))}},
        {"protocol": protocol(), "editors": {"a@1": result("a@1", point(2, reliability=0.5))}},
        {"protocol": protocol(), "editors": {"a@1": result("a@1", point(2, perplexity_before=0))}},
        {"protocol": protocol(), "editors": {"a@1": result("a@1")}},
    ],
)
def test_documents_that_are_no_runs(tmp_path: Path, document: Any) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="no run"):
        render(load_run(file))


OTHERS: list[Any] = [None, [], {}, "x", 3, -1, 0.5, float("nan"), True, [3], {"1": 3}]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of everything in a document."""
    yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*place, key))


def test_whatever_stands_in_its_place_a_run_is_shown_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Drawing takes long; writing the drawing down is what takes longest.
    monkeypatch.setattr(figures, "_svg", lambda *_: "")
    closest = {"kind": "alias", "text": "a", "cosine": 0.9, "opens": True}
    entry = {"edit": 0, "prompt": "a", "subject": "a", "enabled": True}
    kind = {"kind": "alias", "n": 1, "cosines": Z, "opens": 1.0}
    memory = {"block": 5, "threshold": 0.9, "own": [kind], "beside": [kind]}
    memory |= {"entries": [entry | {"forms": [closest], "nearest": closest}]}
    last = point(2, gate=gate(), memory=memory)
    run = {"a@1": result("a@1", point(1, gate=gate()), last)}
    everything = [(place, other) for place in places(run) if place for other in OTHERS]
    # All of them have passed; they take a minute and a half.
    for (*parents, last), other in random.Random(0).sample(everything, 150):
        changed: Any = deepcopy(run)
        holder = changed
        for key in parents:
            holder = holder[key]
        holder[last] = other
        with suppress(ConfigError):
            render(Run("title", {}, changed))


def test_a_bug_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("'list' object has no attribute 'items'")

    monkeypatch.setattr(figures, "heat_map", broken)
    with pytest.raises(AttributeError):
        render(Run("title", {}, {"a@1": result("a@1", point(2))}))


def test_a_name_with_dollar_signs(tmp_path: Path) -> None:
    run = {"$_{a$": result("$_{a$", point(1), point(2))}
    assert "$_{a$" in render(Run("title", {}, run))


def test_no_editor_that_got_anywhere(tmp_path: Path) -> None:
    (tmp_path / "protocol.json").write_text(json.dumps(protocol()))
    (tmp_path / "grace@1.json").write_text(json.dumps(result("grace@1", failure="no")))
    with pytest.raises(ConfigError, match="first evaluation"):
        render(load_run(tmp_path))
