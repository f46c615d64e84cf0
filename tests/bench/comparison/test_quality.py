"""The protocol on a tiny model."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock
from safetensors.torch import load, save

from bench.comparison import editors, quality
from bench.comparison.editors.direct import Direct
from coachhook.errors import ConfigError, NotEnoughMemoryError, StatisticsError
from coachhook.evaluation.ordinary_text import perplexity
from coachhook.models.loading import load_model
from tests.support.bench import FACTS, arguments
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer


@pytest.mark.slow  # A dozen editors.
def test_every_editor_under_one_protocol(
    page: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    # Each look at it, one before and one behind every batch, sees one more.
    looks = itertools.count(1)
    monkeypatch.setattr(quality, "peak_memory", lambda _: next(looks))
    quality.main(**arguments(tiny_folder, tmp_path))
    document = json.loads(capsys.readouterr().out)
    assert list(document["editors"]) == [editors.named(name) for name in editors.MAKERS]
    unedited = perplexity(load_model(str(tiny_folder)), page)
    for number, (name, result) in enumerate(document["editors"].items(), 1):
        first, last = result["points"]
        assert (first["edits"], last["edits"]) == (2, 4), name
        # The corrected fact counts once, and one fact has no paraphrase.
        assert [len(point["records"]) for point in (first, last)] == [2, 3], name
        assert last["records"][2]["generality"]["greedy"] is None
        # A random model finds no target likely, which the memory readout refuses.
        refused = name.startswith("memory")
        assert {r["batch"] for r in last["records"]} == ({None} if refused else {1, 2}), name
        # Each of them does something.
        assert result["failure"] is None
        moved = any(record["answer"] != record["answer_before"] for record in last["records"])
        assert refused != (moved or last["divergence"] > 1e-6), name
        # Off is off, for each editor in its own way.
        assert last["perplexity_before"] == pytest.approx(unedited, rel=1e-6), name
        hooked = ("memory", "paper", "keyed", "calibrated", "sequence", "onegradient")
        assert (last["gate"] is not None) == name.startswith(hooked)
        for ratio in ("first_token_ratio", "tokens_per_second_ratio"):
            assert 0 < result["overhead"][ratio] < 100
        seconds = result["batch_seconds"]
        assert all(took > 0 for took in seconds)
        assert result["peak_bytes"] == 4 * number, name
        assert result["seconds_per_edit"] == pytest.approx(sum(seconds) / len(FACTS))
    memit, grace = editors.named("memit"), editors.named("grace")
    reached = document["editors"][memit]["points"][0]
    assert reached["reliability"]["teacher_forced"] > reached["before_reliability"]

    # What is there is not measured again; what is missing is.
    (tmp_path / "run" / f"{grace}.json").unlink()
    measured: list[str] = []
    again = quality.measure

    def noted(*given: Any) -> Any:
        measured.append(given[-1])
        return again(*given)

    monkeypatch.setattr(quality, "measure", noted)
    quality.main(**arguments(tiny_folder, tmp_path, as_json=False, editor=["grace", memit]))
    assert measured == [grace]
    assert "memit" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="another version"):
        quality.main(**arguments(tiny_folder, tmp_path, batch_size=3))


def test_unknown_editors_are_told_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    for name, reason in (
        ("memo@3", "no editor 'memo'; there are memory, "),
        ("memit@many", "'many' behind memit@ is no positive number"),
        ("memit@nan", "'nan' behind memit@"),
    ):
        with pytest.raises(typer.BadParameter, match=reason):
            quality.main(**arguments(tiny_folder, tmp_path, editor=[name]))
    assert not (tmp_path / "run").exists()
    assert editors.named("memit@1500") == "memit@1500"


def test_one_batch_of_facts_that_contradict_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every editor gets the last request of a fact; down-projections are Conv1D here."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = ["keyed", "accumulated", "grace", "constrained@0.05"]
    asked = arguments(folder, tmp_path, batch_size=4, editor=names)
    quality.main(**asked)
    for name, result in json.loads(capsys.readouterr().out)["editors"].items():
        (point,) = result["points"]
        records = point["records"]
        assert [record["target"] for record in records] == [TARGETS[3], TARGETS[1], TARGETS[2]]
        assert {record["batch"] for record in records} == {1}, name
        assert point["reliability"]["teacher_forced"] > point["before_reliability"], name


@pytest.mark.slow  # Three whole comparisons.
def test_an_editor_that_fails_is_told_and_the_others_go_on(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    edit, calls = Direct.edit, []

    def fail(self: Any, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise StatisticsError("the keys are not finite")
        edit(self, *given)

    monkeypatch.setattr(Direct, "edit", fail)
    names = ["memit", "constrained"]
    quality.main(**arguments(tiny_folder, tmp_path, editor=names))
    failed, sound = json.loads(capsys.readouterr().out)["editors"].values()
    assert failed["failure"] == "batch 2: the keys are not finite"
    assert [point["edits"] for point in failed["points"]] == [2]
    assert [point["edits"] for point in sound["points"]] == [2, 4]
    quality.main(**arguments(tiny_folder, tmp_path, editor=names, as_json=False))
    assert "failed: batch 2" in capsys.readouterr().out

    # What memory is free now says nothing of an editor: that is tried again.
    def no_room(self: Any, *given: Any) -> None:
        raise NotEnoughMemoryError("no room now")

    monkeypatch.setattr(Direct, "edit", no_room)
    asked = arguments(tiny_folder, tmp_path, editor=["memit@7"])
    with pytest.raises(NotEnoughMemoryError):
        quality.main(**asked)
    assert not (tmp_path / "run" / "memit@7.json").exists()
    monkeypatch.setattr(Direct, "edit", edit)
    quality.main(**asked)
    # What is damaged is named, not shown.
    for name in ("memit@7.json", "values.safetensors", "protocol.json"):
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(typer.BadParameter, match=f"{name} is damaged"):
            quality.main(**asked)
        (tmp_path / "run" / name).write_bytes(whole)
    # So are values of fewer facts than the run has.
    values = tmp_path / "run" / "values.safetensors"
    whole = values.read_bytes()
    tensors = load(whole)
    values.write_bytes(save(tensors | {"hidden": tensors["hidden"][:-1].clone()}))
    with pytest.raises(typer.BadParameter, match=r"values\.safetensors is damaged"):
        quality.main(**asked)
    values.write_bytes(whole)
    with pytest.raises(ConfigError, match="alphaedit@1e-09 leaves no direction"):
        quality.main(**asked | {"editor": ["alphaedit@1e-9"]})


def test_one_process_at_a_time(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(typer.BadParameter, match="another process works in"),
    ):
        quality.main(**arguments(tiny_folder, tmp_path, editor=["memit"]))
