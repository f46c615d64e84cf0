import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coachhook.editor import Editor
from coachhook.hookset import HookSet
from coachhook.storage import folder
from tests.support.command_line import (
    FACTS,
    SMALL,
    environment,
    error_of,
    invoke,
    run,
    run_json,
    write_facts,
)


def test_edit_then_edit_again(edited: Path, place: Path) -> None:
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(edited))
    before = (edited / folder.CONFIG_NAME).read_bytes()
    assert "all 4 facts are already in place" in run(*arguments)
    again = run_json(*arguments)
    assert (again["facts"], again["already_in_place"], again["batches"]) == (4, 4, [])
    assert (edited / folder.CONFIG_NAME).read_bytes() == before


def test_edit_tells_each_verdict(place: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "hooks")
    document = run_json("edit", "tiny", "facts.jsonl", "--hooks", target, *SMALL)
    assert [batch["batch"] for batch in document["batches"]] == [1, 2]
    edits = [edit for batch in document["batches"] for edit in batch["edits"]]
    assert [(e["prompt"], e["subject"], e["target"]) for e in edits] == FACTS
    assert {e["verdict"] for e in edits} <= {"applied", "weak", "refused"}
    shown = run("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "other"), *SMALL)
    assert "batch 2: 2 edits" in shown
    assert "The capital of France is → dry" in shown


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "hooks"
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(target), *SMALL)
    whole = Editor.edit

    def interrupted(self: Editor, requests: Any) -> Any:
        if self.hooks.edits:
            raise KeyboardInterrupt
        return whole(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", interrupted)
        result = invoke(*arguments)
    assert result.exit_code == 130
    assert result.stderr.endswith("that was being edited is at its last whole batch\n")
    assert len(HookSet.from_pretrained(target).edits) == 2
    document = run_json(*arguments)
    assert [batch["batch"] for batch in document["batches"]] == [2]
    found = [edit.request for edit in HookSet.from_pretrained(target).edits]
    assert [(r.prompt, r.subject, r.target) for r in found] == FACTS


@pytest.mark.slow  # A process of its own, and the run after it.
def test_killed_run_goes_on_from_its_last_whole_batch(tmp_path: Path) -> None:
    target = tmp_path / "hooks"
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(target), "--batch-size", "1")
    command = [sys.executable, "-m", "coachhook", *arguments, "--json"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    while not folder.exists(target) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = [edit.request.target for edit in HookSet.from_pretrained(target).edits]
    document = run_json(*arguments)
    gained = [edit["target"] for batch in document["batches"] for edit in batch["edits"]]
    assert kept + gained == ["Lyon", "French", "large", "dry"]


def test_a_fact_corrected_in_the_file_is_edited_again(edited: Path, tmp_path: Path) -> None:
    facts = tmp_path / "corrected.jsonl"
    write_facts(facts, [FACTS[0], ("The language of the city is", "city", "dry"), *FACTS[2:]])
    document = run_json("edit", "tiny", str(facts), "--hooks", str(edited))
    (batch,) = document["batches"]
    assert (batch["batch"], [edit["target"] for edit in batch["edits"]]) == (3, ["dry"])
    replaced = {
        edit["id"]: edit["superseded_by"]
        for batch in run_json("inspect", str(edited))["batches"]
        for edit in batch["edits"]
    }
    assert replaced == {0: 3, 1: 4, 2: None, 3: None, 4: None}


def test_skipped_records_are_told(tmp_path: Path, edited: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, FACTS)
    facts.write_text(facts.read_text() + '\n{"prompt": "no more"}\n')
    arguments = ("edit", "tiny", str(facts), "--hooks", str(edited))
    assert f"{facts}:5: " in error_of(*arguments)
    result = invoke(*arguments, "--skip-invalid")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"skipped: {facts}:5: ")
    facts.write_text('{"prompt": "no more"}\n')
    result = invoke(*arguments, "--skip-invalid")
    assert result.exit_code == 2
    assert f"error: {facts} has no valid record" in result.stderr


def test_contradiction_is_found_before_anything_is_done(tmp_path: Path) -> None:
    line = error_of("edit", "nosuchmodel", "facts.jsonl", "--hooks", str(tmp_path / "hooks"))
    assert "'Lyon'" in line
    assert "'dry'" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gate", "sequence"), ("--gate sequence", "keyed")),
        (("--layers", "0,2"), ("--layers 0,2", "1,2")),
        (("--layers", "x"), ("cannot read layers 'x'",)),
        (("--gate", "open"), ("'open'", "keyed, calibrated, sequence")),
        (("--template", "model.{}.w"), ("--template model.{}.w", "model.layers.{}.mlp.down_proj")),
        (("--text", "facts.jsonl"), ("--text", "None")),
    ],
)
def test_settings_that_differ_from_the_folder(
    edited: Path, options: tuple[str, ...], said: tuple[str, ...]
) -> None:
    line = error_of("edit", "tiny", "facts.jsonl", "--hooks", str(edited), *options)
    assert all(part in line for part in said)


def test_settings_that_agree_with_the_folder(edited: Path) -> None:
    options = ("--gate", "keyed", "--layers", "1,2", "--template", "model.layers.{}.mlp.down_proj")
    run("edit", "tiny", "facts.jsonl", "--hooks", str(edited), *options)


def test_a_folder_that_another_process_edits(edited: Path) -> None:
    holder = (
        "import sys, pathlib\n"
        "from coachhook.storage import folder\n"
        "with folder.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(edited)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        line = error_of("edit", "tiny", "facts.jsonl", "--hooks", str(edited))
        assert "being edited by another process" in line
        assert "being edited" in error_of("rollback", str(edited), "--to", "1")
        run("inspect", str(edited))
        process.communicate()


def test_another_model_is_refused(edited: Path, tmp_path: Path) -> None:
    facts = tmp_path / "new.jsonl"
    write_facts(facts, [("The weather of Paris is", "Paris", "dry")])
    line = error_of("edit", "other", str(facts), "--hooks", str(edited))
    assert "were made for" in line
    assert "/tiny'" in line


def test_a_folder_of_another_model_is_refused_with_nothing_left_to_edit(edited: Path) -> None:
    line = error_of("edit", "other", "facts.jsonl", "--hooks", str(edited))
    assert "these hooks were made for" in line


def test_a_module_that_is_no_down_projection(place: Path, tmp_path: Path) -> None:
    template = "model.layers.{}.mlp.up_proj"
    hooks = str(tmp_path / "hooks")
    options = ("--hooks", hooks, "--template", template, *SMALL)
    line = error_of("edit", "tiny", "facts.jsonl", *options)
    assert "model.layers.0.mlp.up_proj puts out 64 numbers" in line


@pytest.mark.parametrize(
    "arguments",
    [("edti",), ("edit", "tiny", "facts.jsonl"), ("inspect", "edited", "--no-such-option")],
)
def test_mistaken_arguments_are_one_line(arguments: tuple[str, ...]) -> None:
    error_of(*arguments)
