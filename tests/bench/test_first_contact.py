"""The first minutes with a GPU, tried without one, and what is left of them when they are cut."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.first_contact import __main__ as first_contact
from bench.first_contact import summary
from bench.ops import lines
from bench.ops.interpreted import TINY

ROOT = Path(first_contact.__file__).parents[2]


@pytest.mark.slow
def test_from_end_to_end_without_a_gpu(tmp_path: Path) -> None:
    # On a machine with other work the phases need more than their three minutes.
    command = [sys.executable, "-m", "bench.first_contact", "--out", tmp_path, "--minutes", "15"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [(line["phase"], line["exit_code"]) for line in found["phases"]] == [
        (phase.name, 0) for phase in first_contact.PLAN
    ]
    assert summary.NO_TIMES in done.stdout
    assert found["facts"]["copy_gb_s"] > 0
    assert lines.read(tmp_path / "compile.jsonl")[-1]["compiled"] == len(TINY)
    assert found["checks_passed"] == len(TINY)
    keys = {line["key"] for line in lines.read(tmp_path / "table.jsonl") if "key" in line}
    assert keys == {lines.key_of(case) for case in TINY}
    [missed] = found["missed"]
    assert "sequence" in missed["key"]
    assert [line["gate"] for line in found["models"]] == ["keyed", "memory"]
    assert [len(line["rows"]) for line in found["models"]] == [4, 4]
    [tuned] = found["tuned"]
    [kept] = (tmp_path / "configs").rglob("*.json")
    assert kept.stem == tuned["kernel"]


def test_models_are_measured_once_each(tmp_path: Path) -> None:
    path = tmp_path / "inference.jsonl"
    lines.append(path, {"gate": "keyed", "edits": 1000, "dense": True})
    for _ in range(2):
        with torch.inference_mode():
            first_contact.phases._inference(path, time.monotonic() + 100)
    seen = [(line["gate"], line["edits"]) for line in lines.read(path)]
    assert seen == [("keyed", 1000), ("memory", 10_000)]
    assert "tiny memory, 10000 edits, Δ none: decode" in summary.text_of(summary.collect(tmp_path))


WITHOUT = """
import importlib.machinery as machinery
missing = {"pydantic", "gguf", "pytest", "hypothesis", "peft"}
find = machinery.PathFinder.find_spec
def found(name, *rest):
    return None if name.partition(".")[0] in missing else find(name, *rest)
machinery.PathFinder.find_spec = found
import bench.first_contact.__main__, bench.inference.__main__, sys
print(sorted(missing & sys.modules.keys()))
"""


@pytest.mark.slow
def test_a_bare_machine_lacks_nothing() -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_the_end(process: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(process)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_phase_ends_with_its_children_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        first_contact, "command", lambda *_: ["sh", "-c", "sleep 600 & echo $!; sleep 600"]
    )
    assert first_contact.run_phase("table", tmp_path, limit=1.0) is None
    wait_for_the_end(int((tmp_path / "table.log").read_text()))


PHASE = """
import os, subprocess, sys, time
from bench.harness.orphans import end_with
end_with(int(sys.argv[1]))
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_phase_ends_with_its_children_when_the_run_is_killed() -> None:
    command = [sys.executable, "-c", PARENT, PHASE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        phase, child = map(int, run.stdout.readline().split())
        time.sleep(0.7)
        assert is_running(phase)
        assert is_running(child)
        run.kill()
        wait_for_the_end(child)
        wait_for_the_end(phase)


def test_a_phase_is_told_which_run_it_is_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[object] = []
    monkeypatch.setattr(first_contact, "end_with", called.append)
    monkeypatch.setattr(first_contact.phases, "run", lambda *given: called.append(given))
    told = first_contact.command("table", tmp_path, 3.0)
    assert told[told.index("--parent") + 1] == str(os.getpid())
    first_contact.main(tmp_path, phase="table", until=3.0, parent=7)
    assert called == [7, ("table", tmp_path, 3.0)]


def test_a_run_in_the_folder_of_one_that_was_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the earlier one was at is tried again, and the last word on everything counts."""
    monkeypatch.setattr(first_contact, "run_phase", lambda *_: 0)
    table, check, compiled = (tmp_path / f"{name}.jsonl" for name in ("table", "check", "compile"))
    lines.append(compiled, {"key": "one", "fault": "not compiled in time"})
    lines.append(compiled, {"compiled": 0})
    for outcome in ({"outcome": "failed", "why": "no memory"}, {"outcome": "passed"}):
        lines.append(check, {"key": "a test"} | outcome)
    lines.append(table, {"begun": "one"})
    lines.append(table, {"key": "one", "contender": "F.linear"})
    assert lines.unfinished(lines.read(table)) == ["one"]
    assert lines.done(lines.read(table)) == set()
    with table.open("a") as file:
        file.write('{"key": "one", "verd')
    first_contact.run_all(tmp_path, minutes=10)
    assert lines.unfinished(lines.read(table)) == []
    assert lines.read(table)[-1] == {"forgiven": ["one"]}
    lines.append(compiled, {"compiled": 1})
    found = summary.collect(tmp_path)
    assert (found["wrong"], found["checks_passed"], found["not_compiled"]) == ([], 1, [])
    lines.append(table, {"begun": "one"})
    assert lines.unfinished(lines.read(table)) == ["one"]
    lines.append(compiled, {"key": "two", "fault": "so"})
    assert [line["key"] for line in summary.collect(tmp_path)["not_compiled"]] == ["two"]


def test_a_phase_that_breaks_off_is_begun_again_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run: list[str] = []

    def run_phase(name: str, out: Path, limit: float) -> int | None:
        run.append(name)
        if name != "tune":
            lines.append(out / f"{name}.jsonl", {"key": len(run)})
        broken = name == "table" and run.count(name) < 3
        return 1 if broken or name == "tune" else None if name == "check" else 0

    monkeypatch.setattr(first_contact, "run_phase", run_phase)
    first_contact.run_all(tmp_path, minutes=10)
    once = ["facts", "compile", "check"]
    # What leaves nothing behind is not begun again.
    assert run == [*once, *["table"] * 3, "inference", "tune"]
    told = [line["exit_code"] for line in lines.read(tmp_path / "phases.jsonl")]
    assert told == [0, 0, "its time was over", 1, 1, 0, 0, 1]
    run.clear()
    first_contact.run_all(tmp_path, minutes=0.1)
    assert run == []


def test_the_summary_of_what_there_is(tmp_path: Path) -> None:
    summary.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["wrong"] == []
    lines.append(tmp_path / "facts.jsonl", {"device": "H", "gpu": True})
    lines.append(tmp_path / "check.jsonl", {"key": "a test", "outcome": "failed", "why": "so"})
    row = {"microseconds": 3.0, "ratio": 1.2, "must": 1.1}
    table = tmp_path / "table.jsonl"
    lines.append(table, {"begun": "one"})
    lines.append(table, {"key": "none", "verdict": ""} | row)
    lines.append(table, {"key": "near", "verdict": "×1.10 MISSED"} | row)
    lines.append(table, {"key": "far", "verdict": "×1.10 MISSED"} | row | {"ratio": 3.0})
    lines.append(table, {"key": "good", "verdict": "×1.30 reached"} | row)
    lines.append(table, {"key": "bad", "verdict": "WRONG: off by 3"})
    with table.open("a") as file:
        file.write('{"key": "cut')
    found = summary.collect(tmp_path)
    assert not found["times_mean_nothing"]
    assert found["wrong"] == ["a test: so", "bad: WRONG: off by 3"]
    assert [line["key"] for line in found["missed"]] == ["far", "near"]
    assert [line["key"] for line in found["reached"]] == ["good"]
    text = summary.text_of(found)
    assert summary.NO_TIMES not in text
    assert text.index("far") < text.index("near") < text.index("good")
