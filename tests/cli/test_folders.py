from pathlib import Path

from coachhook.hookset import HookSet
from tests.support.command_line import error_of, run, run_json


def test_inspect(edited: Path) -> None:
    document = run_json("inspect", str(edited))
    assert Path(document["base_model"]["name"]).name == "tiny"
    assert document["gate"] == "keyed"
    assert document["layers"] == [1, 2]
    assert document["bytes"] > 1000
    first = document["batches"][0]["edits"][0]
    assert (first["id"], first["target"], first["superseded_by"]) == (0, "Lyon", 3)
    shown = run("inspect", str(edited))
    assert "layers 1-2" in shown
    assert "superseded by edit 3" in " ".join(shown.split())


def test_rollback(edited: Path) -> None:
    document = run_json("rollback", str(edited), "--to", "1")
    assert (document["batches_before"], document["batches"], document["edits"]) == (2, 1, 2)
    assert len(HookSet.from_pretrained(edited).edits) == 2
    assert "give a number from 0 to 1" in error_of("rollback", str(edited), "--to", "2")
    assert "there is no batch -1" in error_of("rollback", str(edited), "--to", "-1")
    assert "edits left: 0" in run("rollback", str(edited), "--to", "0")
    run("inspect", str(edited))


def test_compact(edited: Path) -> None:
    arguments = ("generate", "tiny", "The capital of France is", "--hooks", str(edited), "--trace")
    before = run_json(*arguments)
    document = run_json("compact", str(edited), "--keep", "1")
    assert (document["batches"], document["merged_batches"], document["edits"]) == (2, 1, 4)
    assert run_json("inspect", str(edited))["merged_batches"] == 1
    assert run_json(*arguments) == before
    assert "the earliest to go back to is 1" in error_of("rollback", str(edited), "--to", "0")
    assert "2 of 2 batches are merged" in " ".join(run("compact", str(edited)).split())
    shown = " ".join(run("inspect", str(edited)).split())
    assert "batches 1 to 2 are merged into one" in shown
    assert "superseded by edit 3" in shown
    assert run_json(*arguments) == before
    assert run_json("edit", "tiny", "facts.jsonl", "--hooks", str(edited))["batches"] == []
