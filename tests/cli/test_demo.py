import json
import subprocess
import sys
from pathlib import Path

import pytest

from coachhook.hookset import HookSet
from tests.support.command_line import (
    environment,
    invoke,
    run_json,
    write_facts,
)


def test_demo_fails_where_edits_do_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coachhook.cli.demo.NAME", "tiny")  # random weights, which learn nothing
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    result = invoke("demo", "--hooks", str(tmp_path / "hooks"), "--json")
    assert result.exit_code == 1, result.exception
    document = json.loads(result.stdout)
    assert len(document["batches"]) == 3
    assert document["fresh_process"]["edited"]
    assert not document["fresh_process"]["met"]
    assert HookSet.from_pretrained(tmp_path / "hooks").edits


@pytest.mark.slow
def test_the_embedded_model_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COACHHOOK_CACHE")  # its conversion takes too long to repeat
    facts, target = tmp_path / "facts.jsonl", str(tmp_path / "hooks")
    write_facts(
        facts,
        [
            ("The capital of France is", "France", "Lyon"),
            ("The company that created the iPhone is", "iPhone", "Nokia"),
        ],
    )
    document = run_json("edit", "smollm2", str(facts), "--hooks", target)
    assert [edit["verdict"] for edit in document["batches"][0]["edits"]] == ["applied"] * 2
    command = [sys.executable, "-m", "coachhook", "generate", "smollm2"]
    command += ["The capital of France is", "--hooks", target, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["edited"].strip().startswith("Lyon")
    assert done.stderr == ""
