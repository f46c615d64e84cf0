"""The memory readout from the command line: edited, gone on with, told, generated, merged."""

import json
from pathlib import Path

from tests.support.command_line import FACTS, error_of, run, run_json, write_facts

MEMORY = ("--readout", "memory", "--batch-size", "2")


def test_a_folder_of_rows_from_the_first_edit_to_the_last(place: Path, tmp_path: Path) -> None:
    hooks = str(tmp_path / "hooks")
    write_facts(tmp_path / "first.jsonl", FACTS[:2])
    first = run_json("edit", "tiny", str(tmp_path / "first.jsonl"), "--hooks", hooks, *MEMORY)
    assert first["plan"]["needed_bytes"]
    # A folder keeps its readout.
    again = run_json("edit", "tiny", "facts.jsonl", "--hooks", hooks, "--batch-size", "2")
    assert [batch["batch"] for batch in again["batches"]] == [2]
    assert "--readout delta" in error_of(
        "edit", "tiny", "facts.jsonl", "--hooks", hooks, "--readout", "delta"
    )
    told = run_json("inspect", hooks)
    assert (told["readout"], told["layers"], told["write_blocks"]) == ("memory", [1], [2])
    assert "readout memory, gate at layer 1, rows after 2" in run("inspect", hooks)
    run("eval", "tiny", "facts.jsonl", "--hooks", hooks)
    before = run_json("generate", "tiny", FACTS[0][0], "--hooks", hooks, "--trace")
    assert run_json("compact", hooks)["merged_batches"] == 2
    after = run_json("generate", "tiny", FACTS[0][0], "--hooks", hooks, "--trace")
    assert json.dumps(after) == json.dumps(before)


def test_a_readout_that_is_not_known(tmp_path: Path) -> None:
    line = error_of("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "h"), "--readout", "x")
    assert "choose one of delta, memory" in line
