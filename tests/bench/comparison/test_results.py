"""RESULTS.md is what the kept figures say."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.comparison import results
from coachhook.errors import RecordError
from tests.support.bench import FACTS

NOTHING: dict[str, Any] = {"counterfact": None, "qaedit": None, "run": None, "only": None}


@pytest.fixture
def short(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> results.Asked:
    """The only comparison: a short one, of two editors, kept below `tmp_path`."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    short = results.Asked("short", "A short one", "qaedit", 0, 4, 2, 1)
    makers = {name: results.MAKERS[name] for name in ("keyed", "memit")}
    for name, value in (
        ("RUNS", (short,)),
        ("MAKERS", makers),
        ("KEPT", tmp_path / "kept"),
        ("PAGE", tmp_path / "page.md"),
        ("MODEL", str(tiny_folder)),
    ):
        monkeypatch.setattr(results, name, value)
    return short


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """What the command is given to measure."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS))
    return {"counterfact": facts, "qaedit": facts, "run": tmp_path / "run", "only": None}


def test_mistakes_are_told_before_any_work(
    short: results.Asked, asked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(typer.BadParameter, match=r"nothing in .*kept to write"):
        results.main(**NOTHING, write_only=True)
    with pytest.raises(RecordError, match="none"):
        results.main(**asked | {"qaedit": tmp_path / "none"}, write_only=False)
    with pytest.raises(typer.BadParameter, match="no run 'shrot'; there are short"):
        results.main(**asked | {"only": ["shrot"]}, write_only=False)
    with pytest.raises(typer.BadParameter, match="give it alone"):
        results.main(**asked, write_only=True)
    with pytest.raises(typer.BadParameter, match="give COUNTERFACT"):
        results.main(**NOTHING, write_only=False)
    assert {path.name for path in tmp_path.iterdir()} == {"facts.jsonl"}


@pytest.mark.slow  # Whole comparisons.
def test_one_command_measures_and_writes(
    short: results.Asked, asked: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run" / "short"
    # What another run has left in the folder is not this one's.
    run.mkdir(parents=True)
    (run / "other@1.json").write_text('{"editor": "other@1"}')
    results.main(**asked, write_only=False)
    assert "other@1" not in run.with_suffix(".html").read_text(encoding="utf-8")
    (run / "other@1.json").unlink()
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "kept" / "short.json").read_text())
    assert len(figures["editors"]) == 2
    for name, found in figures["editors"].items():
        assert f"| {name} | {found['reliability']['greedy']:.3f} / " in text
        assert f"| {name} | {found['means']['greedy']['mean']:.3f} (" in text
        assert f" | {found['perplexity_change']:+.2%} | {found['divergence']:.4f} | " in text
    (behind,) = [e for e in figures["editors"].values() if e["means"]["exact"]["behind"]]
    assert f" | {behind['means']['greedy']['behind'][0]:.3f} to " in text
    assert "3 facts of 4 records from number 0 on" in text
    check_that_failures_are_told(short, figures["protocol"], run)

    (tmp_path / "page.md").unlink()
    results.main(**NOTHING, write_only=True)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text
    (tmp_path / "kept" / "short.json").write_text("{")
    with pytest.raises(typer.BadParameter, match=r"short\.json is damaged"):
        results.main(**NOTHING, write_only=True)


def check_that_failures_are_told(short: results.Asked, protocol: Any, run: Path) -> None:
    """An editor that failed half-way is told, not compared, however well it did until then."""
    document = {file.stem: json.loads(file.read_text()) for file in run.glob("*@*.json")}
    failing = next(iter(document))
    document[failing]["failure"] = "batch 2: no"
    document[failing]["points"] = document[failing]["points"][:1]
    some = results.section({"asked": vars(short)} | results.figures(protocol, document))
    assert f"`{failing}` failed: batch 2: no" in some
    assert f"| {failing} |" not in some
    assert "3 facts of 4 records" in some
    for name in document:
        document[name] |= {"failure": "batch 1: no", "points": []}
    none = results.section({"asked": vars(short)} | results.figures(protocol, document))
    assert none.count("failed: batch 1: no") == 2


def test_the_page_says_what_the_figures_say() -> None:
    kept = results.kept()
    assert list(kept) == [asked.name for asked in results.RUNS]
    assert results.PAGE.read_text(encoding="utf-8") == results.page(kept)
    # A figure that changes changes the page.
    name = next(iter(kept["counterfact"]["editors"]))
    kept["counterfact"]["editors"][name]["means"]["exact"]["mean"] = 0.123456
    assert "| 0.123 (" in results.page(kept)
