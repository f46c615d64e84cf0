"""The memory readout from the command line: edited, gone on with, told, generated, merged."""

import json
import re
from pathlib import Path

from coachhook import EditConfig, Editor, StatisticsSource, ValueConfig
from coachhook.config import MemoryConfig
from coachhook.facts.loaders import load_requests
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
    # All were refused: no edit has forms or neighbours to show.
    found = run_json("eval", "tiny", "facts.jsonl", "--hooks", hooks)
    assert (found["gate"]["gate"], found["memory"]) == ("memory", None)
    assert "comes close" not in run("eval", "tiny", "facts.jsonl", "--hooks", hooks)
    before = run_json("generate", "tiny", FACTS[0][0], "--hooks", hooks, "--trace")
    assert run_json("compact", hooks)["merged_batches"] == 2
    after = run_json("generate", "tiny", FACTS[0][0], "--hooks", hooks, "--trace")
    assert json.dumps(after) == json.dumps(before)


def test_layers_are_the_gates_block_and_those_written_to(place: Path, tmp_path: Path) -> None:
    hooks = str(tmp_path / "hooks")
    given = ("edit", "tiny", "facts.jsonl", "--hooks", hooks, *MEMORY)
    run_json(*given, "--layers", "0,2,3")
    told = run_json("inspect", hooks)
    assert (told["layers"], told["write_blocks"]) == ([0], [2, 3])
    run_json(*given, "--layers", "0,2,3")
    assert "made with 0,2,3" in error_of(*given, "--layers", "1,2")
    other = str(tmp_path / "other")
    assert "do not fit a model of 4 blocks" in error_of(
        "edit", "tiny", "facts.jsonl", "--hooks", other, *MEMORY, "--layers", "1,9"
    )


def test_a_readout_that_is_not_known(tmp_path: Path) -> None:
    line = error_of("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "h"), "--readout", "x")
    assert "choose one of delta, memory" in line


def test_eval_and_the_page_tell_what_opens_an_edit_and_what_comes_close(tmp_path: Path) -> None:
    config = EditConfig(
        readout="memory",
        preservation=1.0,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=2),
        memory=MemoryConfig(gate_block=1, write_blocks=(2,), ordinary=0.9, unlikely=100.0),
    )
    write_facts(tmp_path / "facts.jsonl", FACTS[:2])
    facts, hooks = str(tmp_path / "facts.jsonl"), str(tmp_path / "hooks")
    editor = Editor.from_pretrained("tiny", config=config)
    editor.edit(load_requests(facts).requests)
    editor.save_pretrained(hooks)
    shown = " ".join(run("eval", "tiny", facts, "--hooks", hooks).split())
    assert re.search(r"an edit opens at a cosine of 0\.\d+; 95 % of paraphrases have \d", shown)
    assert "what else comes close, at most: locality prompt" in shown
    found = tmp_path / "found.json"
    found.write_text(json.dumps(run_json("eval", "tiny", facts, "--hooks", hooks)))
    run("report", str(found))
    assert "Forms and neighbours" in found.with_suffix(".html").read_text()
